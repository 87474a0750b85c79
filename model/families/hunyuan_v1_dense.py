"""Hunyuan dense: Llama whose query and key heads are normalized after the rotation."""

from model.families.config_keys.keys import Keys
from model.families.config_keys.rope_keys import read_rope
from model.families.family import Family, attention_biases
from model.families.tensor_names import TensorNames


def _fields(keys: Keys) -> dict[str, object]:
    heads = keys.integer("num_attention_heads")
    head_dim = keys.integer("head_dim", keys.integer("hidden_size") // heads)
    rope, rotary_dim = read_rope(_with_stretched_base(keys, head_dim), head_dim, False, {})
    return attention_biases(keys) | {
        "qk_norm": True,
        "rotates_before_qk_norm": True,
        "rope": rope,
        "rotary_dim": rotary_dim,
    }


def _with_stretched_base(keys: Keys, head_dim: int) -> Keys:
    """The keys with "dynamic" scaling by `alpha` as what it is: theta · alpha^(d / (d - 2))."""
    parameters = keys.get("rope_scaling") or keys.get("rope_parameters")
    if not isinstance(parameters, dict):
        return keys
    given = Keys(keys.source, parameters)
    if given.get("rope_type", given.get("type")) != "dynamic" or not given.get("alpha"):
        return keys
    # Other numbers, of which published configs are full, do not count beside alpha.
    theta = given.number("rope_theta", keys.number("rope_theta"))
    theta *= given.number("alpha") ** (head_dim / (head_dim - 2))
    values = {**keys.values, "rope_scaling": None, "rope_parameters": {"rope_theta": theta}}
    return Keys(keys.source, values, keys.defaults)


# In published configs, for classifiers, images, and attention shared by layers (use_cla, refused).
_OF_OTHER_MODELS = (
    *("attention_head_dim", "cla_share_factor", "class_num", "dense_list", "pool_type"),
    *("im_end_id", "im_newline_id", "im_start_id", "mask_init_id", "text_end_id", "text_start_id"),
    *("org_vocab_size", "pad_id"),
)


FAMILY = Family(
    {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "attention_bias": False,
        **dict.fromkeys(_OF_OTHER_MODELS),
    },
    _fields,
    TensorNames(q_norm="self_attn.query_layernorm.weight", k_norm="self_attn.key_layernorm.weight"),
    neutral={"use_qk_norm": True, "use_rotary_pos_emb": True, "norm_type": "rms"},
)
