"""Changes of experts by LoRA adapters.

PEFT changes the parameters of all experts of a layer at once (`target_parameters`), as the modules
of transformers have them: one for gate and up, and one for down. A has the ranks of one expert
after those of another, B has those of all experts side by side, rank by rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from model.config import ModelConfig
from model.families.tensor_names import TensorNames
from model.tensors.pieces import NamedWeight


@dataclass(frozen=True)
class ExpertWeight:
    """A weight of a checkpoint as a part of a layer's experts."""

    layer: str  # what names of the layer's modules begin with in transformers
    parts: tuple[str, ...]  # gate, up, both, or down
    expert: int | None  # None: all of them
    count: int  # experts of the layer
    interleaved: bool  # gate and up alternate in transformers

    @property
    def parameter(self) -> str:
        """The name of its parameter in transformers."""
        return "down_proj" if self.parts == ("down",) else "gate_up_proj"

    def shape(self, weight: NamedWeight) -> tuple[int, int]:
        """Outputs and inputs of an expert's parameter in transformers."""
        outputs, inputs = weight.shape[-2:]
        return outputs if self.parts == ("down",) else outputs // len(self.parts) * 2, inputs

    def change(self, a: torch.Tensor, b: torch.Tensor, expert: int) -> torch.Tensor:
        """B · A of one expert, as rows of this weight [outputs, inputs].

        a [experts · rank, inputs], b [outputs of the parameter, rank · experts].
        """
        values = (
            b.unflatten(1, (-1, self.count))[..., expert] @ a.unflatten(0, (self.count, -1))[expert]
        )
        if len(self.parts) == 2 or self.parts == ("down",):
            return values
        number, half = int(self.parts == ("up",)), len(values) // 2
        return values[number::2] if self.interleaved else values[number * half :][:half]


def expert_weights(
    config: ModelConfig, names: TensorNames, given: TensorNames
) -> dict[str, ExpertWeight]:
    """The weights of all experts by their names; given: the names in transformers."""
    found: dict[str, ExpertWeight] = {}
    for i, layer in enumerate(config.layers):
        if config.moe is None or not layer.sparse:
            continue
        count, interleaved = config.moe.num_experts, given.experts.interleaved
        prefix, own = given.layer.format(layer=i), names.layer.format(layer=i)
        for stem, parts in names.experts.linears:
            is_single = "{expert}" in stem
            for expert in range(count) if is_single else (None,):
                name = own + stem.format(expert=expert)
                name += ".weight" if is_single else names.experts.weight_suffix
                found[name] = ExpertWeight(prefix, parts, expert, count, interleaved)
    return found


@dataclass(frozen=True)
class ChangedStack:
    """A stack of experts' weights, each of which is changed when it is indexed."""

    source: Any
    change: Callable[[int, torch.Tensor], torch.Tensor]  # (its index, its values in float32)

    def __getitem__(self, index: int) -> torch.Tensor:
        """One expert's weight in float32."""
        return self.change(index, as_float32(self.source[index]))


def as_float32(source: Any) -> torch.Tensor:
    """The values of a weight in whatever form it is stored."""
    if isinstance(source, torch.Tensor):
        return source.float()
    values: torch.Tensor = source.dense(torch.float32)
    return values
