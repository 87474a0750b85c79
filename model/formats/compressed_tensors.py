"""What the package compressed-tensors writes: groups of modules, each with a format of its own."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from model.formats.compressed_int import CompressedInt
from model.formats.dense import DENSE
from model.formats.float8 import Inputs
from model.formats.format import WeightFormat
from model.formats.fp8 import Fp8, block_size
from model.formats.mxfp4 import PackedMxfp4
from model.formats.nvfp4 import Nvfp4
from model.formats.rules import FormatRules, Rule, checked, names, refuse_kv_cache

if TYPE_CHECKING:
    from model.families.config_keys.keys import Keys

_LINEAR, _EMBEDDING, _PATTERN = "Linear", "Embedding", "re:"
_DEFAULTS: dict[str, Any] = {
    "quant_method": None,
    "config_groups": None,
    "format": None,
    "ignore": None,
    "kv_cache_scheme": None,
    "sparsity_config": None,
    "quantization_status": "compressed",
}
_NEUTRAL = ("global_compression_ratio", "version")
_GROUP_DEFAULTS: dict[str, Any] = {
    "targets": None,
    "weights": None,
    "input_activations": None,
    "output_activations": None,
    "format": None,
}
_WEIGHT_DEFAULTS: dict[str, Any] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "group_size": None,
    "strategy": None,
    "block_structure": None,
    "dynamic": False,
    "actorder": None,
}
_WEIGHT_NEUTRAL = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")


def read_settings(keys: Keys) -> FormatRules:
    """The formats of a checkpoint with this `quantization_config`. Raises CheckpointError.

    A module has the format of the group that names it; of the groups with a pattern of it if none
    does, and else of those with its class.
    """
    keys = keys.with_defaults(_DEFAULTS, _NEUTRAL)
    refuse_kv_cache(keys)
    keys.one_of("quantization_status", "compressed", "frozen")
    sparsity = keys.get("sparsity_config", {})
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise keys.fail(f"'sparsity_config' = {sparsity!r:.60} is not supported")
    ignored = names(keys, "ignore")
    targets, activations = _groups(keys)
    named: list[tuple[str, WeightFormat]] = [(name, DENSE) for name in ignored]
    named += [target for target in targets if not _is_pattern(target[0])]
    named += [target for target in targets if _is_pattern(target[0])]
    classes = {name: form for name, form in reversed(named) if name in (_LINEAR, _EMBEDDING)}
    return FormatRules(
        tuple(_rule(keys, [*same], form) for form, same in groupby(named, lambda rule: rule[1])),
        classes.get(_LINEAR, DENSE),
        classes.get(_EMBEDDING, DENSE),
        " and ".join(dict.fromkeys(activations)),
    )


def _groups(keys: Keys) -> tuple[list[tuple[str, WeightFormat]], list[str]]:
    """The format of each target, and the activations' quantization in words."""
    groups = keys.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise keys.fail(f"'config_groups' must be an object with groups, not {groups!r:.60}")
    targets: list[tuple[str, WeightFormat]] = []
    activations = []
    for name, values in groups.items():
        if not isinstance(values, dict):
            raise keys.fail(f"'config_groups' {name!r} must be an object, not {values!r:.60}")
        group = keys.inside(name, values).with_defaults(_GROUP_DEFAULTS)
        form = _format(group, keys.get("format"))
        targets += [(target, form) for target in names(group, "targets")]
        inputs = group.get("input_activations")
        if isinstance(inputs, dict):
            kind = "FP" if inputs.get("type") == "float" else "int"
            activations.append(f"{kind}{inputs.get('num_bits', 8)}")
    return targets, activations


def _is_pattern(name: str) -> bool:
    return name.startswith(_PATTERN)


