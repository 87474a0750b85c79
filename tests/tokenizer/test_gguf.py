"""Tokenizers from the metadata of GGUF files give the ids of the models' own tokenizer.json."""

import json
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

from tests.getp.helpers import TEXTS, byte_level, metaspace
from tokenizer import Tokenizer, TokenizerError

_MORE = [
    "", " ", "  the", "the  the\n\n", "don't I'll WE'RE", "x1234567 12,345.6 $3", "a/b\r\n\tc",
    "Ünïcödé e\u0301 ﷺ", "tHe QUICK brownFox", "ha hb <eos> <s>the", "\u2581the", "🙂🙂",
]  # fmt: skip


def _metadata(backend: tokenizers.Tokenizer, **more: Any) -> dict[str, Any]:
    """The keys of a tokenizer's vocabulary."""
    model = json.loads(backend.to_str())["model"]
    vocabulary = {**model["vocab"], **backend.get_vocab()}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    is_byte = [len(t) == 6 and t.startswith("<0x") for t in tokens]
    given = {
        "tokens": tokens,
        "token_type": [
            3 if t in added else 6 if b else 1 for t, b in zip(tokens, is_byte, strict=True)
        ],
        "merges": [" ".join(pair) for pair in model["merges"]],
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in given.items()}


@pytest.mark.parametrize(
    ("name", "steps", "normalizer"),
    [
        ("gpt-2", [], None),
        ("smollm", [pre_tokenizers.Digits(individual_digits=True)], None),
        ("qwen2", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
         r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", normalizers.NFC()),
        ("llama-bpe", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", None),
        ("tekken", r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
         r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?"
         r"[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+", None),
        ("gpt-4o", r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
         r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
         r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
         r"[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+", None),
    ],
)  # fmt: skip
def test_byte_level(name: str, steps: Any, normalizer: Any) -> None:
    expected = tokenizers.Tokenizer.from_str(byte_level().to_str())
    byte_steps = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not steps)
    if isinstance(steps, str):
        split = pre_tokenizers.Split(Regex(steps), "isolated")
        expected.pre_tokenizer = pre_tokenizers.Sequence([split, byte_steps])
    else:
        last = pre_tokenizers.ByteLevel(add_prefix_space=False)
        expected.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    if normalizer is not None:
        expected.normalizer = normalizer
    more = {"model": "gpt2", "pre": name, "add_bos_token": False, "eos_token_id": 0}
    found = Tokenizer.from_gguf(_metadata(byte_level(), **more), "f.gguf")
    for text in TEXTS + _MORE:
        assert found.encode(text) == expected.encode(text).ids, text
        assert found.decode(found.encode(text), skip_special=False) == (
            text if normalizer is None else normalizer.normalize_str(text)
        )
    assert found.stop_ids == {0}
    assert found.token_id("<eos>") in found.special_ids


@pytest.mark.parametrize("has_prefix", [True, False])
def test_sentencepiece(has_prefix: bool) -> None:
    expected = tokenizers.Tokenizer.from_str(metaspace().to_str())
    if not has_prefix:
        expected.normalizer = normalizers.Replace(" ", "▁")
    pieces = sorted(metaspace().get_vocab().items(), key=lambda entry: entry[1])
    more = {
        "model": "llama",
        "scores": [-float(number) for _, number in pieces],
        "add_space_prefix": has_prefix,
    }
    metadata = _metadata(metaspace(), **more)
    del metadata["tokenizer.ggml.merges"]  # they follow from the scores
    found = Tokenizer.from_gguf(metadata, "f.gguf")
    for text in TEXTS + _MORE:
        assert found.encode(text, special=False) == expected.encode(text).ids, text
    assert found.encode("the")[0] == found.token_id("<s>")
    assert found.decode(found.encode("the abc")) == "the abc"
    assert found.stop_ids == {2}


def test_tokens_of_spaces_and_user_defined_ones() -> None:
    # As Gemma's: ranks follow the positions, several spaces are one token, and "\n\n" another.
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", "  ", "   ", "▁", "a", "b", "▁a"]
    metadata = {
        "general.architecture": "gemma3",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [3, 3, 3, 2, 4, 4, 4, 1, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_space_prefix": False,
    }
    found = Tokenizer.from_gguf(metadata, "f.gguf")
    assert found.encode("a   a b\n\nb") == [2, 8, 6, 8, 7, 9, 4, 9]
    assert found.decode([8, 6, 8]) == "a   a"
    assert 4 not in found.special_ids


def test_a_token_before_and_after_each_text() -> None:
    metadata = _metadata(
        byte_level(), model="gpt2", pre="llama-bpe", bos_token_id=1, eos_token_id=0,
        add_eos_token=True,
    )  # fmt: skip
    found = Tokenizer.from_gguf(metadata, "f.gguf")
    assert found.encode("") == [1, 0]
    assert found.encode("", special=False) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer 'bert' is not supported; supported: gpt2, llama"),
        ({"model": None}, "tokenizer None is not supported"),
        ({"pre": "glm4"}, "pre-tokenizer 'glm4' is not supported; supported: default"),
        ({"merges": None}, "'tokenizer.ggml.merges' must be"),
        ({"merges": ["a nothing"]}, "its tokenizer cannot be used"),
        ({"tokens": None}, "'tokenizer.ggml.tokens' must be"),
        ({"token_type": [1]}, "'tokenizer.ggml.token_type' must have one number for each token"),
        ({"eos_token_id": "x"}, "'tokenizer.ggml.eos_token_id' must be a token id"),
        ({"model": "llama"}, "'tokenizer.ggml.scores' is missing"),
    ],
)
def test_what_is_not_understood_is_refused(changes: dict[str, Any], message: str) -> None:
    metadata = _metadata(byte_level(), **{"model": "gpt2", "pre": "gpt-2", **changes})
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(TokenizerError, match=r"^f\.gguf: ") as raised:
        Tokenizer.from_gguf(metadata, "f.gguf")
    assert message in str(raised.value)
