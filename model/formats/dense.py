"""Dense weights: one floating-point number per value, in the dtype of the activations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.formats.format import Find, Part, StoredTensor, WeightFormat

if TYPE_CHECKING:
    import torch

    from model.ops.backend import Backend

FLOATS = ("BF16", "F16", "F32")  # dtypes of a checkpoint that are converted as they are read


@dataclass(frozen=True)
class Dense(WeightFormat):
    """One tensor with the values themselves."""

    name = "dense"

    def stored(
        self, name: str, shape: tuple[int, ...], part: Part = (), *, transposed: bool = False
    ) -> list[StoredTensor]:
        """As WeightFormat.stored."""
        if transposed:
            *stack, outputs, inputs = shape
            slices = [*part, *[slice(None)] * (len(shape) - len(part))]
            shape = (*stack, inputs, outputs)
            part = (*slices[:-2], slices[-1], slices[-2])
        return [StoredTensor(name, shape, FLOATS, part)]

    def source(self, tensors: list[torch.Tensor], *, transposed: bool = False) -> torch.Tensor:
        """As WeightFormat.source."""
        (tensor,) = tensors
        return tensor.transpose(-1, -2) if transposed else tensor

    def allocate(self, backend: Backend, shape: tuple[int, ...], parts: int = 1) -> Any:
        """As WeightFormat.allocate."""
        return backend.empty_weight(shape, parts)

    def finish(self, backend: Backend, storage: Any) -> Any:
        """As WeightFormat.finish."""
        return backend.pack_experts(storage) if len(storage.shape) == 3 else backend.pack(storage)

    def fill_random(self, storage: Any, generator: torch.Generator) -> None:
        """As WeightFormat.fill_random: about uniform between -0.03 and 0.03."""
        import torch

        if isinstance(storage, torch.Tensor):
            storage.uniform_(-0.03, 0.03, generator=generator)
        else:  # a layout of the backend's own
            storage.random_(generator)

    def dense(self, weight: Any, dtype: torch.dtype) -> torch.Tensor:
        """As WeightFormat.dense; storage of another format that is not dense is converted."""
        kept = getattr(weight, "group", 0)
        found: torch.Tensor = weight.dense(dtype) if kept else weight
        return found

    def bytes(self, shape: tuple[int, ...], item: int) -> int:
        """As WeightFormat.bytes."""
        return math.prod(shape) * item

    def held(self, backend: Backend, *, stacked: bool) -> WeightFormat:
        """As WeightFormat.held."""
        return self


class FilledFromDense(WeightFormat):
    """A packed form in memory; a checkpoint has dense weights for it, or stores the form itself.

    Unless it quantizes, only the form itself is taken.
    """

    def stored(
        self, name: str, shape: tuple[int, ...], part: Part = (), *, transposed: bool = False
    ) -> list[StoredTensor]:
        """As WeightFormat.stored: dense."""
        return DENSE.stored(name, shape, part, transposed=transposed)

    def source(self, tensors: list[torch.Tensor], *, transposed: bool = False) -> torch.Tensor:
        """As WeightFormat.source."""
        return DENSE.source(tensors, transposed=transposed)

    def finish(self, backend: Backend, storage: Any) -> Any:
        """As WeightFormat.finish."""
        return DENSE.finish(backend, storage)

    def takes(self, stored: WeightFormat) -> bool:
        """As WeightFormat.takes."""
        return self.quantizes or stored.kept == self

    def fill_random(self, storage: Any, generator: torch.Generator) -> None:
        """As WeightFormat.fill_random."""
        DENSE.fill_random(storage, generator)

    def dense(self, weight: Any, dtype: torch.dtype) -> torch.Tensor:
        """As WeightFormat.dense."""
        return DENSE.dense(weight, dtype)


class Head(Dense):
    """A dense weight of the head, which backends may keep in another form than other weights."""

    def allocate(self, backend: Backend, shape: tuple[int, ...], parts: int = 1) -> Any:
        """As WeightFormat.allocate."""
        return backend.empty_head(shape)

    def finish(self, backend: Backend, storage: Any) -> Any:
        """As WeightFormat.finish."""
        return backend.pack_head(storage)

    def tied(self, backend: Backend, embedding: torch.Tensor) -> Any:
        """As WeightFormat.tied; the embedding itself where the backend takes it."""
        return backend.pack_head(embedding)


class PerHead(Dense):
    """A stack of dense weights, one for each attention head."""

    def finish(self, backend: Backend, storage: Any) -> Any:
        """As WeightFormat.finish."""
        return storage


DENSE = Dense()
HEAD = Head()
PER_HEAD = PerHead()


class Dequantized(Dense):
    """A format of files alone: in memory weights become another format (`kept`), or dense.

    Subclasses define `stored` and `source`.
    """

    name = "dequantized"

    @property
    def kept(self) -> WeightFormat:
        """As WeightFormat.kept: dense, unless a subclass knows another one."""
        return DENSE

    @property
    def change(self) -> str:
        """What a notice says of the way to the kept format; empty if it has the files' bits."""
        return ""

    def as_stored(self, name: str, shape: tuple[int, ...], part: Part, find: Find) -> WeightFormat:
        """As WeightFormat.as_stored: DENSE if the weight was not quantized."""
        return DENSE if is_dense(name, find) else self.variant(name, shape, part, find)

    def variant(self, name: str, shape: tuple[int, ...], part: Part, find: Find) -> WeightFormat:
        """As `as_stored`, of a weight that was quantized."""
        return self

    def bytes(self, shape: tuple[int, ...], item: int) -> int:
        """As WeightFormat.bytes, of the format that is kept."""
        kept = self.kept
        return super().bytes(shape, item) if kept == DENSE else kept.bytes(shape, item)

    def held(self, backend: Backend, *, stacked: bool) -> WeightFormat:
        """As WeightFormat.held."""
        return self.kept.held(backend, stacked=stacked)


def is_dense(name: str, find: Find) -> bool:
    """Whether a weight is stored as plain numbers.

    Routers and heads often are though a config does not list them as exceptions.
    """
    found = find(name)
    return found is not None and found[1] in FLOATS
