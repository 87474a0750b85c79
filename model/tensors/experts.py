"""The pieces of routers and experts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig
from model.families.tensor_names import ExpertNames, LinearName
from model.layers.mlp import Moe
from model.tensors.linears import LinearPart, gated_parts, linear_pieces
from model.tensors.pieces import NamedWeight, Piece, TensorMap, named_weight, whole


def add_experts(
    found: TensorMap, prefix: str, names: ExpertNames, moe: Moe, config: ModelConfig
) -> None:
    """Add a layer's router, experts and shared expert."""
    assert config.moe is not None  # the config says that the layer is sparse
    hidden, count = config.hidden_size, config.moe.num_experts
    parts = {"router": LinearPart(moe.router, count, hidden)}
    linears: tuple[LinearName, ...] = ((names.router, ("router",)),)
    if moe.router_spec.has_correction or moe.router_spec.scales_experts:
        found.pieces.append(
            whole(NamedWeight(prefix + names.correction, (count,)), moe, "correction")
        )
    shared = moe.experts.shared
    if shared is not None:
        size = config.moe.shared_size
        parts |= gated_parts(shared.gate_up, shared.down, hidden, size, moe.shard)
        linears += names.shared
        if shared.gate is not None:
            parts["shared_gate"] = LinearPart(shared.gate, 1, hidden)
            linears += ((names.shared_gate, ("shared_gate",)),)
    found.pieces += linear_pieces(prefix, linears, parts, moe.shard)
    for stem, outputs in names.linears:
        target = _ExpertLinear(moe, names, outputs)
        if "{expert}" in stem:
            _add_single_experts(found, prefix + stem, target, count)
        else:
            found.pieces += _stacked_experts(prefix + stem, target, count)


@dataclass(frozen=True)
class _ExpertLinear:
    """One linear of every expert: gate, up, both of them, or down."""

    moe: Moe
    names: ExpertNames
    parts: tuple[str, ...]

    @property
    def attribute(self) -> str:
        """The parameter of `Experts` that it fills, and with "_bias" its bias."""
        return "down" if self.parts == ("down",) else "gate_up"

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of one expert's tensor."""
        experts = self.moe.experts
        if self.attribute == "down":
            return experts.hidden, experts.size
        return len(self.parts) * experts.size, experts.hidden

    def write(self, storage: Any, source: Any) -> None:
        """Fill one expert's rows from its tensor, both [outputs, inputs] or [outputs]."""
        count = len(self.parts)
        size = self.shape[0] // count
        for i, part in enumerate(self.parts):
            first = size if part == "up" else 0
            rows = slice(i * size, (i + 1) * size)
            if self.names.interleaved:
                rows = slice(i, None, count)
            storage[first : first + size].copy_(source[rows])


def _add_single_experts(found: TensorMap, stem: str, target: _ExpertLinear, count: int) -> None:
    """Experts in separate tensors; this rank reads the tensors of its own experts."""
    experts, own, attribute = target.moe.experts, target.moe.shard.part(count), target.attribute
    for expert in range(count):
        name = stem.format(expert=expert)
        tensors = {attribute: named_weight(f"{name}.weight", target.shape)}
        if experts.has_bias:
            tensors[f"{attribute}_bias"] = NamedWeight(f"{name}.bias", target.shape[:1])
        if not own.start <= expert < own.stop:
            found.elsewhere += tensors.values()
            continue
        write = _write_expert(target, expert - own.start)
        found.pieces += [Piece(tensors[key], experts, key, write) for key in tensors]


def _write_expert(target: _ExpertLinear, expert: int) -> Callable[[Any, Any], None]:
    def write(storage: Any, source: Any) -> None:
        target.write(storage[expert], source)

    return write


def _stacked_experts(stem: str, target: _ExpertLinear, count: int) -> Iterator[Piece]:
    """All experts in one tensor; this rank reads its own experts."""
    experts, own, attribute = target.moe.experts, target.moe.shard.part(count), target.attribute

    def write(storage: Any, source: Any) -> None:
        for expert in range(experts.count):
            target.write(storage[expert], source[expert])

    shape, transposed = (count, *target.shape), target.names.transposed
    names = target.names
    weight = NamedWeight(
        stem + names.weight_suffix, shape, (own,), module=stem, transposed=transposed
    )
    yield Piece(weight, experts, attribute, write)
    if experts.has_bias:
        bias = NamedWeight(stem + names.bias_suffix, shape[:2], (own,))
        yield Piece(bias, experts, f"{attribute}_bias", write)
