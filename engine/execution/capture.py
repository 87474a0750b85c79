"""Capture of computations for replay: whole, or in parts with attention and experts outside.

On a GPU a captured computation is one or more CUDA or HIP graphs.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from enum import Enum
from typing import Any, Protocol, cast
from weakref import WeakSet

import torch

from engine.stats import EngineStats
from model.ops.backend import Backend, Compute
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.specs import Activation, AttentionSpec, Experts, ExpertShard

Record = Callable[[Compute], Compute]
"""Turns a computation into a function that repeats it on the current content of its buffers."""

Part = Callable[[], object]


class CaptureMode(Enum):
    """How steps are captured, in the order in which the modes are tried."""

    WHOLE = "whole"
    PLAIN_LAUNCH = "whole, without programmatic launch"
    PARTS = "in parts, with attention and experts outside of graphs"


class Capture(Protocol):
    """A way to capture; calling it captures a whole computation."""

    def __call__(self, compute: Compute) -> Compute:
        """As `Record`: run the computation once, then capture it."""

    def run_first(self, compute: Compute) -> None:
        """Run a computation that is then captured: what compiles or allocates happens now."""

    def segment(self) -> AbstractContextManager[Part]:
        """Capture what happens in the context; the value repeats it, once the context is left."""


class GpuCapture:
    """Captures as CUDA graphs (HIP graphs on AMD), which share their memory."""

    def __init__(self, stats: EngineStats):
        """Raises RuntimeError without a GPU, before any exchange between ranks.

        The time of first runs is added to `stats.compile_s`.
        """
        if not torch.cuda.is_available():
            raise RuntimeError("there is no GPU to capture steps on")
        self._stats = stats
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()  # that share the pool
        # One stream for all captures: cuBLAS keeps a workspace of tens of megabytes for each
        # stream.
        self._stream = torch.cuda.Stream()

    def __call__(self, compute: Compute) -> Compute:
        """As `Capture`."""
        return capture_whole(self, compute)

    def run_first(self, compute: Compute) -> None:
        """As `Capture`: compiling kernels and initializing libraries cannot be captured."""
        start = time.perf_counter()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            compute()
        self._stream.synchronize()
        torch.cuda.empty_cache()  # a graph cannot use memory that is cached outside its pool
        self._stats.compile_s += time.perf_counter() - start

    @contextmanager
    def segment(self) -> Iterator[Part]:
        """As `Capture`: one graph."""
        if not self._graphs:  # torch refuses a pool whose graphs have all been freed
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):  # which is left even if the capture fails
            graph.capture_begin(pool=self._pool)
            try:
                yield graph.replay
            finally:
                graph.capture_end()
        self._graphs.add(graph)


def capture_whole(capture: Capture, compute: Compute) -> Compute:
    """Capture a computation as one segment."""
    capture.run_first(compute)
    with capture.segment() as repeat:
        result = compute()

    def replay() -> torch.Tensor:
        repeat()
        return result

    return replay


def capture_error(error: Exception) -> str:
    """The first line of the cause of a failed capture.

    torch raises again, without the cause, when the failed capture ends.
    """
    return str(error.__context__ or error).partition("\n")[0]


class PartsCapture:
    """Captures the parts of a step between attentions and experts, which run outside of them.

    For devices or backends that cannot capture these operations. The decoder must run with `ops`.
    Operations outside read and write buffers that all layers and all sizes share; the largest size
    must be captured first.
    """

    def __init__(self, capture: Capture, backend: Backend):
        self.ops = cast(Backend, _WithPartsOutside(backend, self._outside))
        self._capture = capture
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}
        self._parts: list[Part] | None = None  # None: nothing is being captured
        self._open = ExitStack()  # the context of the segment that is being captured

    def __call__(self, compute: Compute) -> Compute:
        """As `Record`."""
        self._capture.run_first(compute)
        parts = self._parts = []
        try:
            with self._open:
                self._begin()
                result = compute()
        finally:
            self._parts = None

        def replay() -> torch.Tensor:
            for part in parts:
                part()
            return result

        return replay

    def _begin(self) -> None:
        assert self._parts is not None
        self._parts.append(self._open.enter_context(self._capture.segment()))

    def _outside(
        self, name: str, inputs: tuple[torch.Tensor, ...], op: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """The operation `op` of `inputs`, all [tokens, …], between two segments."""
        if self._parts is None:
            result = op(*inputs)
            for index, tensor in enumerate((*inputs, result)):
                self._buffer(name, index, tensor)
            return result
        staged = [self._buffer(name, i, each).copy_(each) for i, each in enumerate(inputs)]
        self._open.close()
        out = self._buffers[name, len(inputs)][: len(inputs[0])]
        self._parts.append(lambda: out.copy_(op(*staged)))
        self._begin()
        return out

    def _buffer(self, name: str, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """The part of an operation's buffer that has the shape of the tensor."""
        buffer = self._buffers.get((name, index))
        if buffer is None or len(buffer) < len(tensor):
            buffer = self._buffers[name, index] = torch.empty_like(tensor)
        return buffer[: len(tensor)]


class _WithPartsOutside:
    """A backend whose attention and experts are passed to `outside`."""

    def __init__(self, backend: Backend, outside: Callable[..., torch.Tensor]):
        self._backend, self._outside = backend, outside

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def attention(
        self,
        query: torch.Tensor,
        kv: torch.Tensor,
        batch: ForwardBatch,
        group: GroupTables,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Backend.attention`."""

        def attend(staged: torch.Tensor) -> torch.Tensor:
            fresh = replace(group, plan=None)  # a plan is of one step
            return self._backend.attention(staged, kv, batch, fresh, spec, sinks)

        return self._outside("attention", (query,), attend)

    def experts(
        self,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        experts: Experts,
        activation: Activation,
        shard: ExpertShard = ExpertShard(),  # noqa: B008 - immutable
    ) -> torch.Tensor:
        """As `Backend.experts`."""

        def compute(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return self._backend.experts(x, chosen, weights, experts, activation, shard)

        return self._outside("experts", (x, chosen, weights), compute)

    def norm_experts(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Backend.norm_experts`, in steps, of which the experts are outside."""
        return Backend.norm_experts(cast(Backend, self), *arguments)
