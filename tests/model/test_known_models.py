"""The well-known models: their shapes, and the spellings of their names."""

import pytest
import transformers

from model.cost.known_models import (
    KNOWN_CONFIGS,
    closest_known_models,
    find_known_model,
    named_config,
)
from model.cost.operations import parameter_bytes

# Number of parameters of Gemma 3's vision tower, and of its projection to each hidden size.
VISION = 416_866_032


def projection(hidden_size: int) -> int:
    return 1152 * hidden_size + 1152


# Number of parameters of the published checkpoints in bfloat16.
PARAMETERS = {
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472 - VISION - projection(2560),
    "gemma-3-12b": 12_187_325_040 - VISION - projection(3840),
    "gemma-3-27b": 27_432_406_640 - VISION - projection(5376),
    "gemma-4-e2b": 4_628_569_379,
    "gemma-4-26b-a4b": 25_233_141_790,
    "gemma-4-31b": 30_697_345_340,
    "granite-3.3-8b": 8_170_864_640,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b-v0.1": 46_702_792_704,
    "phi-3.5-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "qwen2-0.5b": 494_032_768,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-4b-2507": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "qwen3.5-0.8b": 752_393_024,
    "qwen3.5-9b": 8_953_803_264,
    "qwen3.5-27b": 26_895_998_464,
    "qwen3.5-35b-a3b": 34_660_610_688,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-30b-a3b-2507": 30_532_122_624,
    "qwen3-coder-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-235b-a22b-2507": 235_093_634_560,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "olmoe-1b-7b": 6_919_161_856,
    "glm-4.5-air": 106_852_251_264,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "kimi-k2": 1_026_408_232_448,
    "glm-4.7-flash": 29_943_393_920,
}
MXFP4_BYTES = {"gpt-oss-20b": 13_761_264_768, "gpt-oss-120b": 65_248_815_744}


def test_weights_are_as_large_as_the_published_checkpoint() -> None:
    sizes = {name: 2 * count for name, count in PARAMETERS.items()} | MXFP4_BYTES
    assert {name: parameter_bytes(named_config(name), "bfloat16") for name in KNOWN_CONFIGS} == (
        sizes
    )
    assert len(sizes) >= 20


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-2-7b", transformers.LlamaConfig),
        ("mistral-7b-v0.1", transformers.MistralConfig),
        ("mixtral-8x7b-v0.1", transformers.MixtralConfig),
        ("gpt-oss-120b", transformers.GptOssConfig),
        ("gemma-2-2b", transformers.Gemma2Config),
    ],
)
def test_shapes_are_the_defaults_of_transformers(name: str, published: type) -> None:
    # The defaults of a class are the shape of the model that its family began with.
    defaults, config = published(), KNOWN_CONFIGS[name]
    keys = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "vocab_size"
    )
    for key in keys.split():
        assert config[key] == getattr(defaults, key), key


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("google/gemma-3-4b-it", "gemma-3-4b"),
        ("google/gemma-3-27b-pt", "gemma-3-27b"),
        ("gemma2:2b", "gemma-2-2b"),
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("Llama 3.1 8B", "llama-3.1-8b"),
        ("llama3.1:8b", "llama-3.1-8b"),
        ("LLAMA_3_1_8B", "llama-3.1-8b"),
        ("Llama-2-7b-chat-hf", "llama-2-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("mistral-7b", "mistral-7b-v0.3"),
        ("Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b-v0.1"),
        ("Qwen3-4B-Thinking-2507", "qwen3-4b-2507"),
        ("Qwen3-Coder-30B-A3B-Instruct", "qwen3-coder-30b-a3b"),
        ("microsoft/Phi-4-mini-instruct", "phi-4-mini"),
        ("gptoss20b", "gpt-oss-20b"),
        # Other models: the separator between two digits, a quantization, a path.
        ("Qwen2-57B", None),
        ("llama-3-18b", None),
        ("Llama-3.1-8B-Instruct-AWQ", None),
        ("./models/Qwen3-0.6B", None),
        ("/models/Qwen3-0.6B", None),
        ("", None),
    ],
)
def test_a_model_is_found_by_the_usual_spellings_of_its_name(
    spelling: str, name: str | None
) -> None:
    assert find_known_model(spelling) == name


def test_every_name_finds_its_own_model() -> None:
    assert [find_known_model(name) for name in KNOWN_CONFIGS] == [*KNOWN_CONFIGS]


@pytest.mark.parametrize(
    ("spelling", "closest"),
    [
        ("lama-3.1-8b", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-9B", "llama-3.1-8b"),
        ("Llama-3.1-8B-Instruct-AWQ", "llama-3.1-8b"),
        ("phi-4-mini-reasoning", "phi-4-mini"),
        ("gpt-oss", "gpt-oss-20b"),
        ("qwen3-06b", "qwen3-0.6b"),
    ],
)
def test_a_name_that_is_not_known_has_closest_ones(spelling: str, closest: str) -> None:
    assert closest_known_models(spelling)[0] == closest


def test_a_name_like_no_other_has_no_closest_one() -> None:
    assert closest_known_models("none") == []
