"""GPTQ: integers in words along the inputs, as AutoGPTQ and GPTQModel store them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from model.formats.dense import DENSE, FLOATS, Dequantized
from model.formats.format import Find, Part, StoredTensor, WeightFormat
from model.formats.integers import integers_of
from model.formats.packing import by_index, grouped, in_order, scaled, unpack
from model.formats.rules import HEAD_IS_DENSE, FormatRules, Rule, checked

if TYPE_CHECKING:
    import torch

    from model.families.config_keys.keys import Keys

_WORD_BITS = 32


@dataclass(frozen=True)
class Gptq(Dequantized):
    """value = scale · (integer - zero point); all tensors are stored transposed, [in, out].

    With `ordered` ("desc_act") the group of each input is the one that g_idx gives.
    """

    bits: int  # 4 or 8
    group: int | None  # inputs that share a scale; None: all of them
    is_ordered: bool = False
    zero_offset: int = 1  # is added to stored zero points: 1 in version 1 of the format, 0 in 2
    has_index: bool = True  # of one weight in a checkpoint

    @property
    def name(self) -> str:  # type: ignore[override]
        """As reports show it."""
        return f"GPTQ int{self.bits}"

    @property
    def kept(self) -> WeightFormat:
        """As WeightFormat.kept: dense if the inputs of a group are not neighbours."""
        if self.is_ordered:
            return DENSE
        return integers_of(self.bits, self.group, has_zeros=True)

    @property
    def _per_word(self) -> int:
        return _WORD_BITS // self.bits

    def variant(self, name: str, shape: tuple[int, ...], part: Part, find: Find) -> WeightFormat:
        """As Dequantized.variant."""
        is_missing = find(_stem(name) + "g_idx") is None
        return replace(self, has_index=self.is_ordered or not is_missing)

    def stored(
        self, name: str, shape: tuple[int, ...], part: Part = (), *, transposed: bool = False
    ) -> list[StoredTensor]:
        """As WeightFormat.stored: qweight int32 [in / integers of a word, out], qzeros int32
        [groups, out / integers of a word], scales [groups, out], g_idx [in].
        """
        outputs, inputs = shape
        group, per_word, stem = self.group or inputs, self._per_word, _stem(name)
        for size, unit in ((outputs, per_word), (inputs, per_word), (inputs, group)):
            if size % unit:
                raise ValueError(f"{size} rows or columns are not a multiple of {unit}")
        rows, columns = (*part, slice(None), slice(None))[:2]
        is_whole = self.is_ordered or self.group is None
        groups = slice(None) if is_whole else scaled(columns, inputs, group)
        packed_rows = scaled(rows, outputs, per_word)
        found = [
            StoredTensor(
                f"{stem}qweight", (inputs // per_word, outputs), ("I32",),
                (scaled(columns, inputs, per_word), rows),
            ),
            StoredTensor(
                f"{stem}qzeros", (inputs // group, outputs // per_word), ("I32",),
                (groups, packed_rows),
            ),
            StoredTensor(f"{stem}scales", (inputs // group, outputs), FLOATS, (groups, rows)),
        ]  # fmt: skip
        if self.has_index:
            found.append(StoredTensor(f"{stem}g_idx", (inputs,), ("I32",), (columns,)))
        return found

    def source(self, tensors: list[torch.Tensor], *, transposed: bool = False) -> Any:
        """As WeightFormat.source: GroupedInt, or a tensor if the inputs' groups are mixed."""
        words, zero_words, scales, *index = tensors
        codes = unpack(words.T, self.bits, len(words) * self._per_word)
        scales = scales.T
        zeros = unpack(zero_words, self.bits, len(scales)).T
        # The largest stored zero point of version 1 stands for 0.
        zeros = ((zeros.int() + self.zero_offset) & ((1 << self.bits) - 1)).float()
        if not index:
            return grouped(codes, scales, zeros, self.bits)
        if self.is_ordered:
            if in_order(index[0], scales.shape[1]):
                return grouped(codes, scales, zeros, self.bits)
            return by_index(codes, scales, zeros, index[0])
        first = index[0] - int(index[0].min())  # a part of the inputs begins with a later group
        if not in_order(first, scales.shape[1]):
            raise ValueError("g_idx mixes the groups, but 'desc_act' is false: set it to true")
        return grouped(codes, scales, zeros, self.bits)


