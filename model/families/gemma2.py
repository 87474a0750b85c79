"""Gemma 2: also norms after attention and MLP, GELU, alternating windows, softcapping."""

from collections.abc import Callable, Mapping
from typing import Any

from model.families.config_keys.keys import Keys
from model.families.family import Family, attention_biases, layers
from model.families.tensor_names import TensorNames
from model.ops.specs import Activation

GEMMA: Mapping[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "use_bidirectional_attention": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
"""Defaults that Gemma 2 and 3 share. Published configs leave out sizes that are the default."""

NAMES = TensorNames(
    attention_post_norm="post_attention_layernorm.weight",
    mlp_norm="pre_feedforward_layernorm.weight",
    mlp_post_norm="post_feedforward_layernorm.weight",
)
ACTIVATIONS = {"gelu_pytorch_tanh": Activation(kind="gelu_tanh")}


def gemma_fields(keys: Keys, is_sliding: Callable[[int], bool]) -> dict[str, Any]:
    """The fields that Gemma 2 and 3 share; is_sliding: of layers, where no layer_types are."""
    if keys.get("use_bidirectional_attention"):
        raise keys.fail("'use_bidirectional_attention' is not supported")
    return attention_biases(keys) | {
        "layers": layers(keys, keys.optional_integer("sliding_window"), is_sliding),
        "post_norms": True,
        "embedding_scale": keys.integer("hidden_size") ** 0.5,
        "attention_scale": keys.number("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": keys.optional_number("attn_logit_softcapping"),
        "logits_softcap": keys.optional_number("final_logit_softcapping"),
    }


def _fields(keys: Keys) -> dict[str, Any]:
    return gemma_fields(keys, lambda layer: layer % 2 == 0)


FAMILY = Family(
    {
        **GEMMA,
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    _fields,
    NAMES,
    aliases={"hidden_activation": "hidden_act"},
    activations=ACTIVATIONS,
    norm_offset=1.0,
)
