"""A step → ForwardBatch → logits → next tokens. Owns the model and the KV tensors."""

import contextlib
from array import array
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from engine.execution.adjustments import row_starts
from engine.execution.batch_builder import BatchBuilder, int64
from engine.execution.capture import (
    Capture,
    CaptureMode,
    PartsCapture,
    Record,
    capture_error,
)
from engine.execution.kv_tensors import KvLayout
from engine.execution.sampler import Sampled, Sampler
from engine.execution.scoring import Targets, score
from engine.execution.step_graphs import StepGraphs
from engine.execution.transfer import to_device
from engine.parallel.step_message import StepMessage
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduling.kv_cache import NULL_BLOCK, BlockTables, LayerGroup
from engine.scheduling.sequence import Chunk, MasksOfRows, Sequence, Step
from model import ModelConfig, Transformer, loader
from model.adapters import AdapterList
from model.cost.workload import state_bytes
from model.ops.backend import Backend, Compute, choose_backend
from model.ops.forward_batch import ForwardBatch
from model.ops.kv_values import random_kv
from model.ops.specs import LayerState
from model.ops.step_parts import BATCH_PREPARATION, SAMPLING
from model.sharding import ALONE, Shard

_LIKELY_TOKENS = 256  # per sequence; their KV pages are touched before the first step on a CPU
_MAX_TOUCHED_BYTES = 256 << 20