def _stem(name: str) -> str:
    return name.removesuffix("weight")


_DEFAULTS: dict[str, Any] = {
    "quant_method": None,
    "bits": None,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": None,
    "format": None,
    "lm_head": False,
    "dynamic": None,
    "modules_in_block_to_quantize": None,
    "pack_dtype": "int32",
    "is_marlin_format": False,
    "data_type": "int",  # of AutoRound, which exports this format, too
}
_NEUTRAL = tuple(
    """true_sequential static_groups damp_percent damp_auto_increment model_name_or_path
    model_file_base_name meta quantizer tokenizer dataset batch_size pad_token_id
    max_input_length method autoround_version provider iters nsamples seqlen lr minmax_lr amp
    low_gpu_mem_usage enable_quanted_input enable_minmax_tuning enable_norm_bias_tuning
    gradient_accumulate_steps scale_dtype quant_block_list to_quant_block_names
    cache_block_outputs block_name_to_quantize module_name_preceding_first_block model_seqlen
    use_cuda_fp16 use_exllama disable_exllama exllama_config backend mse act_group_aware
    version""".split()
)


def read_settings(keys: Keys) -> FormatRules:
    """The formats of a checkpoint with this `quantization_config`. Raises CheckpointError."""
    keys = keys.with_defaults(_DEFAULTS, _NEUTRAL)
    keys.boolean("sym")  # symmetric or not, the zero points are stored
    keys.one_of("pack_dtype", "int32")
    keys.one_of("is_marlin_format", False)
    keys.one_of("data_type", "int")
    stated = "checkpoint_format" if keys.get("checkpoint_format") is not None else "format"
    version = keys.one_of(stated, None, "gptq", "gptq_v2")
    form = _format(keys, Gptq(4, None, zero_offset=0 if version == "gptq_v2" else 1))
    named = _dynamic(keys, form)
    if not keys.boolean("lm_head"):
        named.append(HEAD_IS_DENSE)
    only = keys.get("modules_in_block_to_quantize")
    if only is None:
        return FormatRules(tuple(named), form)
    blocks = only if isinstance(only, list) else [None]
    modules = [name for block in blocks for name in (block if isinstance(block, list) else [block])]
    if not all(isinstance(name, str) for name in modules):
        raise keys.fail("'modules_in_block_to_quantize' must be a list of lists of names")
    named.append(Rule(form, endings=tuple(f".{name}" for name in modules)))
    return FormatRules(tuple(named))


def _format(keys: Keys, base: Gptq) -> Gptq:
    """The format that the settings, or those of some modules, describe."""
    bits = keys.one_of("bits", 4, 8)
    size = keys.get("group_size")
    group = None if size == -1 else keys.integer("group_size")
    return replace(base, bits=bits, group=group, is_ordered=keys.boolean("desc_act"))


def _dynamic(keys: Keys, form: Gptq) -> list[Rule]:
    """The rules of GPTQModel's `dynamic`: "-:PATTERN" excludes modules, "+:" changes them."""
    dynamic = keys.get("dynamic", {})
    if not isinstance(dynamic, dict):
        raise keys.fail(f"'dynamic' must be an object, not {dynamic!r:.60}")
    named = []
    for pattern, changes in dynamic.items():
        expression = checked(keys, pattern.removeprefix("+:").removeprefix("-:"))
        if pattern.startswith("-:"):
            named.append(Rule(DENSE, patterns=(expression,)))
            continue
        if not isinstance(changes, dict):
            raise keys.fail(f"'dynamic' {pattern!r:.60} must be an object, not {changes!r:.60}")
        own = keys.inside(pattern, changes).with_defaults(
            {
                "bits": form.bits,
                "group_size": form.group or -1,
                "desc_act": form.is_ordered,
                "sym": True,
            },
            _NEUTRAL,
        )
        named.append(Rule(_format(own, form), patterns=(expression,)))
    return named
