"""Stand-ins for the captures of a GPU."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.execution.capture import Part, capture_whole
from model.ops.backend import Backend, Compute
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.specs import AttentionSpec


class Repeating:
    """A capture that computes again instead of replaying."""

    def __init__(self, replays: Counter[int] | None = None):
        """replays: counts the replays of each size."""
        self.replays = Counter[int]() if replays is None else replays

    def __call__(self, compute: Compute) -> Compute:
        size = len(compute())  # as a GPU's capture does

        def replay() -> torch.Tensor:
            self.replays[size] += 1
            return compute()

        return replay

    def run_first(self, compute: Compute) -> None:
        compute()

    @contextmanager
    def segment(self) -> Iterator[Part]:
        raise RuntimeError("this capture has no segments")
        yield


class Refusing(Repeating):
    """A capture that fails as a GPU's does: with another error at its end."""

    def __call__(self, compute: Compute) -> Compute:
        return capture_whole(self, compute)

    @contextmanager
    def segment(self) -> Iterator[Part]:
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
        yield


class Taping(Repeating):
    """A capture that replays torch's operations one by one, on the tensors of the capture.

    As on a GPU, no operation may need its result on the host, and whatever Python computes is the
    same in every replay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.segments = 0

    def __call__(self, compute: Compute) -> Compute:
        return capture_whole(self, compute)

    @contextmanager
    def segment(self) -> Iterator[Part]:
        self.segments += 1
        tape = _Tape()
        with tape:
            yield tape.replay


class _Tape(TorchDispatchMode):
    _waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in self._waiting):
            raise RuntimeError(f"{func} is not permitted when a stream is captured")
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            pairs = (
                [(result, again)]
                if isinstance(result, torch.Tensor)
                else zip(result, again, strict=True)
            )
            for old, new in pairs:
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TensorLengths(Backend):
    """Attention without lengths on the host, for every query over the width of its block table."""

    def attention(
        self,
        query: torch.Tensor,
        kv: torch.Tensor,
        batch: ForwardBatch,
        group: GroupTables,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tokens, heads, _ = query.shape
        token = torch.arange(tokens)
        owner = torch.searchsorted(batch.cu_seqlens_q, token, right=True) - 1
        context = batch.context_lens[owner]
        position = context - batch.cu_seqlens_q[owner + 1] + token
        key, value = kv[:, group.block_table[owner]].flatten(2, 3)
        at = torch.arange(key.shape[1])
        visible = at <= position[:, None]
        if spec.window is not None:
            visible &= at > position[:, None] - spec.window
        repeats = heads // kv.shape[3]
        value = value.masked_fill(~visible[:, :, None, None], 0.0).repeat_interleave(repeats, 2)
        key = key.repeat_interleave(repeats, 2)
        scores = torch.einsum("thd,tkhd->thk", query, key) * spec.scale
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.view(1, heads, 1).expand(tokens, -1, -1)), dim=-1)
        return torch.einsum("thk,tkhd->thd", scores.softmax(-1)[..., : len(at)], value)
