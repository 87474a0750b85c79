"""nanochat: norms without weights, also of embeddings, an MLP without gate, a reversed rotation."""

from dataclasses import replace

from model.families.config_keys.keys import Keys
from model.families.config_keys.rope_keys import read_rope
from model.families.family import Family, attention_biases
from model.families.tensor_names import TensorNames
from model.ops.specs import Activation

SQUARED_RELU = {"relu2": Activation(kind="relu", is_gated=False)}


def _fields(keys: Keys) -> dict[str, object]:
    if keys.boolean("tie_word_embeddings"):
        raise keys.fail("'tie_word_embeddings' is not supported, because embeddings have a norm")
    head_dim = keys.integer("hidden_size") // keys.integer("num_attention_heads")
    rope, rotary_dim = read_rope(keys, keys.integer("head_dim", head_dim), False, {})
    return attention_biases(keys) | {
        "rope": replace(rope, is_reversed=True),
        "rotary_dim": rotary_dim,
        "embedding_norm": True,
        "qk_norm": True,
        "rotates_before_qk_norm": True,
        "logits_softcap": keys.optional_number("final_logit_softcapping"),
    }


FAMILY = Family(
    {
        "hidden_act": "relu2",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 1,
        "attention_bias": False,
        "final_logit_softcapping": 15.0,
    },
    _fields,
    TensorNames(mlp=(("mlp.fc1", ("up",)), ("mlp.fc2", ("down",)))),
    activations=SQUARED_RELU,
    norm_weights=False,
)
