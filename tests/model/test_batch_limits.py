"""The default batch of known models on known GPUs."""

from dataclasses import replace

import pytest

from model.cost.batch_limits import default_batch_size, default_batch_tokens
from model.cost.devices import find_device
from model.cost.known_models import named_config
from model.cost.operations import kv_bytes_per_sequence, parameter_bytes


@pytest.mark.parametrize(
    ("model", "gpu", "size", "tokens"),
    [
        ("llama-3-8b", "RTX 4090", 256, 8192),  # 24 GB: not even the KV of 256 sequences fits
        ("llama-3-8b", "H100", 512, 8192),
        ("llama-3-8b", "H200", 1024, 16384),
        ("gpt-oss-20b", "H100", 1024, 16384),  # half of its layers have a window of 128
        ("gpt-oss-120b", "H100", 256, 8192),
        ("qwen3-0.6b", "RTX 4090", 256, 8192),
        ("qwen3-0.6b", "H100", 512, 8192),
        ("qwen3-0.6b", "H200", 1024, 16384),
    ],
)
def test_the_batch_is_the_largest_whose_typical_kv_fits(
    model: str, gpu: str, size: int, tokens: int
) -> None:
    config, memory = named_config(model), find_device(gpu).memory
    assert default_batch_size(config, "bfloat16", memory) == size
    assert default_batch_tokens(size) == tokens
    room = 0.9 * memory - parameter_bytes(config, "bfloat16")
    need = kv_bytes_per_sequence(config, 768, "bfloat16") + 52 * config.vocab_size
    assert size == 256 or size * need <= room
    assert size == 1024 or 2 * size * need > room


def test_gpus_that_share_a_model_take_a_larger_batch() -> None:
    config, memory = named_config("llama-3.1-70b"), find_device("H100").memory
    assert default_batch_size(config, "bfloat16", memory, 2) == 256
    assert default_batch_size(config, "bfloat16", memory, 8) == 1024


def test_short_sequences_need_less_room() -> None:
    config = named_config("llama-3-8b")
    memory = find_device("H100").memory
    assert default_batch_size(replace(config, max_positions=64), "bfloat16", memory) == 1024


def test_a_step_has_room_for_chunks_beside_its_decodes() -> None:
    assert [default_batch_tokens(size) for size in (1, 512, 600, 1024, 4096)] == [
        8192, 8192, 9600, 16384, 16384,
    ]  # fmt: skip
