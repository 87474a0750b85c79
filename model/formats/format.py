"""The interface of a weight format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from model.ops.backend import Backend

Part = tuple[slice, ...]
"""One slice for each of a tensor's first dimensions; an empty tuple means the whole tensor."""

Find = Callable[[str], "tuple[tuple[int, ...], str] | None"]
"""The shape and the dtype, by safetensors' name, of a tensor in a checkpoint; None: not stored."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that a checkpoint must contain, and the part of it that this rank reads."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]  # accepted, by safetensors' names
    part: Part = ()


class WeightFormat(ABC):
    """How the values of a weight [outputs, inputs] or [experts, outputs, inputs] are stored.

    Formats are values without state: equal formats compare equal, and a config may contain them.
    """

    name: str  # as reports show it
    quantizes: bool = False  # whether dense weights take this form as they are loaded

    @abstractmethod
    def stored(
        self, name: str, shape: tuple[int, ...], part: Part = (), *, transposed: bool = False
    ) -> list[StoredTensor]:
        """The tensors of the checkpoint that hold the weight `name` of this shape.

        part: the slices of the weight's dimensions that this rank reads, translated here into
        slices of the stored tensors. transposed: the family stores dense weights as
        [..., inputs, outputs]; formats with an order of their own ignore it. Raises ValueError for
        a shape or a part that the format does not have, such as a part of a group.
        """

    def as_stored(self, name: str, shape: tuple[int, ...], part: Part, find: Find) -> WeightFormat:
        """The format of the weight `name`, an argument of `stored`, in the files of a checkpoint.

        Where configs leave something open, such as the name of a tensor, the files decide.
        """
        return self

    @abstractmethod
    def source(self, tensors: list[torch.Tensor], *, transposed: bool = False) -> Any:
        """The `stored` tensors, as read from the files, as one weight [..., outputs, inputs].

        The result can be indexed by expert and sliced by rows for the storage's `copy_`.
        """

    @abstractmethod
    def allocate(self, backend: Backend, shape: tuple[int, ...], parts: int = 1) -> Any:
        """Storage on the backend's device that is filled by rows.

        `storage[first:last].copy_(source)`, or `storage[expert][first:last].copy_(source)` if the
        shape has three dimensions. parts: how many equal parts of the outputs are used together,
        as gate and up are. `copy_` raises ValueError for values that the kernels cannot represent.
        """

    @abstractmethod
    def finish(self, backend: Backend, storage: Any) -> Any:
        """The filled storage in the form that the backend's ops take."""

    def tied(self, backend: Backend, embedding: torch.Tensor) -> Any:
        """The weight of a head of this format that is tied to the embedding [vocab, hidden]."""
        storage = self.allocate(backend, tuple(embedding.shape))
        storage.copy_(embedding)
        return self.finish(backend, storage)

    @abstractmethod
    def fill_random(self, storage: Any, generator: torch.Generator) -> None:
        """Fill storage from `allocate` with random values of a typical magnitude."""

    @abstractmethod
    def dense(self, weight: Any, dtype: torch.dtype) -> torch.Tensor:
        """The values of a weight [outputs, inputs] as the reference backend keeps it."""

    @abstractmethod
    def bytes(self, shape: tuple[int, ...], item: int) -> int:
        """Bytes of a weight in memory; item: bytes of one value in the dtype of the activations."""

    @property
    def kept(self) -> WeightFormat:
        """The format in memory on a backend with all kernels."""
        return self

    def takes(self, stored: WeightFormat) -> bool:
        """Whether storage of this format can be filled from a weight with this format in files.

        Otherwise the weight, and those that lie in the same storage, become dense.
        """
        return True

    @abstractmethod
    def held(self, backend: Backend, *, stacked: bool) -> WeightFormat:
        """The format in memory on this backend of a weight, or of a stack of experts."""


def full_interface(known: object) -> WeightFormat:
    """Narrow a format, which operations declare as model.ops.specs.WeightFormat, to this class."""
    assert isinstance(known, WeightFormat)
    return known
