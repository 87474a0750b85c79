"""The tokenizer in the metadata of a GGUF file: its tokens, and how texts are merged from them.

Two kinds are read: byte-level BPE ("gpt2") with its merges, and BPE of SentencePiece ("llama"),
whose merges follow from the scores of the tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from tokenizer.errors import TokenizerError
from tokenizer.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from tokenizer.special_tokens import MAX_TOKENS

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # types of tokens
_NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # so spelled
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
_SENTENCEPIECE_IDS = {"unk_token": 0, "bos_token": 1, "eos_token": 2}  # if a file names none
_SPACE = "▁"  # stands for a space in SentencePiece
_MAX_SENTENCEPIECE = 256  # characters of a token that is merged from others; models have under 100


def build_tokenizer(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer, and the texts of its named tokens (`eos_token`, …). Raises TokenizerError."""
    reader = _Reader(metadata)
    kind = reader.get("model")
    if kind == "gpt2":
        return reader.byte_level()
    if kind == "llama":
        return reader.sentencepiece()
    raise TokenizerError(
        f"tokenizer {kind!r:.60} is not supported; supported: gpt2, llama; give the tokenizer.json "
        "of the original model"
    )


class _Reader:
    """Reads the keys after "tokenizer.ggml."."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        tokens = self.get("tokens")
        if not isinstance(tokens, list) or not tokens:
            raise TokenizerError("'tokenizer.ggml.tokens' must be a list of texts")
        self.tokens: list[str] = tokens
        self.types: Sequence[int] = self._parallel("token_type") or [_NORMAL] * len(tokens)

    def get(self, key: str, default: Any = None) -> Any:
        """A value of any type."""
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def byte_level(self) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
        """A tokenizer of the kind of GPT-2."""
        pre = self._pre_tokenizer()
        merges = self.get("merges")
        if not isinstance(merges, list) or not all(isinstance(m, str) for m in merges):
            raise TokenizerError("'tokenizer.ggml.merges' must be a list of texts")
        spaces = [merge.find(" ", 1) for merge in merges]
        pairs = [(m[:at], m[at + 1 :]) for m, at in zip(merges, spaces, strict=True) if at > 0]
        vocabulary = {
            token: number
            for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind != _UNUSED  # fills up the vocabulary
        }
        backend = tokenizers.Tokenizer(
            models.BPE(vocabulary, pairs, ignore_merges=pre.whole_pieces)
        )
        backend.pre_tokenizer = pre.build()
        normalizer = pre.normalizer()
        if normalizer is not None:
            backend.normalizer = normalizer
        backend.decoder = decoders.ByteLevel()
        self._add_tokens(backend)
        return backend, self._finish(backend, self._named({}), pre.adds_bos)

    def sentencepiece(self) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
        """A tokenizer of the kind of Llama 2 and Gemma."""
        # Tokens of several spaces are stored with spaces, which no text has once they are replaced.
        are_blank = [bool(token) and not token.strip(" ") for token in self.tokens]
        stored = zip(self.tokens, are_blank, strict=True)
        self.tokens = [t.replace(" ", _SPACE) if blank else t for t, blank in stored]
        types = zip(self.types, are_blank, strict=True)
        self.types = [_NORMAL if blank else kind for kind, blank in types]
        named = self._named(_SENTENCEPIECE_IDS)
        vocabulary = {token: number for number, token in enumerate(self.tokens)}
        model = models.BPE(
            vocabulary,
            _merges(vocabulary, self._ranks()),
            unk_token=named.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
        backend = tokenizers.Tokenizer(model)
        has_prefix = bool(self.get("add_space_prefix", True))
        prefix = [normalizers.Prepend(_SPACE)] if has_prefix else []
        backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
        strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        self._add_tokens(backend)
        return backend, self._finish(backend, named, adds_bos=True)

    def _pre_tokenizer(self) -> PreTokenizer:
        name = self.get("pre", "default")
        found = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
        if found is None:
            raise TokenizerError(
                f"pre-tokenizer {name!r:.60} is not supported; supported: "
                f"{', '.join(PRE_TOKENIZERS)}; give the tokenizer.json of the original model"
            )
        return found

    def _parallel(self, key: str) -> Any:
        """A list with one number for each token; None if there is none."""
        found = self.get(key)
        if found is None:
            return None
        if isinstance(found, str | int | float) or len(found) != len(self.tokens):
            raise TokenizerError(f"'tokenizer.ggml.{key}' must have one number for each token")
        return found

    def _ranks(self) -> Sequence[float]:
        """What decides which two pieces of a text become one first: the highest one does."""
        if str(self._metadata.get("general.architecture")).startswith("gemma"):
            return range(0, -len(self.tokens), -1)  # its scores are not in the order of its merges
        scores = self._parallel("scores")
        if scores is None:
            raise TokenizerError("'tokenizer.ggml.scores' is missing")
        ranks: Sequence[float] = scores
        return ranks

    def _named(self, default_ids: Mapping[str, int]) -> dict[str, str]:
        """The texts of the tokens that have a name."""
        found = {}
        for name, key in _NAMES.items():
            number = self.get(key, default_ids.get(name))
            if number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int):
                raise TokenizerError(f"'tokenizer.ggml.{key}' must be a token id")
            if 0 <= number < len(self.tokens):  # llama.cpp ignores others, too
                found[name] = self.tokens[number]
        return found

    def _add_tokens(self, backend: tokenizers.Tokenizer) -> None:
        """Add the tokens that are found in a text before it is divided."""
        added = [
            AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if token and kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
        if len(added) > MAX_TOKENS:
            raise TokenizerError(f"the tokenizer has more than {MAX_TOKENS} added tokens")
        backend.add_tokens(added)

    def _finish(
        self, backend: tokenizers.Tokenizer, named: dict[str, str], adds_bos: bool
    ) -> dict[str, str]:
        """Set which tokens come before and after a text; return the texts of the named tokens."""
        backend.add_special_tokens([AddedToken(text, normalized=False) for text in named.values()])
        before = [named["bos_token"]] if self._adds("bos", adds_bos, named) else []
        after = [named["eos_token"]] if self._adds("eos", False, named) else []
        if before or after:
            backend.post_processor = processors.TemplateProcessing(
                single=[*before, "$A", *after],
                special_tokens=[(t, backend.token_to_id(t)) for t in {*before, *after}],
            )
        return named

    def _adds(self, name: str, default: bool, named: Mapping[str, str]) -> bool:
        return bool(self.get(f"add_{name}_token", default)) and f"{name}_token" in named


def _merges(vocabulary: Mapping[str, int], ranks: Sequence[float]) -> list[tuple[str, str]]:
    """The pairs of tokens that become one, the first ones first, as SentencePiece merges them."""
    found = []
    for token, number in vocabulary.items():
        if len(token) > _MAX_SENTENCEPIECE:
            continue
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        rank = ranks[number]
        found += [(rank, len(first), len(second), first, second) for first, second in known]
    # Stable, so that pairs of equal rank and lengths keep the order of their tokens.
    found.sort(key=lambda entry: entry[:3], reverse=True)
    return [(first, second) for _, _, _, first, second in found]
