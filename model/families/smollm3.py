"""SmolLM3: Llama in which every fourth layer does not rotate queries and keys."""

from dataclasses import replace

from model.families.config_keys.keys import Keys
from model.families.config_keys.rope_keys import NO_ROPE
from model.families.family import Family, attention_biases, layers, qwen_window


def _fields(keys: Keys) -> dict[str, object]:
    count, interval = keys.integer("num_hidden_layers"), keys.integer("no_rope_layer_interval")
    given = keys.get("no_rope_layers")
    if given is not None and (not isinstance(given, list) or len(given) < count):
        raise keys.fail("'no_rope_layers' must list 1 (with rotation) or 0 for each layer")
    rotates = given or [(i + 1) % interval for i in range(count)]
    window = qwen_window(keys)
    if window is None:  # whatever the types of layers are
        keys = Keys(keys.source, {**keys.values, "layer_types": None}, keys.defaults)
    found = layers(keys, window, lambda layer: not rotates[layer])
    return attention_biases(keys) | {
        "mlp_bias": keys.boolean("mlp_bias"),
        "layers": tuple(
            layer if rotates[i] else replace(layer, rope=NO_ROPE) for i, layer in enumerate(found)
        ),
    }


FAMILY = Family(
    {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 128_001,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "max_window_layers": None,  # published configs have it; layer_types decide
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    _fields,
)
