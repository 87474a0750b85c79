"""Mixtral: Mistral with experts."""

from model.families.family import Family, layers, softmax_moe
from model.families.keys import Keys
from model.families.tensor_names import ExpertNames, TensorNames


def _fields(keys: Keys) -> dict[str, object]:
    experts, size = keys.integer("num_local_experts"), keys.integer("intermediate_size")
    return {
        "layers": layers(keys, keys.optional_integer("sliding_window"), sparse=True),
        "moe": softmax_moe(keys, experts, size, normalize=True),
    }


FAMILY = Family(
    "sliding_window layer_types num_local_experts num_experts_per_tok",
    _fields,
    TensorNames(
        experts=ExpertNames(
            router="block_sparse_moe.gate",
            linears=(
                ("block_sparse_moe.experts.{expert}.w1", ("gate",)),
                ("block_sparse_moe.experts.{expert}.w3", ("up",)),
                ("block_sparse_moe.experts.{expert}.w2", ("down",)),
            ),
        )
    ),
    rope_theta=1e6,
)