class ModelRunner:
    """The model on its device, with the state of the running sequences there, by row.

    The state consists of KV, block tables and, in the sampler, the last tokens. With a shard, the
    runner computes one rank's part; the runners of all ranks receive the same calls in the same
    order.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        shard: Shard = ALONE,
    ):
        self.device, self.dtype, self.shard = device, dtype, shard
        self.backend = choose_backend(device, dtype, config.kv_dtype)
        self.config = config.held(self.backend)
        self._layout = KvLayout.of(config, shard.size, self.backend.kv_dtype)
        self.groups: list[LayerGroup] = self._layout.groups
        self.model: Transformer | None = None
        # See `KvLayout.allocate`.
        self.kv_caches: list[torch.Tensor] = []
        # Of each recurrent layer. Rows follow those of sequences and padding for snapshots.
        self.states: list[LayerState] = []
        self.sampler: Sampler | None = None
        self.batches: BatchBuilder | None = None
        # For each layer: its group, and its KV tensor.
        self._layer_caches = self._layout.layer_caches
        self._graphs: StepGraphs | None = None
        # On a CPU, of steps that are not replayed: see `forward`.
        self._logits: torch.Tensor | None = None
        self.block_size = 0
        # Exchanges a report with the other ranks; returns those of all ranks.
        self.exchange_reports: Callable[[str], list[str]] = lambda report: [report]

    @property
    def captured(self) -> bool:
        """Whether decode steps are replayed."""
        return self._graphs is not None

    def set_kernels(self, choices: Mapping[str, Any]) -> None:
        """Use these kernels instead of the defaults, by operation; call it before `load`."""
        self.backend = self.backend.with_choices(choices)

    def check(self, checkpoint: Path, adapters: AdapterList = ()) -> None:
        """Raise CheckpointError if the stored weights or the adapters do not fit the config."""
        loader.check(Transformer(self.config, self.shard), checkpoint, adapters)

    def load(self, checkpoint: Path, dummy: bool, adapters: AdapterList = ()) -> None:
        """Load the weights with adapters (random ones if dummy). Raises CheckpointError."""
        model = Transformer(self.config, self.shard)
        if dummy:
            loader.load_dummy(model, self.backend)
        else:
            loader.load(model, checkpoint, self.backend, adapters)
        self.model = model

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one KV block over all layers of a group."""
        return self._layout.block_bytes(block_size)

    def state_bytes(self) -> int:
        """Bytes of one sequence's state over all recurrent layers."""
        return state_bytes(self.config, self.dtype.itemsize, self.shard.size)

    def allocate(
        self,
        num_blocks: int,
        block_size: int,
        max_positions: int,
        max_batch_size: int,
        snapshots: int = 0,
    ) -> None:
        """Allocate the KV tensors, the rotary table and the state of each row.

        One extra block and one extra row are for padding. snapshots: further rows of the states of
        recurrent layers.
        """
        if self.model is None:
            raise RuntimeError("call load() before allocate()")
        self.block_size = block_size
        self.kv_caches = self._layout.allocate(self.backend, num_blocks + 1, block_size)
        # Only the null block is read before it is written. On a CPU the blocks of a first batch
        # are touched now, since page faults would slow down its steps; other blocks of a large
        # pool cost nothing until they are used.
        touched = NULL_BLOCK + 1
        if self.device.type == "cpu":
            touched += min(
                max_batch_size * _LIKELY_TOKENS // block_size,
                _MAX_TOUCHED_BYTES // self.block_bytes(block_size),
                num_blocks,
            )
        for cache in self.kv_caches:
            cache[:, :touched].zero_()
        self.states = self._empty_states(max_batch_size + 1 + snapshots)
        self.model.prepare_rope(max_positions, self.device)
        if self.device.type == "cpu":
            self._logits = self.empty_logits(max_batch_size)
        self.sampler = Sampler(max_batch_size + 1, self.backend, self.shard, self.config.vocab_size)
        self.batches = BatchBuilder(
            len(self.groups),
            max_batch_size,
            max_positions,
            block_size,
            num_blocks,
            self.device,
            self.config,
        )

    def _empty_states(self, rows: int) -> list[LayerState]:
        """States of the recurrent layers; each is written before it is read."""
        if self.config.delta_rule is None:
            return []
        spec = self.config.delta_rule.part(self.shard.size)
        return [
            LayerState(
                self.backend.empty_state((rows, *spec.conv_shape), self.dtype),
                self.backend.empty_state((rows, *spec.recurrent_shape), torch.float32),
            )
            for _ in self.config.recurrent_layers
        ]

    def _copy_states(self, pairs: SequenceOf[tuple[int, int]]) -> None:
        """Copy states of recurrent layers from one row to another."""
        if not pairs:
            return
        source, target = (to_device(int64(rows), self.device) for rows in zip(*pairs, strict=True))
        for state in self.states:
            for tensor in state:
                tensor.index_copy_(0, target, tensor.index_select(0, source))

    def run_peak_step(
        self, max_batch_size: int, max_batch_tokens: int, max_positions: int, block_size: int
    ) -> None:
        """Run the step that needs the most memory: every row is sampled, with log-probabilities.

        Then prompts of one sequence, each twice as long as the one before: kernels have variants
        for few and for many tokens, and all of them are compiled now. Waits for each step and
        leaves nothing allocated. Only the null block is read and written.
        """
        self.allocate(1, block_size, max_positions, max_batch_size)
        size = min(max_batch_size, max_batch_tokens)
        length = min(max_batch_tokens // size, max_positions)
        longest = min(max_batch_tokens, max_positions)
        costly = SamplingParams(temperature=1, top_p=0.9, logprobs=20, repetition_penalty=2)
        self.launch(self._prompts(size, length, costly)).read()
        for doubled in range(longest.bit_length()):
            self.launch(self._prompts(1, 1 << doubled, SamplingParams())).read()
        self.deallocate()

    @torch.inference_mode()
    def run_peak_end(self, rows: int) -> None:
        """Sample the logits of this many rows as the captured ends of steps do (`step_graphs.py`).

        With several ranks the logits are only allocated: what else is captured then is small.
        """
        logits = self.empty_logits(rows).zero_()
        if self.shard.size == 1:
            sampler = Sampler(rows, self.backend, vocab=self.config.vocab_size)
            each = torch.arange(rows, device=self.device)
            sampler.sample_adjusted(logits, each, each.int()).tolist()

    def empty_logits(self, rows: int) -> torch.Tensor:
        """Memory for logits float32 [rows, this rank's part of the vocabulary]."""
        part = self.shard.vocab_part(self.config.vocab_size)
        return torch.empty(rows, part.stop - part.start, dtype=torch.float32, device=self.device)

    def _prompts(self, count: int, length: int, params: SamplingParams) -> Step:
        """A step of `count` prompts of one length, all in the null block."""
        step = Step()
        for row in range(count):
            blocks = array("i", [NULL_BLOCK]) * -(-length // self.block_size)
            tokens, tables = [0] * length, BlockTables([blocks] * len(self.groups))
            request = Request(tokens, params)
            sequence = Sequence(request, tokens, length + 1, frozenset(), tables, 0.0, row=row)
            step.changed_tables.append(sequence)
            step.chunks.append(Chunk(sequence, 0, length, samples=True))
            step.context_lens.append(length)
        return step

    def fill_kv_randomly(self, last_block: int) -> None:
        """Write random values to the KV blocks 1 … last_block, for measurements without prefill."""
        for cache in self.kv_caches:
            cache[:, 1 : last_block + 1] = random_kv(cache)
        for state in self.states:
            for tensor in state:
                tensor.zero_()

    @property
    def capture_modes(self) -> list[CaptureMode]:
        """The modes of `capture`, in the order in which to try them."""
        has_plain = self.backend.without_programmatic_launch() is not self.backend
        return [mode for mode in CaptureMode if has_plain or mode != CaptureMode.PLAIN_LAUNCH]

    def capture(
        self,
        capture: Capture,
        mode: CaptureMode = CaptureMode.WHOLE,
        max_batch_tokens: int = 0,
    ) -> None:
        """Capture steps in which every sequence decodes; `launch` then replays them.

        Whole steps are also captured with chunks, of up to max_batch_tokens tokens.
        Raises an error on every rank if it fails on one of them, and then captures nothing.
        """
        ops, record = self.backend, cast(Record, capture)
        if mode != CaptureMode.WHOLE:
            ops = ops.without_programmatic_launch()
        if mode == CaptureMode.PARTS:
            record = parts = PartsCapture(capture, ops)
            ops = parts.ops
        self._make_graphs(partial(self._record_on_all, record), ops, mode, max_batch_tokens)

    def _record_on_all(self, record: Record, compute: Compute) -> Compute:
        """Record on every rank. Raises on all of them if one fails: they capture in step, since
        the first run of a computation exchanges tensors.
        """
        failure: Exception | None = None
        try:
            replay = record(compute)
        except Exception as error:
            failure = error
        reports = self.exchange_reports("" if failure is None else capture_error(failure))
        if failure is not None:
            raise failure
        for rank, report in enumerate(reports):
            if report:
                raise RuntimeError(f"rank {rank}: {report}")
        return replay

    @torch.inference_mode()
    def _make_graphs(
        self, record: Record, ops: Backend, mode: CaptureMode | None, max_batch_tokens: int = 0
    ) -> None:
        self.uncapture()
        self._graphs = StepGraphs(self, record, ops, mode, max_batch_tokens)

    def record(self) -> None:
        """Record decode steps as kernel calls, if the backend and the model allow it.

        Each batch size is recorded when it first occurs.
        """
        recorder = self.backend.recorder()
        if recorder is not None:
            # Raised if an operation falls back to torch: the model then runs unrecorded.
            with contextlib.suppress(RuntimeError):
                self._make_graphs(recorder, self.backend, None)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """The logits float32 [len(batch.logits_rows), this rank's part of the vocabulary].

        On a CPU they are in memory that the next call writes again: new memory of this size comes
        from the system, and 64 rows of 150,000 logits would wait for it nearly as long as for their
        computation.
        """
        out, count = self._logits, len(batch.logits_rows)
        if out is not None:
            out = out[:count] if count <= len(out) else None
        return self.forward_on(self.backend, batch, out)

    def _forward_scored(
        self,
        batch: ForwardBatch,
        rows: SequenceOf[tuple[int, int]],
        targets: Targets | None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """As `forward`, and the results of `score` for these ranges of the batch's tokens."""
        assert self.model is not None
        assert self.sampler is not None
        ops = self.backend
        x, delta = self.model.hidden(ops, batch, self.kv_caches, self._layer_caches, self.states)
        scores = score(self.sampler, partial(self.model.logits, ops, x, delta), rows, targets)
        return self.model.logits(ops, x, delta, batch.logits_rows), scores

    def forward_on(
        self, ops: Backend, batch: ForwardBatch, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `forward`, with the operations of a backend; out: takes the logits."""
        assert self.model is not None
        return self.model(ops, batch, self.kv_caches, self._layer_caches, out, self.states)

    def free(self) -> None:
        """Free weights, KV and captured steps."""
        self.model = None
        self.deallocate()

    def deallocate(self) -> None:
        """Free everything but the weights."""
        self.uncapture()
        self.sampler = None
        self.batches = None
        self.kv_caches = []
        self.states = []
        self._logits = None

    def uncapture(self) -> None:
        """Drop captured steps: the following steps are not replayed."""
        self._graphs = None

    def launch(self, step: Step) -> Sampled:
        """Start the step; the result holds the next token of each of `step.sampling()`."""
        if self.model is None or self.sampler is None:
            raise RuntimeError("the engine is not warmed up: call warm_up() first")
        starts = row_starts(step)
        if starts:
            rows, params = [start.row for start in starts], [start.params for start in starts]
            self.sampler.set_params(rows, params)
        self.sampler.adjustments.update(step, starts)
        non_greedy = {i: s.request.params for i, s in enumerate(step.sampling()) if not s.greedy}
        set_masks = None if step.masks is None else partial(_set_masks, self.sampler, step.masks)
        message = StepMessage.of(step, all_greedy=not non_greedy)
        return self.compute(message, non_greedy, set_masks, Targets.of(step))

    @torch.inference_mode()
    def compute(
        self,
        message: StepMessage,
        non_greedy: Mapping[int, SamplingParams],
        before_sampling: Callable[[], None] | None = None,
        targets: Targets | None = None,
    ) -> Sampled:
        """Start a step; non_greedy: as in `Sampler.sample`, known only to rank 0, like the others.

        before_sampling: is called when the logits have been launched. targets: of scored rows.
        """
        assert self.sampler is not None
        assert self.batches is not None
        graphs = self._graphs
        scores: tuple[torch.Tensor, ...] = ()
        if message.block_tables:
            self.batches.update_tables(message)
            if graphs is not None:
                graphs.update_tables()
        if message.given:
            given = (int64(each) for each in zip(*message.given, strict=True))
            self.sampler.last.index_copy_(0, *(to_device(each, self.device) for each in given))
        self._copy_states(message.restored)
        if graphs is None or message.starts:
            with BATCH_PREPARATION:
                batch, rows, positions = self.batches.build(message, self.sampler.last)
            if message.scored:
                logits, scores = self._forward_scored(batch, message.scored, targets)
            else:
                replayed = None if graphs is None else graphs.replay_chunks(batch)
                logits = self.forward(batch) if replayed is None else replayed
            self._copy_states(message.saved)
        else:
            logits, rows, positions, tokens = graphs.replay_decodes(
                message, non_greedy, before_sampling
            )
            if tokens is not None:
                return Sampled(tokens)
            before_sampling = None
        if before_sampling is not None:
            before_sampling()
        with SAMPLING:
            sampled = self.sampler.sample(logits, rows, positions, non_greedy, message.all_greedy)
        if scores:
            sampled.add_scores(scores)
        return sampled


def _set_masks(sampler: Sampler, masks: MasksOfRows) -> None:
    sampler.adjustments.set_masks(*masks())
