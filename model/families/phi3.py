"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama with fused tensors, longrope and a window."""

from model.families.family import Family, layers
from model.families.keys import Keys
from model.families.tensor_names import TensorNames


def _fields(keys: Keys) -> dict[str, object]:
    for key in ("full_attn_mod", "interpolate_factor"):
        if keys.get(key, 1) != 1:
            raise keys.fail(f"'{key}' must be 1, not {keys.get(key)!r}")
    return {"layers": layers(keys, keys.optional_integer("sliding_window"))}


FAMILY = Family(
    "embd_pdrop full_attn_mod interpolate_factor original_max_position_embeddings"
    " partial_rotary_factor resid_pdrop sliding_window",
    _fields,
    TensorNames(
        attention=(("self_attn.qkv_proj", ("q", "k", "v")), ("self_attn.o_proj", ("o",))),
        mlp=(("mlp.gate_up_proj", ("gate", "up")), ("mlp.down_proj", ("down",))),
    ),
    partial_rotary=True,
    rope_aliases={"su": "longrope", "yarn": "longrope"},  # of the first Phi-3 checkpoints
)
