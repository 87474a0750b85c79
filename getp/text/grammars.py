"""Where the part of an answer begins that a grammar concerns."""

from collections.abc import Sequence
from dataclasses import replace

from engine import SamplingParams
from getp.text.parts.thinking import is_open, markers_of
from tokenizer import Tokenizer
from tokenizer.harmony import supports_harmony

_FINAL_CHANNEL = "<|channel|>final<|message|>"


def after_thinking(
    params: SamplingParams, tokenizer: Tokenizer, prompt_ids: Sequence[int]
) -> SamplingParams:
    """Return the parameters of a chat's answer, whose grammar concerns only what the user reads."""
    if params.grammar is None:
        return params
    before = _FINAL_CHANNEL
    if not supports_harmony(tokenizer):
        markers = markers_of(tokenizer.template)
        if markers is None or not is_open(markers, tokenizer, prompt_ids):
            return params
        before = markers.end
    start = tuple(tokenizer.encode(before, special=False))
    if tuple(prompt_ids[-len(start) :]) == start:
        return params
    return replace(params, grammar=replace(params.grammar, after_ids=start))
