"""Tokens that only the files beside tokenizer.json define, compared with transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers as tf
from tokenizers import AddedToken

from getp.fingerprint import of_tokenizer
from tests.getp.helpers import byte_level
from tokenizer import Tokenizer, TokenizerError

# tokenizer.json: 320 tokens, of which <eos>, <bos> and six markers are special; <think> is added.
BASE = 321
TEXTS = (
    "the quick <new> brown <eos>fox",
    " <think> hm</think>the <|im_end|>quick",
    "<a><b> <c>brown  <think>  the the",
    "the<pad><image>fox<eos> <|start|>",
)


def write(folder: Path, files: dict[str, Any], changes: dict[str, Any] | None = None) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level().to_str())
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    content = json.loads(backend.to_str()) | (changes or {})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | files.pop("tokenizer_config", {})
    for name, values in {"tokenizer_config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(values))


def entry(content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": content, "special": special, **plain, **flags}


CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "an ordinary token is named": {"tokenizer_config": {"eos_token": "the"}},
    "an added token is named": {"tokenizer_config": {"eos_token": "<think>"}},
    "new names, in an order of their own": {
        "tokenizer_config": {"eos_token": "<new>", "pad_token": "<pad>", "bos_token": "<b>"}
    },
    "a name with flags": {
        "tokenizer_config": {"eos_token": {"__type": "AddedToken", **entry("<a>", rstrip=True)}}
    },
    "the decoder calls an added token special": {
        "tokenizer_config": {"added_tokens_decoder": {"320": entry("<think>")}}
    },
    "the decoder calls an ordinary token special": {
        "tokenizer_config": {"added_tokens_decoder": {"300": entry("the")}}
    },
    "the decoder calls a special token ordinary": {
        "tokenizer_config": {"added_tokens_decoder": {"0": entry("<eos>", special=False)}}
    },
    "the decoder has new tokens": {
        "tokenizer_config": {
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {
                "322": entry("</think>", special=False),
                "321": entry("<|im_end|>", special=False),
                "323": entry("<new>", lstrip=True, rstrip=True),
            },
        },
        "added_tokens": {"<c>": BASE},
        "special_tokens_map": {"eos_token": "<c>", "pad_token": "<pad>"},
    },
    "the decoder has ids with a gap": {
        "tokenizer_config": {"added_tokens_decoder": {"400": entry("<b>"), "390": entry("<a>")}}
    },
    "only special_tokens_map.json": {
        "special_tokens_map": {"eos_token": {**entry("the"), "special": False}, "pad_token": "<a>"}
    },
    "special_tokens_map.json against the config": {
        "tokenizer_config": {"eos_token": "<a>", "bos_token": "<b>"},
        "special_tokens_map": {"eos_token": "<eos>"},
    },
    "added_tokens.json": {
        "tokenizer_config": {"eos_token": "<new>"},
        "added_tokens": {"<a>": BASE + 1, "<new>": BASE, "<b>": BASE + 2},
        "special_tokens_map": {"pad_token": "<pad>", "extra_special_tokens": ["<b>", "<think>"]},
    },
    "extra special tokens": {
        "tokenizer_config": {"extra_special_tokens": ["<a>", "the", "<think>", "<eos>"]}
    },
    "additional special tokens": {
        "tokenizer_config": {
            "additional_special_tokens": ["<a>", {"__type": "AddedToken", **entry("<b>")}]
        }
    },
    "extra special tokens with names": {
        "tokenizer_config": {
            "extra_special_tokens": {"image_token": "<image>", "think_token": "<think>"},
            "boi_token": "<a>",
        }
    },
    "special tokens are split": {"tokenizer_config": {"split_special_tokens": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_of_every_file_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    write(tmp_path, json.loads(json.dumps(CASES[case])))
    ours = Tokenizer.load(tmp_path)
    theirs = tf.AutoTokenizer.from_pretrained(str(tmp_path))
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    for token_id in range(ours.vocab_size):
        shown = theirs.decode([token_id], skip_special_tokens=True)
        is_special = not shown and bool(theirs.decode([token_id]))
        assert (token_id in ours.special_ids) == is_special, token_id
    assert ours.special_tokens == {
        k: str(v) for k, v in theirs.special_tokens_map.items() if k != "extra_special_tokens"
    }
    assert ours.stop_ids == ({theirs.eos_token_id} - {None})


def test_the_padding_token_of_tokenizer_json_is_a_special_token(tmp_path: Path) -> None:
    padding: dict[str, Any] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
    }
    padding |= {"pad_id": 321, "pad_type_id": 0, "pad_token": "<pad>"}
    write(tmp_path, {}, {"padding": padding})
    ours = Tokenizer.load(tmp_path)
    theirs = tf.AutoTokenizer.from_pretrained(str(tmp_path))
    assert ours.special_tokens["pad_token"] == theirs.pad_token == "<pad>"
    assert ours.encode(TEXTS[3]) == theirs(TEXTS[3])["input_ids"]


def test_a_named_token_is_skipped_even_if_the_decoder_omits_it(tmp_path: Path) -> None:
    config = {"eos_token": "<think>", "added_tokens_decoder": {"0": entry("<eos>")}}
    write(tmp_path, {"tokenizer_config": config})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the<think>")) == "the"
    assert tokenizer.stop_ids == {320}


def test_an_added_token_that_special_tokens_map_lists_is_skipped(tmp_path: Path) -> None:
    names = {"additional_special_tokens": ["<a>"]}  # transformers 5 reads them too late
    write(tmp_path, {"added_tokens": {"<a>": BASE, "<b>": BASE + 1}, "special_tokens_map": names})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the<a><b>")) == "the<b>"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"tokenizer_config": {"added_tokens_decoder": {"x": entry("<a>")}}},
            "must map ids to tokens",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": {"5": "<a>"}}}, "must map ids to tokens"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "must map ids to tokens"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"5": {"text": "a"}}}},
            "must map ids to tokens",
        ),
        ({"added_tokens": {f"<{i}>": i for i in range(100_001)}}, "more than 100000 added tokens"),
        ({"added_tokens": {"<a>": "321"}}, "'<a>' must have an id, not '321'"),
    ],
)
def test_malformed_tokens_are_a_clear_error(
    files: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write(tmp_path, dict(files))
    with pytest.raises(TokenizerError, match=words):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"],
)
def test_every_file_with_tokens_is_part_of_the_fingerprint(name: str, tmp_path: Path) -> None:
    write(tmp_path, {})
    before = of_tokenizer(tmp_path)
    with open(tmp_path / name, "a") as file:
        file.write(" ")
    assert of_tokenizer(tmp_path) != before
