"""A checkpoint's tokenizer: tokenizer.json and the configuration files beside it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from tokenizer.chat import ChatTemplate
from tokenizer.errors import TokenizerError
from tokenizer.files import read_file
from tokenizer.gguf import build_tokenizer
from tokenizer.special_tokens import add_special_tokens

_MAX_TOKENIZER = 256 << 20  # bytes of tokenizer.json; the largest on the Hub have 35 MB
_MAX_JSON = 64 << 20  # bytes; tokenizer_config.json may list every added token


class Tokenizer:
    """Encodes and decodes text, with the same results as `transformers` on the same files.

    `special_tokens` maps names to text (`bos_token`: `<s>`), `template` is the chat template or
    None, `special_ids` holds the ids of all special tokens, and `stop_ids` holds the id of the
    end-of-sequence token, or is empty without one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        # Prompts are never truncated or padded, even if tokenizer.json asks for it.
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
        """Load a tokenizer from a directory with a tokenizer.json, or from that file itself.

        tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat_template.jinja in
        the same directory are used if they exist. As in transformers 5, only tokenizer.json decides
        which tokens are added before and after a text; `add_bos_token` in the config is ignored.
        Raises TokenizerError.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        content = read_file(file, _MAX_TOKENIZER)
        if content is None:
            raise TokenizerError(f"tokenizer not found: {file} does not exist")
        with _converted_errors(f"{file} is not a usable tokenizer.json"):
            backend = tokenizers.Tokenizer.from_buffer(content)
        folder = file.parent
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = add_special_tokens(
            backend,
            config,
            _read_json(folder / "special_tokens_map.json"),
            _read_json(folder / "added_tokens.json"),
        )
        backend.encode_special_tokens = config.get("split_special_tokens") is True
        return cls(backend, special_tokens, ChatTemplate.load(folder, config, special_tokens))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str | Path) -> "Tokenizer":
        """The tokenizer and the chat template in the metadata of a GGUF file.

        source: the file, for messages. Raises TokenizerError.
        """
        try:
            with _converted_errors("its tokenizer cannot be used"):
                backend, special_tokens = build_tokenizer(metadata)
        except TokenizerError as error:
            raise TokenizerError(f"{source}: {error}") from error
        text = metadata.get("tokenizer.chat_template")
        template = ChatTemplate(text, special_tokens) if isinstance(text, str) else None
        return cls(backend, special_tokens, template)

    def to_json(self) -> str:
        """Return the content of a tokenizer.json, added tokens included."""
        return self._backend.to_str()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added tokens."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def max_token_bytes(self) -> int:
        """Length in bytes of the longest token, as written in the vocabulary."""
        return max(len(token.encode()) for token in self._backend.get_vocab(with_added_tokens=True))

    def has_id(self, token_id: int) -> bool:
        """Whether a token has this id. The id must be from 0 to 2**32 - 1."""
        return self._backend.id_to_token(token_id) is not None

    def token_id(self, token: str) -> int | None:
        """Return the id of this exact token, or None if it is not in the vocabulary."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the token ids of `text`.

        `special` adds the special tokens that the tokenizer puts around a text, such as Llama's
        BOS token. Pass False for text from a chat template, which already contains them. Raises
        TokenizerError.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text cannot be encoded: character {error.start} is half of a surrogate pair"
            ) from None
        with _converted_errors("the text cannot be encoded"):
            return self._backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of `ids`, skipping ids that no token has. Raises TokenizerError."""
        with _converted_errors("the token ids cannot be decoded"):  # an id outside 0…2**32 - 1
            return self._backend.decode(ids, skip_special_tokens=skip_special)


@contextmanager
def _converted_errors(problem: str) -> Iterator[None]:
    """Convert exceptions of the tokenizers library to TokenizerError.

    The library mostly raises plain Exception. When its Rust code panics, it raises a
    PanicException, which cannot be imported and is not derived from Exception.
    """
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{problem}: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`, or an empty one if the file does not exist."""
    content = read_file(file, _MAX_JSON)
    if content is None:
        return {}
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{file} must contain a JSON object")
    return value
