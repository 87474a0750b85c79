"""How byte-level tokenizers divide a text before its pieces are merged, by the names of GGUF files.

The names are those of llama.cpp's converter, which tells tokenizers apart by a test text; the
expressions are those of the models' own tokenizer.json.
"""

from typing import NamedTuple

from tokenizers import Regex, normalizers, pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASH_TAIL}"
_GPT4O = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_SLASH_TAIL}"
)


class PreTokenizer(NamedTuple):
    """How a tokenizer divides texts, and what else goes with its name."""

    patterns: tuple[str, ...]  # each divides the pieces of the one before
    whole_pieces: bool = False  # a piece that is a token is not merged from smaller ones
    adds_bos: bool = False  # if the file does not say so
    composes: bool = False  # Unicode normal form C comes first

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The pre-tokenizer of the tokenizers library."""
        splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in self.patterns]
        bytes_of_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, bytes_of_characters])

    def normalizer(self) -> "normalizers.Normalizer | None":
        """The normalizer that comes before it."""
        return normalizers.NFC() if self.composes else None


_LIKE_LLAMA3 = PreTokenizer((_LLAMA3,), whole_pieces=True, adds_bos=True)
_LIKE_GPT2 = PreTokenizer((_GPT2,))
_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
_LIKE_QWEN2 = PreTokenizer((_QWEN2,), composes=True)
_LIKE_GPT4O = PreTokenizer((_GPT4O,))
PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "olmo"), _LIKE_GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _DIGITS_GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LIKE_LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), PreTokenizer((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _LIKE_QWEN2),
    "stablelm2": PreTokenizer((_QWEN2,)),
    "tekken": PreTokenizer((_TEKKEN,), whole_pieces=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _LIKE_GPT4O),
}
"""The names that are known."""