def _rule(keys: Keys, named: list[tuple[str, WeightFormat]], form: WeightFormat) -> Rule:
    """The rule for modules with these names, or with names that match these patterns."""
    every = [name for name, _ in named]
    patterns = (name.removeprefix(_PATTERN) for name in every if _is_pattern(name))
    return Rule(
        form,
        exact=frozenset(name for name in every if not _is_pattern(name)),
        patterns=tuple(checked(keys, pattern) for pattern in patterns),
    )


@dataclass(frozen=True)
class _Scheme:
    """The quantization of the weights of a group."""

    keys: Keys
    bits: int
    is_float: bool
    group: int | None  # inputs that share a scale; None: see `block`
    block: tuple[int, int] | None  # None: one scale for each output, or for all

    @classmethod
    def read(cls, group: Keys, weights: dict[str, Any]) -> _Scheme:
        keys = group.inside("weights", weights).with_defaults(_WEIGHT_DEFAULTS, _WEIGHT_NEUTRAL)
        keys.one_of("dynamic", False)
        keys.one_of("actorder", None, False, "weight", "static", "group", "dynamic")
        size = keys.get("group_size")
        given = keys.get("strategy", "channel" if size == -1 else "group" if size else "tensor")
        strategy = str(given).lower()
        if strategy not in ("tensor", "channel", "group", "tensor_group", "block"):
            raise keys.fail(f"strategy {strategy!r:.60} is not supported for weights")
        is_float = keys.one_of("type", "int", "float") == "float"
        grouped = strategy in ("group", "tensor_group")
        size = keys.integer("group_size") if grouped else None
        block = block_size(keys, "block_structure") if strategy == "block" else None
        if strategy == "block" and block is None:
            raise keys.fail("'block_structure' is missing")
        return cls(keys, keys.integer("num_bits"), is_float, size, block)


def _inputs(group: Keys) -> Inputs:
    """How a group with weights in FP8 rounds the inputs of its modules."""
    values = group.get("input_activations")
    if not isinstance(values, dict) or values.get("type") != "float" or values.get("num_bits") != 8:
        return ""
    return "static" if values.get("dynamic") is False else "dynamic"


def _format(group: Keys, of_all: Any) -> WeightFormat:
    """The format of a group; of_all: the format that all groups have if they state none."""
    weights = group.get("weights")
    if weights is None:
        return DENSE
    if not isinstance(weights, dict):
        raise group.fail(f"'weights' must be an object, not {weights!r:.60}")
    scheme, name = _Scheme.read(group, weights), group.get("format") or of_all
    kind = (name, scheme.bits, scheme.is_float)
    is_symmetric = scheme.keys.boolean("symmetric")
    if name == "dense":
        return DENSE
    if name in ("pack-quantized", "int-quantized", "naive-quantized") and not scheme.is_float:
        if scheme.bits in (4, 8) and scheme.block is None:
            return CompressedInt(
                scheme.bits,
                scheme.group,
                is_symmetric,
                is_packed=name == "pack-quantized",
                is_ordered=scheme.keys.get("actorder") in ("group", "dynamic"),
            )
    elif not is_symmetric:
        raise scheme.keys.fail("'symmetric' must be true for weights of type float")
    elif kind in ((f"{start}-quantized", 8, True) for start in ("float", "naive", "mxfp8")):
        if scheme.group is not None:  # kernels round inputs by token, or by token and block
            return Fp8((1, scheme.group), scale="_scale")
        return Fp8(scheme.block, _inputs(group), scale="_scale")
    elif kind == ("nvfp4-pack-quantized", 4, True) and scheme.group == 16:
        return Nvfp4()
    elif kind == ("mxfp4-pack-quantized", 4, True) and scheme.group == 32:
        return PackedMxfp4()
    raise scheme.keys.fail(
        f"format {name!r:.60} with {scheme.bits} bits of type "
        f"{'float' if scheme.is_float else 'int'} is not supported; supported: pack-quantized and"
        " int-quantized (4 and 8 bits), float-quantized and mxfp8-quantized (8 bits),"
        " nvfp4-pack-quantized (groups of 16), mxfp4-pack-quantized (groups of 32)"
    )
