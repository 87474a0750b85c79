"""AWQ: integers of 4 bits in words along the outputs, in the order of AutoAWQ's GEMM kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.formats.dense import DENSE, FLOATS, Dequantized
from model.formats.format import Part, StoredTensor, WeightFormat
from model.formats.integers import integers_of
from model.formats.packing import grouped, scaled, unpack
from model.formats.rules import HEAD_IS_DENSE, FormatRules, Rule, names

if TYPE_CHECKING:
    import torch

    from model.families.config_keys.keys import Keys

_BITS = 4
_PER_WORD = 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of eight neighbouring outputs in a word, the lowest bits first


@dataclass(frozen=True)
class Awq(Dequantized):
    """value = scale · (integer - zero point); all tensors are stored transposed, [in, out]."""

    group: int | None  # inputs that share a scale; None: all of them

    name = "AWQ int4"

    @property
    def kept(self) -> WeightFormat:
        """As WeightFormat.kept."""
        return integers_of(_BITS, self.group, has_zeros=True)

    def stored(
        self, name: str, shape: tuple[int, ...], part: Part = (), *, transposed: bool = False
    ) -> list[StoredTensor]:
        """As WeightFormat.stored: qweight int32 [in, out / 8], qzeros int32 [groups, out / 8],
        scales [groups, out].
        """
        outputs, inputs = shape
        group, stem = self.group or inputs, name.removesuffix("weight")
        for size, unit in ((outputs, _PER_WORD), (inputs, group)):
            if size % unit:
                raise ValueError(f"{size} rows or columns are not a multiple of {unit}")
        rows, columns = (*part, slice(None), slice(None))[:2]
        groups = slice(None) if self.group is None else scaled(columns, inputs, group)
        words = scaled(rows, outputs, _PER_WORD)
        counts = inputs // group, outputs // _PER_WORD
        return [
            StoredTensor(f"{stem}qweight", (inputs, counts[1]), ("I32",), (columns, words)),
            StoredTensor(f"{stem}qzeros", counts, ("I32",), (groups, words)),
            StoredTensor(f"{stem}scales", (counts[0], outputs), FLOATS, (groups, rows)),
        ]

    def source(self, tensors: list[torch.Tensor], *, transposed: bool = False) -> Any:
        """As WeightFormat.source: GroupedInt."""
        words, zero_words, scales = tensors
        codes, zeros = (_ordered(each).T.contiguous() for each in (words, zero_words))
        return grouped(codes, scales.T, zeros.float(), _BITS)


def _ordered(words: torch.Tensor) -> torch.Tensor:
    """Words int32 [rows, words] → their integers in the order of the outputs [rows, out]."""
    codes = unpack(words, _BITS, words.shape[1] * _PER_WORD)
    return codes.unflatten(1, (-1, _PER_WORD))[..., list(_PLACES)].flatten(1)


_DEFAULTS: dict[str, Any] = {
    "quant_method": None,
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": None,
    "format": None,
    "checkpoint_format": None,
    "desc_act": False,
    "lm_head": False,
    "pack_dtype": "int32",
    "modules_to_not_convert": None,
}
_NEUTRAL = tuple(
    """backend do_fuse exllama_config fuse_max_seq_len modules_to_fuse method meta sym
    hyb_act""".split()  # the zero points are stored, symmetric or not
)


def read_settings(keys: Keys) -> FormatRules:
    """The formats of a checkpoint with this `quantization_config`. Raises CheckpointError."""
    keys = keys.with_defaults(_DEFAULTS, _NEUTRAL)
    keys.one_of("bits", _BITS)
    keys.one_of("zero_point", True)
    for key in ("desc_act", "lm_head"):
        keys.one_of(key, False)
    keys.one_of("pack_dtype", "int32")
    stated = (keys.get(key) for key in ("version", "format", "checkpoint_format"))
    version = next((value for value in stated if value is not None), None)
    if str(version or "gemm").lower() != "gemm":
        raise keys.fail(f"version {version!r:.60} is not supported; supported: gemm")
    group = None if keys.get("group_size") == -1 else keys.integer("group_size")
    # AutoAWQ excludes each module whose name contains one of these.
    patterns = (".*" + re.escape(name) for name in names(keys, "modules_to_not_convert"))
    return FormatRules((Rule(DENSE, patterns=tuple(patterns)), HEAD_IS_DENSE), Awq(group))
