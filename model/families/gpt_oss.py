"""gpt-oss: attention sinks, alternating windows, experts in MXFP4 with a clamped activation."""

from model.config import MoeConfig
from model.families.family import Family, attention_biases, layers, top_k
from model.families.keys import Keys
from model.families.tensor_names import ExpertNames, TensorNames
from model.ops.specs import Activation, RouterSpec


def _fields(keys: Keys) -> dict[str, object]:
    experts, window = keys.integer("num_local_experts"), keys.optional_integer("sliding_window")
    return attention_biases(keys, default=True) | {
        "layers": layers(keys, window, lambda layer: layer % 2 == 0, sparse=True),
        "sinks": True,
        "activation": Activation(
            keys.number("swiglu_limit", 7.0), keys.number("swiglu_alpha", 1.702)
        ),
        "moe": MoeConfig(
            num_experts=experts,
            intermediate_size=keys.integer("intermediate_size"),
            router=RouterSpec(top_k(keys, experts), softmax_after_top_k=True, normalize=False),
            biases=True,
        ),
    }


FAMILY = Family(
    "attention_bias experts_per_token initial_context_length layer_types num_experts_per_tok"
    " num_local_experts sliding_window swiglu_alpha swiglu_limit",
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
    rope_theta=150_000.0,
    head_dim=64,
)
