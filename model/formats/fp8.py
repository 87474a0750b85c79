"""FP8 (OCP 8-bit Floating Point, E4M3): one byte per value, a scale per tensor, output or block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from model.formats.dense import DENSE, FLOATS, Dequantized
from model.formats.float8 import Float8, Inputs
from model.formats.format import Find, Part, StoredTensor, WeightFormat
from model.formats.rules import HEAD_IS_DENSE, FormatRules, excluded, refuse_kv_cache

if TYPE_CHECKING:
    import torch

    from model.families.config_keys.keys import Keys

_SCALES = (*FLOATS, "F8_E8M0", "U8")  # the last two: exponents with bias 127
_INPUT_SCALES = ("input_scale", "activation_scale")
_UNIT = 32  # kernels take groups of a multiple of this
_NAMES = ("_scale_inv", "_scale")  # all of them multiply; an inverse is meant of the quantization


@dataclass(frozen=True)
class Fp8(Dequantized):
    """NAME in E4M3, and NAME_scale_inv or NAME_scale with a scale for each block of values."""

    # Outputs and inputs that share a scale; None: one for each output, or for the whole tensor.
    block: tuple[int, int] | None = None
    inputs: Inputs = ""  # how the checkpoint rounds the inputs of linears
    # Of one weight in a checkpoint:
    scale: str = _NAMES[0]
    scale_shape: tuple[int, ...] = ()
    first: tuple[int, int] = (0, 0)  # output and input of the part that is read
    input_scale: tuple[str, tuple[int, ...]] | None = None  # name and shape

    name = "FP8"

    @property
    def kept(self) -> WeightFormat:
        """As WeightFormat.kept: dense if a rank's part divides a block of inputs."""
        _, width = self.block or (1, 0)
        if width % _UNIT or (width and self.first[1] % width):
            return DENSE
        return Float8(width, self.inputs)

    def variant(self, name: str, shape: tuple[int, ...], part: Part, find: Find) -> WeightFormat:
        """As Dequantized.variant: with the name and the shape of the scales, and the part."""
        scale = next((scale for scale in _NAMES if find(name + scale) is not None), self.scale)
        found = find(name + scale)
        given = found[0] if found is not None else ()
        allowed = self._scale_shapes(shape)
        first = [part.indices(size)[0] for part, size in zip(part, shape, strict=False)]
        return replace(
            self,
            scale=scale,
            scale_shape=given if given in allowed else allowed[0],
            first=(first[0], first[1]) if len(first) == 2 else (first[0] if first else 0, 0),
            input_scale=self._input_scale(name, find) if self.inputs == "static" else None,
        )

    def _input_scale(self, name: str, find: Find) -> tuple[str, tuple[int, ...]] | None:
        stem = name.removesuffix("weight")
        for scale in _INPUT_SCALES:
            found = find(stem + scale)
            if found is not None and found[0] in ((), (1,)):
                return stem + scale, found[0]
        return None

    def _scale_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        outputs, inputs = shape
        if self.block is not None:
            rows, columns = self.block
            return [(-(-outputs // rows), -(-inputs // columns))]
        return [(), (1,), (1, 1), (outputs, 1), (outputs,)]

    def stored(
        self, name: str, shape: tuple[int, ...], part: Part = (), *, transposed: bool = False
    ) -> list[StoredTensor]:
        """As WeightFormat.stored: the scales are always read as a whole."""
        found = [
            StoredTensor(name, shape, ("F8_E4M3",), part),
            StoredTensor(name + self.scale, self.scale_shape, _SCALES),
        ]
        if self.input_scale is not None:
            found.append(StoredTensor(*self.input_scale, FLOATS))
        return found

    def source(self, tensors: list[torch.Tensor], *, transposed: bool = False) -> Any:
        """As WeightFormat.source: GroupedFloat; a block of inputs may be divided."""
        import torch

        from model.ops.quantized import GroupedFloat

        codes, scales, *rest = tensors
        scales = as_float32(scales)
        input_scale = rest[0].float().reshape(1) if rest else None
        outputs, inputs = codes.shape
        if self.block is None:
            rows = scales.reshape(-1, 1)
            first = self.first[0] if len(rows) > 1 else 0
            rows = rows[first : first + outputs].expand(outputs, 1)
            return GroupedFloat(codes, rows, input_scale)
        height, width = self.block
        rows = scales[(self.first[0] + torch.arange(outputs)) // height]
        columns = (self.first[1] + torch.arange(inputs)) // width
        aligned = self.first[1] % width == 0 and inputs % width == 0
        return GroupedFloat(codes, rows[:, columns[::width] if aligned else columns], input_scale)


def as_float32(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float32; uint8 ones are exponents of two with bias 127."""
    import torch

    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


_DEFAULTS: dict[str, Any] = {
    "quant_method": None,
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": None,
    "modules_to_not_convert": None,
    "ignored_layers": None,
    "kv_cache_scheme": None,
    "scale_fmt": "float",
    "expert_dtype": "fp8",
    "dequantize": False,
}


def read_settings(keys: Keys) -> FormatRules:
    """The formats of a checkpoint with this `quantization_config`. Raises CheckpointError."""
    keys = keys.with_defaults(_DEFAULTS)
    refuse_kv_cache(keys)
    keys.one_of("fmt", "e4m3", "float8_e4m3fn")
    keys.one_of("scale_fmt", "float", "ue8m0")
    keys.one_of("expert_dtype", "fp8")
    scheme = keys.one_of("activation_scheme", "dynamic", "static")
    block = block_size(keys, "weight_block_size")
    form = Fp8(block, "static" if scheme == "static" and block is None else "dynamic")
    exceptions = [excluded(keys, key) for key in ("modules_to_not_convert", "ignored_layers")]
    activations = f"FP8 ({scheme} scales)"
    return FormatRules((*exceptions, HEAD_IS_DENSE), form, activations=activations)


def block_size(keys: Keys, key: str) -> tuple[int, int] | None:
    """Rows and columns of a block in the settings. Raises CheckpointError."""
    size = keys.get(key)
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(map(_is_size, size)):
        raise keys.fail(f"'{key}' must be two integers above 0, not {size!r:.60}")
    return size[0], size[1]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 20
