"""The names and the formats of tensors in GGUF files."""

import re
from dataclasses import replace

from model.families.tensor_names import ExpertNames, TensorNames
from model.formats.rules import FormatRules, Rule
from model.gguf.format import GgufFormat, has_integers
from model.gguf.header import Gguf

_NAMES = TensorNames(
    embedding="token_embd.weight",
    final_norm="output_norm.weight",
    head="output.weight",
    layer="blk.{layer}.",
    attention_norm="attn_norm.weight",
    mlp_norm="ffn_norm.weight",
    q_norm="attn_q_norm.weight",
    k_norm="attn_k_norm.weight",
    sinks="attn_sinks.weight",
    attention=(
        ("attn_q", ("q",)),
        ("attn_k", ("k",)),
        ("attn_v", ("v",)),
        ("attn_output", ("o",)),
    ),
    mlp=(("ffn_gate", ("gate",)), ("ffn_up", ("up",)), ("ffn_down", ("down",))),
    experts=ExpertNames(
        router="ffn_gate_inp",
        linears=(
            ("ffn_gate_exps", ("gate",)),
            ("ffn_up_exps", ("up",)),
            ("ffn_down_exps", ("down",)),
        ),
        weight_suffix=".weight",
        bias_suffix=".bias",
    ),
)
_FUSED_ATTENTION = (("attn_qkv", ("q", "k", "v")), ("attn_output", ("o",)))
_OWN: dict[str, dict[str, object]] = {
    "gemma3": {
        "attention_post_norm": "post_attention_norm.weight",
        "mlp_post_norm": "post_ffw_norm.weight",
    },
    "gpt-oss": {"mlp_norm": "post_attention_norm.weight"},
    "phi3": {"mlp": (("ffn_up", ("gate", "up")), ("ffn_down", ("down",)))},
}
USED_BY_CONFIG = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are parts of the config."""


def tensor_names(gguf: Gguf) -> TensorNames:
    """The names of the decoder's tensors; the converter can fuse q, k and v."""
    own = _OWN.get(str(gguf.metadata.get("general.architecture")), {})
    names: TensorNames = replace(_NAMES, **own)  # type: ignore[arg-type]
    if "blk.0.attn_qkv.weight" in gguf.tensors:
        names = replace(names, attention=_FUSED_ATTENTION)
    return names


def stored_formats(gguf: Gguf) -> FormatRules:
    """The formats of the weights, which are tensor by tensor what the file says."""
    matrices: dict[str, set[str]] = {}  # types of the tensors of each
    quantized = {name: t.type.name for name, t in gguf.tensors.items() if t.type.values > 1}
    for name, kind in quantized.items():
        matrices.setdefault(_matrix(name), set()).add(kind)
    modules: dict[GgufFormat, list[str]] = {}
    for name, kind in quantized.items():
        kinds = matrices[_matrix(name)]
        form = GgufFormat(kind, is_mixed=len(kinds) > 1 and all(map(has_integers, kinds)))
        modules.setdefault(form, []).append(name.removesuffix(".weight"))
    return FormatRules(tuple(Rule(form, exact=frozenset(own)) for form, own in modules.items()))


def _matrix(name: str) -> str:
    """What the names of tensors have in common that have one format: a matrix, or all experts."""
    return re.sub(r"(?<=\.attn_)[qkv](?=\.)|(?<=\.ffn_)(gate|up|(gate|up|down)(?=_exps))", "", name)


def rotated_rows(gguf: Gguf, name: str, heads: int, kv_heads: int, head_dim: int) -> int:
    """How many of a tensor's first rows have the order of llama.cpp's rotary embedding.

    Of llama alone, the converter interleaves the two halves of each query and key head, so that
    neighbouring values are rotated together.
    """
    if gguf.metadata.get("general.architecture") != "llama":
        return 0
    rows = {"attn_q": heads, "attn_k": kv_heads, "attn_qkv": heads + kv_heads}
    return rows.get(name.rpartition(".")[0].rpartition(".")[2], 0) * head_dim
