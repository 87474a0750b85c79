"""The ids of the tokens that end an answer."""

from model.gguf.header import Gguf

# Files name one or two of those that a generation_config.json would list; llama.cpp, too, finds the
# others by their texts.
_STOPS = frozenset(
    """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> <|eom_id|>
    <|end_of_text|> <EOT> <end_of_utterance>""".split()
)
_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_LISTS = ("tokens", "token_type")
_CONTROL = 3  # the type of special tokens


def stop_ids(gguf: Gguf) -> list[int]:
    """Those that the file names, and special tokens with a known text. Raises CheckpointError."""
    found = set()
    for key in (f"tokenizer.ggml.{name}" for name in _KEYS):
        value = gguf.metadata.get(key)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool):
                raise gguf.fail(f"'{key}' must be a token id, not {value!r:.60}")
            found.add(value)
    tokens, types = (gguf.metadata.get(f"tokenizer.ggml.{key}", ()) for key in _LISTS)
    for key, value in zip(_LISTS, (tokens, types), strict=True):
        if isinstance(value, str | int | float):
            raise gguf.fail(f"'tokenizer.ggml.{key}' must be a list, not {value!r:.60}")
    by_text = {
        token: number
        for number, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == _CONTROL and token in _STOPS
    }
    if "<|return|>" in by_text:  # in gpt-oss, <|end|> ends one of several messages
        by_text.pop("<|end|>", None)
    return sorted({*found, *by_text.values()})
