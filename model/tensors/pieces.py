"""Pieces: weights of a checkpoint, and how they fill parameters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from model.formats.format import Part


@dataclass(frozen=True)
class NamedWeight:
    """A weight, or a vector, of a checkpoint, in whatever format it is stored."""

    name: str  # of its tensor if it is dense
    shape: tuple[int, ...]
    part: Part = ()  # what this rank reads
    module: str | None = None  # the module whose format it has; None: dense
    is_embedding: bool = False
    transposed: bool = False  # see WeightFormat.stored


@dataclass(frozen=True)
class Piece:
    """A weight of the checkpoint, and how it fills a parameter."""

    weight: NamedWeight
    holder: Any  # the object whose attribute is the parameter
    attribute: str
    write: Callable[[Any, Any], None]  # (the parameter's storage, WeightFormat.source)

    @property
    def holder_key(self) -> tuple[int, str]:
        """What identifies the parameter."""
        return id(self.holder), self.attribute


@dataclass
class TensorMap:
    """Every weight that a checkpoint of the model's config must contain."""

    pieces: list[Piece] = field(default_factory=list)
    elsewhere: list[NamedWeight] = field(default_factory=list)  # read only by other ranks


def named_weight(
    name: str, shape: tuple[int, ...], part: Part = (), *, is_embedding: bool = False
) -> NamedWeight:
    """A weight of a module of its own."""
    return NamedWeight(name, shape, part, name.removesuffix(".weight"), is_embedding)


def whole(weight: NamedWeight, holder: Any, attribute: str = "weight") -> Piece:
    """The piece that fills a whole parameter."""
    return Piece(weight, holder, attribute, lambda storage, source: storage.copy_(source))
