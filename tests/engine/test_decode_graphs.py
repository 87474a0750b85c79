"""Captured decode steps of padded sizes give the same results as computed ones.

In place of a GPU graph, a captured step here is a function that computes on the same buffers again.
"""

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import Engine, EngineConfig, EngineStats, Request, SamplingParams
from engine.execution import batch_builder, sampler
from engine.execution.batch_builder import DecodeInputs
from engine.execution.capture import GpuCapture
from engine.execution.decode_graphs import DecodeGraphs, GraphInputs, capture_sizes
from engine.scheduling.kv_cache import NULL_BLOCK
from model.ops.backend import Backend, Compute
from model.ops.cpu.backend import CpuBackend
from model.ops.forward_batch import ForwardBatch
from tests.engine.captures import Repeating
from tests.engine.test_engine import load


class FromTensors:
    """A model that reads all lengths from the batch's tensors, as captured kernels do."""

    def __init__(self, model: Any):
        self._model = model

    def __call__(self, ops: Backend, batch: ForwardBatch, *rest: Any) -> torch.Tensor:
        fresh = replace(
            batch,
            host_query_lens=batch.cu_seqlens_q.diff().tolist(),
            host_context_lens=batch.context_lens.tolist(),
            groups=tuple(replace(group, plan=None) for group in batch.groups),
        )
        logits: torch.Tensor = self._model(ops, fresh, *rest)
        return logits


def test_without_a_gpu_a_capture_is_refused_before_it_begins() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="no GPU"):
        GpuCapture(EngineStats())


