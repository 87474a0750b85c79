"""A checkpoint's tokenizer: its tokenizer.json and the small files that lie beside it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from tokenizer.chat import ChatTemplate
from tokenizer.errors import TokenizerError

_LARGEST_JSON = 64 << 20  # bytes; tokenizer_config.json may list every added token


class Tokenizer:
    """Encodes and decodes as `transformers` does with the same files.

    `special_tokens` maps names to text (`bos_token`: `<s>`), `template` is the chat template or
    None, `stop_ids` holds the id of the end-of-sequence token, if there is one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        # A prompt is never cut or padded, whatever the file was last saved with.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.template = template
        self.special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        eos_id = self.token_id(self.special_tokens.get("eos_token", ""))
        self.stop_ids = frozenset() if eos_id is None else frozenset({eos_id})

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a directory with a tokenizer.json, or such a file by its own name.

        tokenizer_config.json, special_tokens_map.json and chat_template.jinja beside it are
        used where they exist. What goes before and after a text is tokenizer.json's to say, as
        in transformers 5: `add_bos_token` in the config counts for nothing. Raises
        TokenizerError.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(f"no tokenizer here: {file} does not exist")
        with _library(f"{file} is not a usable tokenizer.json"):
            backend = tokenizers.Tokenizer.from_file(str(file))
        folder = file.parent
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(_read_json(folder / "special_tokens_map.json"))
        special_tokens |= _special_tokens(config)
        return cls(backend, special_tokens, ChatTemplate.load(folder, config, special_tokens))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token(self) -> int:
        """Bytes that no token's text exceeds, as the vocabulary writes it."""
        return max(len(token.encode()) for token in self._backend.get_vocab(with_added_tokens=True))

    def knows(self, token_id: int) -> bool:
        """Whether there is a token with this id, from 0 and of at most 32 bits."""
        return self._backend.id_to_token(token_id) is not None

    def token_id(self, token: str) -> int | None:
        """Return the id of exactly this token, or None."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the ids of `text`.

        `special` adds what the tokenizer puts around a text (Llama's first token, say). Text
        from a chat template has it already: pass False. Raises TokenizerError.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text cannot be encoded: character {error.start} is half of a surrogate pair"
            ) from None
        with _library("the text cannot be encoded"):
            return self._backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of `ids`; ids without a token give nothing. Raises TokenizerError."""
        with _library("the token ids cannot be decoded"):  # below 0 or above 32 bits
            return self._backend.decode(ids, skip_special_tokens=skip_special)


@contextmanager
def _library(trouble: str) -> Iterator[None]:
    """Make a TokenizerError of what the library raises: mostly bare Exception.

    Where its Rust panics it raises a class of its own that is no Exception and has no name to
    import.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{trouble}: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`, empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise TokenizerError(f"{file} is larger than {_LARGEST_JSON} bytes")
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{file} must hold a JSON object")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the `…_token` entries; each is a string, or an object with the string inside."""
    found = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found
