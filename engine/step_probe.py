"""Repeats one step of the engine, for profiles."""

import torch

from engine.engine import Engine
from engine.errors import EngineError
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduling.sequence import Sequence


class StepProbe:
    """`batch` sequences of random tokens, each about to compute the last `query` of `context`.

    The KV cache holds random values for the earlier positions: nothing is prefilled. The step is
    the engine's own, from scheduling to sampling, without drafts. Unless `replayed` is set it is
    never replayed, because the parts of a graph or a recording cannot be timed. Raises EngineError
    if the engine has no room for the step.
    """

    def __init__(
        self, engine: Engine, batch: int, query: int, context: int, replayed: bool = False
    ):
        engine.warm_up()
        if context > engine.max_positions:
            raise EngineError(
                "a context of {context} tokens exceeds the limit of {limit} tokens",
                context=context,
                limit=engine.max_positions,
            )
        if batch > engine.max_batch_size or batch * query > engine.max_batch_tokens:
            raise EngineError(
                "{batch} sequences of {query} tokens do not fit into one step; raise "
                "{max_batch_size} or {max_batch_tokens}",
                batch=batch,
                query=query,
            )
        self._steps = engine.steps
        self._start, self._context = context - query, context
        ids = torch.randint(
            engine.model_config.vocab_size,
            (batch, context),
            generator=torch.Generator().manual_seed(0),
        )
        if not replayed:
            engine.runner.uncapture()
        scheduler = self._steps.scheduler
        scheduler.speculation = None
        scheduler.running = [self._sequence(i, tokens) for i, tokens in enumerate(ids.tolist())]
        tables = [table for each in scheduler.running for table in each.block_tables.tables]
        engine.runner.fill_kv_randomly(max(max(table) for table in tables))

    def step(self) -> None:
        """Run the step."""
        self._steps.run_step()
        self._steps.read()
        for sequence in self._steps.scheduler.running:
            del sequence.tokens[self._context :]
            sequence.computed, sequence.length = self._start, self._context
            # The first step gives the runner the block tables and a last token to decode from.
            sequence.decoding = self._context - self._start == 1

    def release(self) -> None:
        """Free the KV blocks, so that the engine has room for another probe."""
        scheduler = self._steps.scheduler
        for sequence in scheduler.running:
            scheduler.cache.release(sequence.block_tables)
        scheduler.running = []

    def _sequence(self, row: int, tokens: list[int]) -> Sequence:
        cache = self._steps.scheduler.cache
        tables, size = cache.new_tables(), cache.block_size
        # Block by block, as the sequence would have grown: blocks behind a window are freed.
        for start in range(0, self._context, size):
            if not cache.allocate(
                tables, min(start, self._start), min(start + size, self._context)
            ):
                raise EngineError(
                    "the KV cache is too small for this batch at this context: use a smaller batch "
                    "or context, or raise {kv_memory}"
                )
        request = Request(tokens, SamplingParams(ignore_eos=True))
        limit = self._context + 2  # never reached: `step` removes each sampled token
        return Sequence(
            request, tokens, limit, frozenset(), tables, arrived=0.0, computed=self._start, row=row
        )