class FakeGraph(MagicMock):
    """A graph without a GPU; the class lists the pools of all captures."""

    pools: ClassVar[list[int]] = []

    def capture_begin(self, pool: int) -> None:
        self.pools.append(pool)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let GpuCapture run without a GPU; the value ends with the current stream."""
    streams = ["the usual"]

    @contextmanager
    def stream(given: Any) -> Iterator[None]:
        streams.append(given)
        try:
            yield
        finally:
            streams.pop()

    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "graph_pool_handle": count().__next__,
        "Stream": MagicMock(),
        "stream": stream,
        "CUDAGraph": FakeGraph,
        "current_stream": lambda: streams[-1],
        "empty_cache": lambda: None,
    }
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    FakeGraph.pools.clear()
    return streams


def test_a_capture_that_fails_leaves_the_stream_as_it_was(
    streams: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def invalidated(graph: FakeGraph) -> None:
        raise RuntimeError("the capture was invalidated")

    monkeypatch.setattr(FakeGraph, "capture_end", invalidated, raising=False)
    capture = GpuCapture(EngineStats())
    with pytest.raises(RuntimeError, match="invalidated"):
        capture(lambda: torch.zeros(1))
    assert streams == ["the usual"]


def test_captures_share_memory_while_one_of_them_is_kept(streams: list[Any]) -> None:
    """torch refuses a pool of memory whose captures were all freed."""
    capture = GpuCapture(EngineStats())
    kept = [capture(lambda: torch.zeros(1)) for _ in range(3)]
    assert len(set(FakeGraph.pools)) == 1
    kept.clear()
    gc.collect()
    for _ in range(2):
        capture(lambda: torch.zeros(1))
        gc.collect()
    assert len(set(FakeGraph.pools)) == 3


def test_capture_sizes_are_few_and_include_the_largest_batch() -> None:
    assert capture_sizes(1) == [1]
    assert capture_sizes(3) == [1, 2, 3]
    assert capture_sizes(8) == [1, 2, 4, 8]
    assert capture_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert capture_sizes(120) == [1, 2, 4, *range(8, 121, 8)]
    assert capture_sizes(300) == [*capture_sizes(120), *range(128, 257, 16), 288, 300]
    assert len(capture_sizes(1024)) < 50


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("name", ["gpt_oss", "qwen2-window-yarn", "qwen3_moe", "phi3-longrope"])
def test_replayed_and_padded_steps_give_the_same_tokens(
    name: str, lookahead: int, checkpoint: Callable[[str], Path]
) -> None:
    requests = load()
    settings: dict[str, Any] = {
        "dtype": "float32",
        "kv_memory": 32 << 20,
        "max_batch_size": 10,
        "speculation": False,
    }
    with Engine(checkpoint(name), EngineConfig(**settings)) as engine:
        expected = {c.request_id: c.token_ids for c in engine.generate(requests)}
    with Engine(checkpoint(name), EngineConfig(**settings)) as engine:
        runner, replays = engine.runner, Counter[int]()
        engine.steps.lookahead = lookahead
        runner.model = FromTensors(runner.model)  # type: ignore[assignment]
        runner.capture(Repeating(replays))
        for cache in runner.kv_caches:
            cache[:, 1:] = float("nan")
        found = {c.request_id: c.token_ids for c in engine.generate(requests)}
        assert all(not cache[:, NULL_BLOCK].any() for cache in runner.kv_caches)
    assert found == expected
    assert not runner.captured
    assert len(replays) >= 4
    assert sum(replays.values()) > 50
    assert set(replays) <= {1, 2, 4, 8, 10}


def test_the_end_of_a_step_is_replayed_unless_logprobs_are_wanted(
    checkpoint: Callable[[str], Path],
) -> None:
    """The tokens equal those of steps that are not replayed, for every kind of request."""
    kinds: dict[str, list[dict[str, Any]]] = {
        "greedy": [{}],
        "sampled": [{}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 0.9, "top_k": 5}],
        "": [{"logprobs": 2}, {"temperature": 0.8, "top_p": 0.9}, {}],
    }
    for tail, params in kinds.items():
        requests = [
            Request(
                [7, 8 + i], SamplingParams(max_new_tokens=12, seed=i, ignore_eos=True, **each), i
            )
            for i, each in enumerate(params)
        ]
        settings = EngineConfig(dtype="float32", kv_memory=32 << 20, max_batch_size=4)
        with Engine(checkpoint("qwen3"), settings) as engine:
            expected = {c.request_id: c for c in engine.generate(requests)}
            runner, replayed = engine.runner, Counter[tuple[str, bool]]()
            runner.model = FromTensors(runner.model)  # type: ignore[assignment]
            runner.capture(Repeating())
            assert runner._graphs is not None
            graphs = runner._graphs._decodes

            def noted(inputs: Any, tail: str, *rest: Any) -> Any:
                found = graphs(inputs, tail, *rest)  # noqa: B023
                replayed[tail, found.tokens is not None] += 1  # noqa: B023
                return found

            noted.padded_size = graphs.padded_size  # type: ignore[attr-defined]
            noted.set_block_tables = graphs.set_block_tables  # type: ignore[attr-defined]
            runner._graphs._decodes = noted  # type: ignore[assignment]
            found = {c.request_id: c for c in engine.generate(requests)}
        for i, one in expected.items():
            assert found[i].token_ids == one.token_ids
            # Padded rows make other shapes, for which torch's products can round differently.
            logprobs, others = found[i].logprobs or [], one.logprobs or []
            expected_logprobs = [x.logprob for x in others]
            assert [x.logprob for x in logprobs] == pytest.approx(expected_logprobs, abs=1e-4)
        assert replayed == {(tail, tail != ""): 11}


def test_a_replayed_step_copies_one_tensor_and_only_changed_block_tables(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], Path]
) -> None:
    sent: Counter[str] = Counter()
    for owner, name in (
        (batch_builder, "to_device"),
        (sampler, "to_device"),
        (DecodeGraphs, "set_block_tables"),
        (GraphInputs, "fill"),
    ):
        original = getattr(owner, name)

        def counted(*given: Any, name: str = name, original: Any = original) -> Any:
            sent[name] += 1
            return original(*given)

        monkeypatch.setattr(owner, name, counted)
    config = EngineConfig(dtype="float32", kv_memory=32 << 20, block_size=16, speculation=False)
    with Engine(checkpoint("qwen3"), config) as engine:
        engine.runner.model = FromTensors(engine.runner.model)  # type: ignore[assignment]
        engine.runner.capture(Repeating())
        counts = []
        for tokens in (10, 40):
            sent.clear()
            params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
            list(engine.generate([Request([5], params)]))
            counts.append(sent.copy())
    assert counts[1] - counts[0] == {"fill": 30, "set_block_tables": 2}


def test_steps_are_captured_on_the_device_of_the_block_tables() -> None:
    """Checked on the meta device, which does not compute but refuses operands of other devices."""
    tables = [torch.empty(3, 5, dtype=torch.int32, device="meta") for _ in range(2)]
    logits, devices = torch.empty(3, 8, device="meta"), list[torch.device]()

    def decode(rows: torch.Tensor, batch: ForwardBatch, out: torch.Tensor | None) -> torch.Tensor:
        given = (rows, batch.positions, batch.logits_rows, batch.cu_seqlens_q, batch.context_lens)
        devices.extend(tensor.device for tensor in given)
        devices.extend(group.slot_mapping.device for group in batch.groups)
        return logits[: len(rows)]

    graphs = DecodeGraphs(decode, tables, (3, 70), logits, Repeating())
    assert graphs.sizes == [1, 2, 3]
    assert devices == [torch.device("meta")] * (3 * 7)


@pytest.mark.parametrize("sequences", [1, 2, 7])
def test_the_integers_of_a_step_do_not_overlap_and_are_aligned(sequences: int) -> None:
    memory = torch.zeros(GraphInputs.bytes(sequences, 2) + 8, dtype=torch.uint8)
    inputs, count = GraphInputs.over(memory, sequences, 2), torch.arange(sequences)
    inputs.fill(DecodeInputs(count + 1, count + 21, count + 20, [count + 300, count + 4000]))
    spans = (inputs.rows, inputs.positions, *inputs.slot_mapping, inputs.context_lens)
    assert [span.tolist() for span in spans] == [
        (count + first).tolist() for first in (1, 20, 300, 4000, 21)
    ]
    assert all((span.data_ptr() - memory.data_ptr()) % 16 == 0 for span in spans)
    assert not memory[len(inputs.buffer) :].any()


def test_the_peak_step_is_followed_by_short_prompts_and_leaves_nothing_allocated(
    checkpoint: Callable[[str], Path],
) -> None:
    with Engine(checkpoint("gpt_oss"), EngineConfig(dtype="float32", kv_memory=32 << 20)) as engine:
        runner = engine.runner
        tokens, rows = list[int](), list[int]()
        model: Any = runner.model

        def watched(ops: Backend, batch: ForwardBatch, *rest: Any) -> torch.Tensor:
            tokens.append(len(batch.token_ids))
            rows.append(len(model(ops, batch, *rest)))
            return torch.zeros(rows[-1], engine.model_config.vocab_size)

        watched.prepare_rope = model.prepare_rope  # type: ignore[attr-defined]
        runner.model = watched  # type: ignore[assignment]
        runner.run_peak_step(64, 300, 200, 16)
        assert tokens == [64 * (300 // 64), 1, 2, 4, 8, 16, 32, 64, 128]
        assert rows == [64] + [1] * 8
        assert not runner.kv_caches
        assert runner.sampler is None


def test_loading_compiling_and_capturing_are_timed_separately(
    checkpoint: Callable[[str], Path],
) -> None:
    class Timed(Repeating):
        def __init__(self, stats: EngineStats):
            super().__init__()
            self.stats = stats

        def __call__(self, compute: Compute) -> Compute:
            self.stats.compile_s += 1000.0  # measured by the capture
            time.sleep(0.01)
            return compute

    config = EngineConfig(kv_memory=8 << 20, max_batch_size=2, speculation=False)
    engine = Engine(checkpoint("qwen2"), config)
    engine.make_capture = Timed
    with engine:
        stats = engine.stats
    assert stats.compile_s == 13_000  # of two batch sizes 4 parts, of chunks 5 sizes
    assert 0.13 <= stats.capture_s + 13_000 < stats.warm_up_s
    assert 0 < stats.load_s < stats.warm_up_s


class NoWaiting(TorchDispatchMode):
    """Refuses every operation that on a GPU would wait for its result."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "bincount")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        assert not any(name in str(func) for name in self.waiting), func
        if "aten.index.Tensor" in str(func):
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        result: torch.Tensor = func(*args, **(kwargs or {}))
        return result


