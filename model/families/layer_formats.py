"""The formats of a checkpoint's layers, from its rules and the names of its tensors."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

from model.config import CheckpointError, LayerConfig, LayerFormats, ModelConfig
from model.families.tensor_names import LinearName, TensorNames
from model.formats import DENSE, FormatRules, WeightFormat

_TO_HEADS = ("q", "k", "v", "q_down", "direct_q", "kv_down")  # parts of attention
_MAX_SECONDS = 10.0  # for all names of a model, far more than any needs


def with_layer_formats(config: ModelConfig, names: TensorNames) -> ModelConfig:
    """The config with the formats of its layers' weights, whose tensors have these names.

    Raises CheckpointError if the rules take too long.
    """
    rules = config.stored_formats
    if not rules.formats:
        return config
    experts = 0 if config.moe is None else config.moe.num_experts
    layers, deadline = [], time.monotonic() + _MAX_SECONDS
    for i, layer in enumerate(config.layers):
        prefix = names.layer.format(layer=i)
        formats = _formats(rules, prefix, names, layer, config.has_mlp(layer), experts)
        layers.append(replace(layer, formats=formats))
        if time.monotonic() > deadline:
            raise CheckpointError(
                "the patterns of 'quantization_config' take too long to compare with all names: "
                "simplify them"
            )
    return replace(config, layers=tuple(layers))


def _formats(
    rules: FormatRules,
    prefix: str,
    names: TensorNames,
    layer: LayerConfig,
    has_mlp: bool,
    experts: int,
) -> LayerFormats:
    parts: Iterable[str]
    linears, parts, out = names.attention, _TO_HEADS, "o"
    if layer.recurrent:
        linears, parts, out = names.delta_rule.linears, ("q", "k", "v", "z"), "out"
    mlp = names.mlp if has_mlp else names.experts.shared
    found = LayerFormats(
        qkv=_common(_of(rules, prefix, linears, parts)),
        out=_common(_of(rules, prefix, linears, (out,))),
        gate_up=_common(_of(rules, prefix, mlp, ("gate", "up"))),
        down=_common(_of(rules, prefix, mlp, ("down",))),
    )
    if layer.sparse:
        stems = [stem for stem, _ in names.experts.linears]
        every = (
            rules.of(prefix + stem.format(expert=expert))
            for stem in stems
            for expert in range(experts if "{expert}" in stem else 1)
        )
        return replace(found, experts=_common(every))
    return found


def _of(
    rules: FormatRules, prefix: str, linears: Iterable[LinearName], parts: Iterable[str]
) -> Iterator[WeightFormat]:
    """The formats of the linears that contain any of these parts."""
    wanted = set(parts)
    return (rules.of(prefix + stem) for stem, own in linears if wanted.intersection(own))


def _common(formats: Iterable[WeightFormat]) -> WeightFormat:
    """The format of all, or one of those that become the same in memory; dense if they differ."""
    different = {form.kept: form for form in formats}
    return different.popitem()[1] if len(different) == 1 else DENSE
