"""config.json of each family → ModelConfig."""

import math
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model import CheckpointError
from model.families import FAMILIES, family, parse_config
from model.formats import DENSE, MXFP4
from model.ops.mxfp4 import Mxfp4
from model.rope import rope_table

_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 100,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
# The keys of Phi-4-mini: the older form, with partial_rotary_factor outside rope_scaling.
_PHI4_MINI: dict[str, Any] = {
    **_SIZES,
    "model_type": "phi3",
    "attention_bias": False,
    "embd_pdrop": 0.0,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1 + i / 100 for i in range(48)],
        "long_factor": [1 + i / 8 for i in range(48)],
    },
    "rope_theta": 10_000.0,
    "sliding_window": 262_144,
    "tie_word_embeddings": True,
}


def test_every_family_has_a_module() -> None:
    assert sorted(FAMILIES) == list(FAMILIES)
    for name in FAMILIES:
        assert family(name).names.layer.format(layer=3) == "model.layers.3."


def test_the_config_of_phi4_mini_is_understood() -> None:
    config = parse_config(_PHI4_MINI, "phi4")
    assert (config.head_dim, config.rotary_dim) == (128, 96)
    assert (config.rope.kind, config.rope.factor) == ("longrope", 16)
    assert config.rope.original_max_positions == 64
    assert len(config.rope.short_factors) == len(config.rope.long_factors) == 48
    assert [layer.window for layer in config.layers] == [None, None]  # 262,144 exceeds 1,024


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_older_names_of_longrope_are_understood(kind: str) -> None:
    scaling = _PHI4_MINI["rope_scaling"] | {"type": kind}
    older = parse_config(_PHI4_MINI | {"rope_scaling": scaling}, "phi3")
    assert older == parse_config(_PHI4_MINI, "phi4")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"full_attn_mod": 2}, "'full_attn_mod' must be 1, not 2"),
        ({"partial_rotary_factor": 1.5}, "'partial_rotary_factor' of 1.5"),
        ({"partial_rotary_factor": 0.6875}, "'short_factor' must contain 44 numbers, not 48"),
        ({"partial_rotary_factor": 0.001}, "an even number of values, not 0"),
        ({"attention_bias": True}, "'attention_bias' = True is not supported"),
    ],
)
def test_phi3_keys_that_are_not_supported_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        parse_config(_PHI4_MINI | changes, "phi4")


def test_longrope_rows_are_those_of_transformers() -> None:
    config = parse_config(_PHI4_MINI, "phi4")
    peer = tf.Phi3Config(**{k: v for k, v in _PHI4_MINI.items() if k != "model_type"})
    table = rope_table(config.rope, config.rotary_dim, config.max_positions)
    assert table.shape == (config.rope.table_rows(config.max_positions), 96) == (64 + 1024, 96)
    for length, positions in ((40, 40), (64, 64), (65, 65), (1024, 1024)):
        frequencies, factor = ROPE_INIT_FUNCTIONS["longrope"](peer, seq_len=length)
        angles = torch.outer(torch.arange(positions).float(), frequencies)
        expected = torch.cat((angles.cos(), angles.sin()), dim=-1) * factor
        first = config.rope.first_row(length)
        assert first == (64 if length > 64 else 0)
        torch.testing.assert_close(table[first : first + positions], expected)
    assert table[0, 0] == pytest.approx(math.sqrt(1 + math.log(16) / math.log(64)))


def test_a_table_within_the_original_context_has_the_short_factors_alone() -> None:
    config = parse_config(_PHI4_MINI, "phi4")
    table = rope_table(config.rope, config.rotary_dim, 50)
    assert len(table) == config.rope.table_rows(50) == 50
    assert torch.equal(table, rope_table(config.rope, config.rotary_dim, 200)[:50])


def test_granite_multipliers_become_scales() -> None:
    values = _SIZES | {
        "model_type": "granite",
        "attention_bias": True,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.0078125,
        "residual_multiplier": 0.22,
        "logits_scaling": 16.0,
    }
    config = parse_config(values, "granite")
    assert (config.embedding_scale, config.residual_scale) == (12.0, 0.22)
    assert (config.attention_scale, config.logits_scale) == (0.0078125, 1 / 16)
    assert config.qkv_bias
    assert config.o_bias
    assert not config.mlp_bias


def test_scales_of_a_family_without_multipliers_are_neutral() -> None:
    config = parse_config(_SIZES | {"model_type": "llama"}, "llama")
    assert (config.embedding_scale, config.residual_scale, config.logits_scale) == (1, 1, 1)
    assert config.attention_scale is None
    assert config.rotary_dim == config.head_dim == 128


def test_bytes_of_a_format_are_those_of_its_storage() -> None:
    shape = (3, 10, 64)
    stored = Mxfp4.empty(shape, torch.device("cpu"))
    assert MXFP4.bytes(shape, 2) == stored.blocks.nbytes + stored.scales.nbytes
    assert DENSE.bytes(shape, 2) == torch.empty(shape, dtype=torch.bfloat16).nbytes


def test_a_part_of_a_weight_is_the_same_part_of_each_stored_tensor() -> None:
    part = (slice(2, 4), slice(32, 96))
    (plain,) = DENSE.stored("w", (8, 128), part)
    assert (plain.name, plain.shape, plain.part) == ("w", (8, 128), part)
    (turned,) = DENSE.stored("w", (5, 8, 128), (slice(1, 2), *part), transposed=True)
    assert (turned.shape, turned.part) == ((5, 128, 8), (slice(1, 2), part[1], part[0]))
    blocks, scales = MXFP4.stored("w", (8, 128), part)
    assert (blocks.name, blocks.shape, blocks.dtypes) == ("w_blocks", (8, 4, 16), ("U8",))
    assert (scales.name, scales.shape) == ("w_scales", (8, 4))
    assert blocks.part == scales.part == (slice(2, 4), slice(1, 3))