def test_a_decode_step_is_launched_without_waiting_for_the_device(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every kind of sampling: only reading the tokens waits."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_p": 0.999},
        {"temperature": 0.7, "top_k": 30, "logprobs": 2},
        {"logprobs": 5},
    ]
    requests = [
        Request(
            [5, 6, 7 + i], SamplingParams(max_new_tokens=20, seed=i, ignore_eos=True, **kind), i
        )
        for i, kind in enumerate(kinds)
    ]
    config = EngineConfig(dtype="float32", kv_memory=32 << 20, speculation=False)
    with Engine(checkpoint("gpt_oss"), config) as engine:
        expected = {c.request_id: c.token_ids for c in engine.generate(requests)}
        runner, guarded = engine.runner, 0
        engine.steps.lookahead = 1
        # The CPU backend first finds the rows that need a full sort, which other backends do not.
        for name in ("sample", "sample_rows", "top_tokens"):
            monkeypatch.setattr(CpuBackend, name, getattr(Backend, name))
        launch, forward = runner.launch, runner.forward

        def unguarded(batch: ForwardBatch) -> torch.Tensor:
            with torch.utils._python_dispatch._disable_current_modes():
                return forward(batch)

        def launch_guarded(step: Any) -> Any:
            nonlocal guarded
            if step.chunks:
                return launch(step)
            guarded += 1
            with NoWaiting():
                return launch(step)

        runner.forward = unguarded  # type: ignore[method-assign]
        runner.launch = launch_guarded  # type: ignore[method-assign]
        assert {c.request_id: c.token_ids for c in engine.generate(requests)} == expected
        assert guarded == 19
        monkeypatch.undo()
        with pytest.raises(AssertionError, match="nonzero"):
            list(engine.generate(requests))
