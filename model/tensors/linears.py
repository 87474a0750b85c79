"""The pieces of linears, of which tensors may have several parts, or parts several tensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from model.families.tensor_names import LinearName
from model.ops.specs import Linear
from model.sharding import Shard
from model.tensors.pieces import NamedWeight, Piece, named_weight


def _all() -> slice:
    return slice(None)


@dataclass(frozen=True)
class LinearPart:
    """A part of a linear of the decoder, such as q."""

    linear: Linear
    outputs: int  # of all ranks together
    inputs: int
    rows: slice = field(default_factory=_all)  # this rank's part of the outputs
    columns: slice = field(default_factory=_all)  # this rank's part of the inputs
    first: int = 0  # row of the linear where this rank's rows begin
    block: int = 0  # rows that alternate with those of other parts; 0: one part after another
    # Rows are in groups of so many, and of the last so many of a group the stored ones alternate
    # between the two coordinates of rotated pairs, which are halves in the linear.
    pairs: tuple[int, int] = (0, 0)


def linear_pieces(
    prefix: str,
    names: tuple[LinearName, ...],
    parts: dict[str, LinearPart],
    shard: Shard,
) -> Iterator[Piece]:
    """The pieces of linears; the rows of a tensor are those of its parts, in order."""
    for stem, part_names in names:
        if not parts.keys() & set(part_names):  # of other layers
            continue
        if parts[part_names[0]].block:
            own = [parts[name] for name in part_names]
            yield from _alternating(prefix + stem, own)
            continue
        outputs = sum(parts[name].outputs for name in part_names)
        above = 0
        for name in part_names:
            part = parts[name]
            start, stop, _ = part.rows.indices(part.outputs)
            rows = slice(above + start, above + stop)
            yield from _linear(prefix + stem, part, outputs, rows, shard)
            above += part.outputs


def _linear(
    name: str, part: LinearPart, outputs: int, rows: slice, shard: Shard
) -> Iterator[Piece]:
    linear, write = part.linear, _write_rows(part.first, rows.stop - rows.start)
    if part.pairs[1]:
        write = _write_pairs(rows.stop - rows.start, *part.pairs)
    weight = named_weight(f"{name}.weight", (outputs, part.inputs), (rows, part.columns))
    yield Piece(weight, linear, "weight", write)
    if linear.has_bias:
        if linear.sum_over_ranks and shard.rank:
            write = _write_zeros  # rank 0 alone adds the bias
        yield Piece(NamedWeight(f"{name}.bias", (outputs,), (rows,)), linear, "bias", write)


def _alternating(name: str, parts: list[LinearPart]) -> Iterator[Piece]:
    """The pieces of a tensor whose parts alternate, a block of each for every head."""
    stride, above = sum(part.block for part in parts), 0
    for part in parts:
        heads, (start, stop, _) = part.outputs // part.block, part.rows.indices(part.outputs)
        rows = slice(start // part.block * stride, stop // part.block * stride)
        linear, write = part.linear, _write_blocks(part, above, stride)
        weight = named_weight(f"{name}.weight", (heads * stride, part.inputs), (rows, part.columns))
        yield Piece(weight, linear, "weight", write)
        if linear.has_bias:
            bias = NamedWeight(f"{name}.bias", (heads * stride,), (rows,))
            yield Piece(bias, linear, "bias", write)
        above += part.block


def _write_blocks(part: LinearPart, above: int, stride: int) -> Callable[[Any, Any], None]:
    start, stop, _ = part.rows.indices(part.outputs)

    def write(storage: Any, source: Any) -> None:
        for head in range((stop - start) // part.block):
            first, from_row = part.first + head * part.block, head * stride + above
            block = source[from_row : from_row + part.block]
            storage[first : first + part.block].copy_(block)

    return write


def _write_rows(first: int, count: int) -> Callable[[Any, Any], None]:
    def write(storage: Any, source: Any) -> None:
        storage[first : first + count].copy_(source)

    return write


def _write_pairs(count: int, group: int, paired: int) -> Callable[[Any, Any], None]:
    """Write rows in the order of `LinearPart.pairs`."""

    def write(storage: Any, source: Any) -> None:
        for start in range(0, count, group):
            stop, first = start + group, start + group - paired
            storage[start:first].copy_(source[start:first])
            middle = first + paired // 2
            storage[first:middle].copy_(source[first:stop:2])
            storage[middle:stop].copy_(source[first + 1 : stop : 2])

    return write


def _write_zeros(storage: Any, source: Any) -> None:
    storage.zero_()


def of_heads(heads: slice, head_dim: int) -> slice:
    """The rows of a slice of heads."""
    return slice(heads.start * head_dim, heads.stop * head_dim)


def gated_parts(
    gate_up: Linear, down: Linear, hidden: int, size: int, shard: Shard
) -> dict[str, LinearPart]:
    """The parts of a gated MLP; size: its inner size on all ranks together."""
    own, each = shard.part(size), size // shard.size
    found = {
        "up": LinearPart(gate_up, size, hidden, own, first=gate_up.outputs - each),
        "down": LinearPart(down, hidden, size, columns=own),
    }
    if gate_up.outputs > each:
        found["gate"] = LinearPart(gate_up, size, hidden, own)
    return found
