"""NVFP4: 16 values along the inputs share a scale in E4M3, and all share another in float32."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import translate
from typing import TYPE_CHECKING, Any

from model.formats.dense import DENSE, Dequantized
from model.formats.format import Find, Part, StoredTensor, WeightFormat
from model.formats.fp8 import Fp8
from model.formats.packing import cut
from model.formats.rules import HEAD_IS_DENSE, FormatRules, Rule, checked, names, refuse_kv_cache

if TYPE_CHECKING:
    import torch

    from model.families.config_keys.keys import Keys

_VALUES = 16  # that share a scale: 4 bits each, two per byte


@dataclass(frozen=True)
class Nvfp4(Dequantized):
    """Values in E2M1, low nibble first.

    compressed-tensors: NAME_packed and NAME_scale, divided by NAME_global_scale.
    ModelOpt: NAME and NAME_scale, times NAME_scale_2.
    """

    is_modelopt: bool = False
    scale_shape: tuple[int, ...] = ()  # of the one for all values, in a checkpoint

    name = "NVFP4"

    @property
    def _last(self) -> str:
        return "_scale_2" if self.is_modelopt else "_global_scale"

    def variant(self, name: str, shape: tuple[int, ...], part: Part, find: Find) -> WeightFormat:
        """As Dequantized.variant."""
        found = find(name + self._last)
        return replace(self, scale_shape=(1,) if found is not None and found[0] == (1,) else ())

    def stored(
        self, name: str, shape: tuple[int, ...], part: Part = (), *, transposed: bool = False
    ) -> list[StoredTensor]:
        """As WeightFormat.stored: codes uint8 [out, in / 2], scales [out, in / 16], and one."""
        outputs, inputs = shape
        codes, scales = cut(part, shape, _VALUES, _VALUES // 2), cut(part, shape, _VALUES)
        values = name if self.is_modelopt else f"{name}_packed"
        return [
            StoredTensor(values, (outputs, inputs // 2), ("U8",), codes),
            StoredTensor(f"{name}_scale", (outputs, inputs // _VALUES), ("F8_E4M3",), scales),
            StoredTensor(name + self._last, self.scale_shape, ("F32",)),
        ]

    def source(self, tensors: list[torch.Tensor], *, transposed: bool = False) -> Any:
        """As WeightFormat.source: GroupedFloat in E4M3, which has all values of E2M1."""
        import torch

        from model.ops.quantized import GroupedFloat

        pairs, scales, last = tensors
        codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)
        # E2M1's exponent has bias 1, E4M3's has 7; there 0.5, the code 1, is not subnormal.
        size = codes & 7
        bits = (size * 4 + 0x30 - (size == 1).byte() * 4) * (size > 0) | (codes & 8) << 4
        of_all = last.float().reshape(1, 1)
        if not self.is_modelopt:
            of_all = 1 / of_all
        return GroupedFloat(bits.view(torch.float8_e4m3fn), scales.float() * of_all)


_DEFAULTS: dict[str, Any] = {
    "quant_method": None,
    "quant_algo": None,
    "ignore": None,
    "exclude_modules": None,
    "kv_cache_scheme": None,
    "kv_cache_quant_algo": None,
    "group_size": _VALUES,
}
_NEUTRAL = ("producer", "config_groups", "quantization", "quant_library", "weight_block_size")


def read_settings(keys: Keys) -> FormatRules:
    """The formats of a checkpoint that ModelOpt wrote. Raises CheckpointError."""
    keys = keys.with_defaults(_DEFAULTS, _NEUTRAL)
    refuse_kv_cache(keys)
    refuse_kv_cache(keys, "kv_cache_quant_algo")
    algorithm = keys.one_of("quant_algo", "NVFP4", "FP8")
    form: WeightFormat = Fp8(inputs="static", scale="_scale")
    if algorithm == "NVFP4":
        keys.one_of("group_size", _VALUES)
        form = Nvfp4(is_modelopt=True)
    excluded = names(keys, "ignore") + names(keys, "exclude_modules")
    patterns = tuple(checked(keys, translate(name)) for name in excluded)
    exceptions = (Rule(DENSE, patterns=patterns), HEAD_IS_DENSE)
    return FormatRules(exceptions, form, activations=algorithm)
