"""Which callable of the decoder does which operation of the cost model: what a profile follows.

The forward pass knows nothing of this: whoever follows it replaces these callables for a while.
"""

from dataclasses import dataclass

from model import ops
from model.layers import Mlp
from model.moe import Moe
from model.ops import reference
from model.transformer import Transformer

OTHER = "other"

AFTER_INNER = {"embedding": OTHER, "gate_up_proj": "down_proj"}
"""A callable's own time before a part inside it goes by its name, after it by this one: a decoder
embeds before its first layer, experts project up before their activation and down after it."""

WITHIN = {
    **dict.fromkeys(("input_norm", "rope"), "qkv_proj"),
    **dict.fromkeys(("post_norm", "activation", "down_proj"), "gate_up_proj"),
}
"""The operation whose callable does this one on the way, where a device has a kernel for both."""


@dataclass(frozen=True)
class Part:
    """A callable, as an attribute of an object or a module, and the operation that it does."""

    owner: object
    attribute: str
    name: str


def decoder_parts(model: Transformer) -> list[Part]:
    """Return the decoder's parts; what is left is residual sums and views."""
    parts = [
        Part(model, "final_norm", "final_norm"),
        Part(model, "head", "lm_head"),
        Part(ops, "norm_qkv", "qkv_proj"),
        Part(ops, "rotate_and_write", "rope"),
        Part(ops, "attention", "attention"),
        Part(ops, "gated_linear", "gate_up_proj"),
        Part(ops, "norm_mlp", "gate_up_proj"),
        Part(reference, "swiglu", "activation"),  # where no kernel does it on the way
        Part(ops, "route", "router"),
        Part(ops, "experts", "gate_up_proj"),
    ]
    for layer in model.layers:
        attention, mlp = layer.attention, layer.mlp
        parts += [
            Part(layer, "attention_norm", "input_norm"),
            Part(attention, "qkv", "qkv_proj"),
            Part(attention, "out", "o_proj"),
            Part(layer, "mlp_norm", "post_norm"),
        ]
        if isinstance(mlp, Moe):
            parts.append(Part(mlp, "router", "router"))
        elif isinstance(mlp, Mlp):
            parts.append(Part(mlp, "down", "down_proj"))
    return parts
