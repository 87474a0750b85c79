"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama with fused tensors, longrope and a window."""

from model.families.config_keys.keys import Keys
from model.families.family import Family, layers
from model.families.tensor_names import TensorNames


def _fields(keys: Keys) -> dict[str, object]:
    return {"layers": layers(keys, keys.optional_integer("sliding_window"))}


FAMILY = Family(
    {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 32_000,
        "sliding_window": None,
    },
    _fields,
    TensorNames(
        attention=(("self_attn.qkv_proj", ("q", "k", "v")), ("self_attn.o_proj", ("o",))),
        mlp=(("mlp.gate_up_proj", ("gate", "up")), ("mlp.down_proj", ("down",))),
    ),
    neutral={"full_attn_mod": 1, "interpolate_factor": 1},
    partial_rotary=True,
    rope_aliases={"su": "longrope", "yarn": "longrope"},  # of the first Phi-3 checkpoints
)
