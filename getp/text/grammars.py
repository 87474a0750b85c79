"""Where the part of an answer begins that a grammar concerns."""

from collections.abc import Sequence
from dataclasses import replace

from engine import SamplingParams
from getp.text.parts.thinking import ends_with, markers_of
from tokenizer import Tokenizer
from tokenizer.harmony import supports_harmony

# Between them gpt-oss may name the type of the content: `<|channel|>final <|constrain|>json`.
_FINAL_CHANNEL = ("<|channel|>final", "<|message|>")


def after_thinking(
    params: SamplingParams, tokenizer: Tokenizer, prompt_ids: Sequence[int]
) -> SamplingParams:
    """Return the parameters of a chat's answer, whose grammar concerns only what the user reads.

    Thinking may come before, whether the prompt opens it or the model does so itself.
    """
    if params.grammar is None:
        return params

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, special=False))

    opening_id = None
    if supports_harmony(tokenizer):
        after = tuple(map(ids, _FINAL_CHANNEL))
        start = sum(after, ())
        if tuple(prompt_ids[-len(start) :]) == start:
            return params
    else:
        markers = markers_of(tokenizer.template)
        if markers is None or ends_with(markers.end, tokenizer, prompt_ids):
            return params
        after = (ids(markers.end),)
        if not ends_with(markers.start, tokenizer, prompt_ids):
            opening_id, *rest = ids(markers.start)
            if rest and opening_id not in tokenizer.special_ids:
                return params  # a match might begin with the same token
    grammar = replace(params.grammar, after_ids=after, opening_id=opening_id)
    return replace(params, grammar=grammar)
