"""One step of the engine, to be run again and again: what a profile measures."""

import torch

from engine.engine import Engine
from engine.errors import EngineError
from engine.request import Request, SamplingParams
from engine.scheduler import Sequence


class Probe:
    """`batch` sequences of random tokens, each about to compute the last `query` of `context`.

    What lies before is in the KV cache already, as random values: nothing is prefilled. The step
    is the engine's own, from the schedule to the sampled tokens, but never replayed as a graph,
    whose parts nobody can follow. Raises EngineError where the engine has no room for it.
    """

    def __init__(self, engine: Engine, batch: int, query: int, context: int):
        engine.warm_up()
        scheduler, runner = engine._scheduler, engine._runner
        assert scheduler is not None  # warmed up
        if context > engine.max_positions:
            raise EngineError(
                f"a context of {context} is beyond the {engine.max_positions} positions there are"
            )
        if batch > engine.max_batch_size or batch * query > engine.max_batch_tokens:
            raise EngineError(f"{batch} sequences of {query} tokens are more than one step takes")
        self._engine, self._scheduler, self._runner = engine, scheduler, runner
        self._start, self._context = context - query, context
        ids = torch.randint(
            engine.model_config.vocab_size,
            (batch, context),
            generator=torch.Generator().manual_seed(0),
        )
        runner._graphs = None
        scheduler.running = [self._sequence(i, tokens) for i, tokens in enumerate(ids.tolist())]
        tables = [table for sequence in scheduler.running for table in sequence.tables.tables]
        last = max(max(table) for table in tables)
        for cache in runner._caches:
            cache[:, 1 : last + 1] = torch.randn(cache.shape[2:]).to(cache)

    def step(self) -> None:
        """Run the step."""
        self._engine._step(self._scheduler)
        self._engine._read(self._scheduler)
        for sequence in self._scheduler.running:
            del sequence.tokens[self._context :]
            sequence.computed, sequence.length = self._start, self._context
            # The first step gives the runner the blocks and a token to go on from.
            sequence.decoding = self._context - self._start == 1

    def _sequence(self, row: int, tokens: list[int]) -> Sequence:
        cache = self._scheduler.cache
        tables, size = cache.new_tables(), cache.block_size
        # Block by block, as they would have grown: those behind a window are given back.
        for start in range(0, self._context, size):
            if not cache.allocate(
                tables, min(start, self._start), min(start + size, self._context)
            ):
                raise EngineError(
                    "the KV cache is too small for this batch at this context: lower either, or "
                    "raise --kv-memory"
                )
        request = Request(tokens, SamplingParams(ignore_eos=True))
        limit = self._context + 2  # never reached: a step adds one token, which is taken back
        return Sequence(
            request, tokens, limit, frozenset(), tables, arrived=0.0, computed=self._start, row=row
        )
