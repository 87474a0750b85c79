import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from tests.getp.helpers import TEXTS, metaspace, small_tokenizer, write_tokenizer
from tokenizer import Tokenizer, TokenizerError


def test_a_directory_and_its_tokenizer_json_load_the_same_tokenizer(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    for path in (folder, folder / "tokenizer.json", str(folder)):
        tokenizer = Tokenizer.load(path)
        assert tokenizer.stop_ids == {tokenizer.token_id("<eos>")}
        assert tokenizer.template is not None
        for text in TEXTS:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_map_is_used_without_a_tokenizer_config(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    assert len(Tokenizer.load(folder).stop_ids) == 1


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": 3}'])
def test_a_corrupt_tokenizer_raises_a_clear_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a usable"):
        Tokenizer.load(tmp_path)


def test_a_missing_tokenizer_raises_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_corrupt_tokenizer_config_raises_a_clear_error(tmp_path: Path, content: str) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
    ],
)
def test_first_and_last_tokens_are_added_as_in_transformers(
    tmp_path: Path, config: dict[str, bool]
) -> None:
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer.from_str(metaspace().to_str())
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    everything = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(everything))
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ("a bad head", "<s>once", ""):
        assert ours.encode(text) == theirs(text)["input_ids"]
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, special=False) == plain


def test_invalid_text_and_invalid_ids_raise_an_error() -> None:
    tokenizer = small_tokenizer()
    with pytest.raises(TokenizerError, match="cannot be encoded"):
        tokenizer.encode("half a pair: \ud83d")
    with pytest.raises(TokenizerError, match="cannot be decoded"):
        tokenizer.decode([-1])


def test_decoded_text_contains_special_tokens_only_on_request() -> None:
    tokenizer = small_tokenizer()
    ids = [*tokenizer.encode("fox"), *tokenizer.stop_ids]
    assert tokenizer.decode(ids) == "fox"
    assert tokenizer.decode(ids, skip_special=False) == "fox<eos>"
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""


def test_a_panic_of_the_tokenizers_library_becomes_a_tokenizer_error(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["continuing_subword_prefix"] = "longer than any token"
    file.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"not a usable tokenizer\.json.*out of range"):
        Tokenizer.load(file)
