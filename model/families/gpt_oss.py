"""gpt-oss: attention sinks, alternating windows, experts in MXFP4 with a clamped activation."""

from model.config import MoeConfig
from model.families.config_keys.keys import Keys
from model.families.config_keys.moe_keys import top_k
from model.families.family import Family, attention_biases, layers
from model.families.tensor_names import ExpertNames, TensorNames
from model.ops.specs import Activation, RouterSpec


def _fields(keys: Keys) -> dict[str, object]:
    experts, window = keys.integer("num_local_experts"), keys.optional_integer("sliding_window")
    return attention_biases(keys) | {
        "layers": layers(keys, window, lambda layer: layer % 2 == 0, sparse=True),
        "sinks": True,
        "activation": Activation(keys.number("swiglu_limit"), keys.number("swiglu_alpha")),
        "moe": MoeConfig(
            num_experts=experts,
            intermediate_size=keys.integer("intermediate_size"),
            router=RouterSpec(top_k(keys, experts), softmax_after_top_k=True, normalize=False),
            biases=True,
        ),
    }


FAMILY = Family(
    {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "initial_context_length": None,  # repeats original_max_position_embeddings
    },
    _fields,
    TensorNames(
        experts=ExpertNames(
            router="mlp.router",
            linears=(
                ("mlp.experts.gate_up_proj", ("gate", "up")),
                ("mlp.experts.down_proj", ("down",)),
            ),
            transposed=True,
            interleaved=True,
        )
    ),
    neutral={"norm_topk_prob": True},
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
)
