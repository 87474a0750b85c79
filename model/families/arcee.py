"""Arcee (AFM): Llama whose MLP has no gate."""

from model.families.config_keys.keys import Keys
from model.families.family import Family, attention_biases
from model.families.nanochat import SQUARED_RELU
from model.families.tensor_names import TensorNames


def _fields(keys: Keys) -> dict[str, object]:
    return attention_biases(keys) | {"mlp_bias": keys.boolean("mlp_bias")}


FAMILY = Family(
    {
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 128_001,
        "attention_bias": False,
        "mlp_bias": False,
    },
    _fields,
    TensorNames(mlp=(("mlp.up_proj", ("up",)), ("mlp.down_proj", ("down",)))),
    activations=SQUARED_RELU,
)
