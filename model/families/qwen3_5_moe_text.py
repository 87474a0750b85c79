"""Qwen3.5 and Qwen3.6 with experts, and one that all tokens share, in every layer."""

from dataclasses import replace
from typing import Any

from model.families.config_keys.keys import Keys
from model.families.family import Family
from model.families.qwen2_moe import GATED_SHARED_EXPERT
from model.families.qwen3_next import GATED_ATTENTION, HYBRID, MTP, NEUTRAL, hybrid_experts
from model.families.tensor_names import TensorNames


def _fields(keys: Keys) -> dict[str, Any]:
    return hybrid_experts(keys, normalize=True)


FAMILY = Family(
    {
        **HYBRID,
        "vocab_size": 248_320,
        "num_hidden_layers": 40,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
    },
    _fields,
    TensorNames(
        attention=GATED_ATTENTION,
        experts=replace(
            GATED_SHARED_EXPERT,
            linears=(
                ("mlp.experts.gate_up_proj", ("gate", "up")),
                ("mlp.experts.down_proj", ("down",)),
            ),
        ),
    ),
    single_experts=GATED_SHARED_EXPERT,
    neutral=NEUTRAL,
    norm_offset=1.0,
    partial_rotary=True,
    others=MTP,
)
