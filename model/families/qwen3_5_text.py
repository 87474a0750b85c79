"""Qwen3.5 and Qwen3.6, the dense ones: Qwen3-Next without experts, with fewer fused tensors."""

from model.families.family import Family
from model.families.qwen3_next import GATED_ATTENTION, HYBRID, MTP, NEUTRAL, hybrid_fields
from model.families.tensor_names import TensorNames

FAMILY = Family(
    {
        **HYBRID,
        "vocab_size": 248_320,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
    },
    hybrid_fields,
    TensorNames(attention=GATED_ATTENTION),
    neutral=NEUTRAL,
    norm_offset=1.0,
    partial_rotary=True,
    others=MTP,
)
