"""Tokens that the files beside tokenizer.json add to it, or call special.

Which file counts, and which ids new tokens get, is as in transformers 5 for fast tokenizers:
`added_tokens_decoder` of tokenizer_config.json, or without it special_tokens_map.json and
added_tokens.json; in addition the named tokens (`eos_token`, …) and the extra special tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import AddedToken

from tokenizer.errors import TokenizerError

# The order in which named tokens get new ids; names of a model's own follow.
_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
MAX_TOKENS = 100_000  # the time to add them grows with their square; models have up to 30,000


@dataclass
class _Found:
    """What the files say."""

    named: dict[str, AddedToken] = field(default_factory=dict)  # eos_token → its token
    extra: list[AddedToken] = field(default_factory=list)
    by_id: dict[int, AddedToken] = field(default_factory=dict)

    def read(self, config: Mapping[str, Any]) -> None:
        """Read the named and the extra tokens of tokenizer_config.json or special_tokens_map.json.

        Of these two, the one read later counts.
        """
        for name, value in config.items():
            token = _token(value)
            if name.endswith("_token") and token is not None:
                self.named[name] = token
        extra = config.get("extra_special_tokens")
        extra = extra or (not self.extra and config.get("additional_special_tokens")) or []
        if isinstance(extra, Mapping):  # further names
            tokens = {str(name): _token(value) for name, value in extra.items()}
            self.named |= {name: token for name, token in tokens.items() if token is not None}
        elif isinstance(extra, list):
            self.extra += [token for token in map(_token, extra) if token is not None]


def add_special_tokens(
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    special_tokens_map: Mapping[str, Any],
    added_tokens: Mapping[str, Any],
) -> dict[str, str]:
    """Add the tokens that only these files have; return the text of the named tokens.

    The arguments are the contents of tokenizer_config.json, special_tokens_map.json and
    added_tokens.json, empty without the file. A token with a name becomes special. Raises
    TokenizerError.
    """
    own = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    found = _read(backend, config, special_tokens_map, added_tokens)
    new = {token.content: token for _, token in sorted(found.by_id.items())}
    names = {token.content for token in found.named.values()}
    first = {f"{name}_token": i for i, name in enumerate(_NAMES)}
    for name in sorted(found.named, key=lambda name: first.get(name, len(first))):
        token = found.named[name]
        new.setdefault(token.content, own.get(token.content, token))
    for token in found.extra:
        if token.content not in own:
            new.setdefault(token.content, token)
    for text, token in new.items():
        # A token that tokenizer.json calls special is skipped in answers whatever others say.
        is_special = text in own and own[text].special
        token.special = token.special or text in names or is_special
    if len(new) > MAX_TOKENS:
        raise TokenizerError(f"the tokenizer has more than {MAX_TOKENS} added tokens")
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    new.pop("", None)
    backend.add_tokens([token for text, token in new.items() if known.get(text) != token])
    return {name: token.content for name, token in found.named.items()}


def _read(
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    special_tokens_map: Mapping[str, Any],
    added_tokens: Mapping[str, Any],
) -> _Found:
    found = _Found()
    if backend.padding and "pad_token" not in config:
        found.named["pad_token"] = AddedToken(backend.padding["pad_token"], special=True)
    found.read(config)
    if "added_tokens_decoder" in config:
        found.by_id = _decoder(config["added_tokens_decoder"])
        return found
    found.read(special_tokens_map)
    special = {token.content for token in (*found.named.values(), *found.extra)}
    for text, token_id in added_tokens.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise TokenizerError(f"added_tokens.json: {text!r} must have an id, not {token_id!r}")
        is_special = text in special
        found.by_id[token_id] = AddedToken(text, special=is_special, normalized=not is_special)
    found.by_id |= backend.get_added_tokens_decoder()
    return found


def _decoder(values: Any) -> dict[int, AddedToken]:
    """The tokens of `added_tokens_decoder` by their ids."""
    found = {}
    for token_id, entry in values.items() if isinstance(values, Mapping) else [("", values)]:
        token = _token(entry, special=False) if isinstance(entry, Mapping) else None
        if token is None or not str(token_id).isdecimal():
            raise TokenizerError(
                "tokenizer_config.json: 'added_tokens_decoder' must map ids to tokens, not "
                f"{token_id!r} to {str(entry)[:60]}"
            )
        found[int(token_id)] = token
    return found


def _token(value: Any, special: bool = True) -> AddedToken | None:
    """A token of its text, or of an object with a "content" and flags; None for anything else.

    special: whether it is special if the object does not say so.
    """
    value = {"content": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        return None
    flags = {"special": special}
    for key in ("single_word", "lstrip", "rstrip", "normalized", "special"):
        if isinstance(value.get(key), bool):
            flags[key] = value[key]
    return AddedToken(value["content"], **flags)
