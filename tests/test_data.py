"""The embedded model's files: sizes, formats, and questions excluded from training."""

import json
import random
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

DATA = Path(__file__).resolve().parent.parent / "data"
MODEL = DATA / "model"
sys.path.insert(0, str(DATA))

from questions import FAMILIES, evaluation_set, is_held_out, parse, sample, solve  # noqa: E402


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((MODEL / "config.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, tuple[str, list[int]]]:
    """The dtype and shape of every tensor, from the safetensors header."""
    with (MODEL / "model.safetensors").open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(length))
    header.pop("__metadata__")
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}


def questions() -> tuple[int, list[str]]:
    lines = (DATA / "input.txt").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return int(lines[0]), lines[1:]


def answers() -> list[str]:
    lines = (DATA / "answers.txt").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return lines


def test_data_is_smaller_than_eight_megabytes() -> None:
    files = [p for p in DATA.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 8_000_000


def test_every_input_line_has_an_answer() -> None:
    count, lines = questions()
    assert count >= 240
    assert len(lines) == len(answers()) == count
    assert len(set(lines)) == count


def test_every_answer_equals_the_computed_one() -> None:
    for line, answer in zip(questions()[1], answers(), strict=True):
        assert solve(line) == answer


def test_input_is_held_out_and_contains_every_family() -> None:
    asked = [parse(line) for line in questions()[1]]
    assert all(is_held_out(q) for q in asked)
    assert {q.family for q in asked} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_never_samples_a_held_out_question(family: str) -> None:
    rng = random.Random(0)
    trained = {sample(family, rng, held_out=False).key for _ in range(400)}
    asked = {parse(line).key for line in questions()[1]}
    assert not trained & asked
    assert not any(is_held_out(sample(family, rng, held_out=False)) for _ in range(100))


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_are_recovered_from_their_text(family: str) -> None:
    rng = random.Random(1)
    for held_out in (False, True):
        for _ in range(100):
            question = sample(family, rng, held_out)
            assert parse(question.text) == question


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3 plus 45?", "Add 45 and 3."),
        ("What is the largest of 1, 22, 3?", "Which number is the largest: 22, 3, 1?"),
        ("Is 45 less than 54?", "Is the number 54 greater than the number 45?"),
        (
            "Put May, March, June in calendar order.",
            "Write these months in order: June, May, March.",
        ),
    ],
)
def test_the_split_does_not_depend_on_wording_or_order(one: str, other: str) -> None:
    assert parse(one).key == parse(other).key


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("What is 47 plus 85?", "132"),
        ("Subtract 9 from 30.", "21"),
        ("Put 31, 4, 15 in descending order.", "31, 15, 4"),
        ("Yes or no: is 345 less than 354?", "yes"),
        ("Spell PLANET backwards.", "TENALP"),
        ("How many A are there in BANANA?", "3"),
        ("What is the last letter of CASTLE?", "E"),
        ("What do you get when you write SET right after SUN?", "SUNSET"),
        ("What comes next: 3, 7, 11, 15?", "19"),
    ],
)
def test_solve_answers_known_questions(text: str, answer: str) -> None:
    assert solve(text) == answer


def test_solve_rejects_a_question_of_no_family() -> None:
    with pytest.raises(ValueError, match="matches no question family"):
        solve("What is the meaning of life?")


def test_evaluation_sets_are_held_out_and_distinct() -> None:
    asked = evaluation_set(5, seed=3)
    assert len({q.text for q in asked}) == 5 * len(FAMILIES)
    assert all(is_held_out(q) for q in asked)


def test_experts_are_stored_as_mxfp4(
    config: dict[str, Any], tensors: dict[str, tuple[str, list[int]]]
) -> None:
    experts, hidden, inner = (
        config[k] for k in ("num_local_experts", "hidden_size", "intermediate_size")
    )
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.mlp.experts."
        for name, out, inside in (
            ("gate_up_proj", 2 * inner, hidden),
            ("down_proj", hidden, inner),
        ):
            assert tensors[f"{at}{name}_blocks"] == ("U8", [experts, out, inside // 32, 16])
            assert tensors[f"{at}{name}_scales"] == ("U8", [experts, out, inside // 32])
            assert tensors[f"{at}{name}_bias"] == ("BF16", [experts, out])
    packed = ("_blocks", "_scales")
    assert {kind for name, (kind, _) in tensors.items() if not name.endswith(packed)} == {"BF16"}
    assert config["quantization_config"]["quant_method"] == "mxfp4"


def test_sizes_differ_so_that_mixed_up_dimensions_are_detected(config: dict[str, Any]) -> None:
    assert config["model_type"] == "gpt_oss"
    assert not config["tie_word_embeddings"]
    assert config["num_attention_heads"] > config["num_key_value_heads"] > 1
    assert 1 < config["num_experts_per_tok"] < config["num_local_experts"]
    assert config["num_experts_per_tok"] != 4
    assert set(config["layer_types"]) == {"sliding_attention", "full_attention"}
    assert config["hidden_size"] % 32 == config["intermediate_size"] % 32 == 0
    rope = config["rope_scaling"]
    extended = rope["factor"] * rope["original_max_position_embeddings"]
    assert rope["rope_type"] == "yarn"
    assert not rope["truncate"]
    assert extended == config["max_position_embeddings"]


def test_most_questions_are_longer_than_the_window(
    config: dict[str, Any], tokenizer: Tokenizer
) -> None:
    lengths = [len(tokenizer.encode(line).ids) for line in questions()[1]]
    beyond = sum(n > config["sliding_window"] for n in lengths)
    assert beyond > len(lengths) / 2
    assert max(lengths) > config["rope_scaling"]["original_max_position_embeddings"]


def test_stop_tokens_are_those_of_the_harmony_format(tokenizer: Tokenizer) -> None:
    stops = json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"]
    names = {tokenizer.id_to_token(i) for i in stops}
    assert names == {"<|return|>", "<|endoftext|>", "<|call|>"}


def test_any_text_can_be_encoded(config: dict[str, Any], tokenizer: Tokenizer) -> None:
    text = "Ünïcode, 中文, \U0001f600\t\x00 and\nlines <|start|>"
    ids = tokenizer.encode(text).ids
    assert max(ids) < config["vocab_size"] == tokenizer.get_vocab_size()
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_and_capitals_stay_single_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("PLANET 4711").tokens == [*"PLANET", "Ġ", *"4711"]
