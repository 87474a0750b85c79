"""The named parts of a step: the decoder, the backends and the engine mark where each runs.

`with QKV_PROJ: …` is a range in every trace of torch's profiler. While `observe` is active, its
callback also receives the name of the part that starts or continues, so that a timer can stamp each
change. Parts may be nested: the time inside an inner part is not the outer part's own. Only parts
of the thread that called `observe` are reported: engines of other threads run unobserved.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OTHER = "other"


class _Observer:
    """The callback of `observe`, and the parts that its thread is in, innermost last."""

    def __init__(self, callback: Callable[[str], None]):
        self._callback, self._running = callback, [OTHER]
        self._thread = threading.get_ident()
        callback(OTHER)

    def enter(self, name: str) -> None:
        if threading.get_ident() == self._thread:
            self._running.append(name)
            self._callback(name)

    def exit(self) -> None:
        if threading.get_ident() == self._thread:
            self._running.pop()
            self._callback(self._running[-1])


_observer: _Observer | None = None


class StepPart:
    """A context manager that marks a part of a step. One object serves every use of its name."""

    __slots__ = ("_range", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._range: Any = None

    def __enter__(self) -> None:
        if self._range is None:
            # Imported here so that a model can be declared without torch. Not
            # torch.profiler.record_function: it is slower, and the profiler does not assign kernels
            # that are launched outside torch's operators, such as Triton's, to its ranges.
            from torch._C._profiler import _RecordFunctionFast

            self._range = _RecordFunctionFast(self.name)
        self._range.__enter__()
        observer = _observer  # another thread may end the observation at any time
        if observer is not None:
            observer.enter(self.name)

    def __exit__(self, *error: object) -> None:
        observer = _observer
        if observer is not None:
            observer.exit()
        self._range.__exit__(None, None, None)


@contextmanager
def observe(callback: Callable[[str], None]) -> Iterator[None]:
    """Call `callback(name)` at every change of the running part, starting with `OTHER`."""
    global _observer
    if _observer is not None:
        raise RuntimeError("the parts of a step are already being observed")
    _observer = _Observer(callback)
    try:
        yield
    finally:
        _observer = None


SCHEDULING = StepPart("scheduling")
BATCH_PREPARATION = StepPart("batch_preparation")
EMBEDDING = StepPart("embedding")
INPUT_NORM = StepPart("input_norm")
QKV_PROJ = StepPart("qkv_proj")
ROPE = StepPart("rope")
ATTENTION = StepPart("attention")
O_PROJ = StepPart("o_proj")
POST_NORM = StepPart("post_norm")
ROUTER = StepPart("router")
GATE_UP_PROJ = StepPart("gate_up_proj")
ACTIVATION = StepPart("activation")
DOWN_PROJ = StepPart("down_proj")
PER_LAYER_MLP = StepPart("per_layer_mlp")
FINAL_NORM = StepPart("final_norm")
LM_HEAD = StepPart("lm_head")
SAMPLING = StepPart("sampling")

ALL_PARTS = tuple(
    """scheduling batch_preparation embedding input_norm qkv_proj rope attention o_proj post_norm
    router gate_up_proj activation down_proj per_layer_mlp final_norm lm_head sampling
    other""".split()
)
"""The names of all parts in the order of a step; `other` is last."""

FUSED_INTO = {
    **dict.fromkeys(("input_norm", "rope"), "qkv_proj"),
    **dict.fromkeys(("post_norm", "router", "activation", "down_proj"), "gate_up_proj"),
}
"""Part → the part that includes its work where a backend fuses the two into one kernel."""
