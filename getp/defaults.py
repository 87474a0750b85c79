"""The sampling and the length of requests that do not set their own.

Each value comes from the first of these that has it: the request, an option, the checkpoint's
generation_config.json, the format of the request.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine import SamplingParams
from getp.errors import NameOf

DEFAULT_MAX_LENGTH = 1024  # tokens, prompt included: of a text prompt
DEFAULT_NEW_TOKENS = 4096  # of an answer to a JSONL request
NO_LIMIT = 1 << 60  # stands for "no limit" where token counts are compared

Origin = Literal["option", "checkpoint"]
"""Where a value that comes before the format's own was set."""

FormatValues = Mapping[str, Any]
"""A format's own values, by field of SamplingParams; the others are those of SamplingParams."""

TEXT: FormatValues = {"max_positions": DEFAULT_MAX_LENGTH}
CHAT: FormatValues = {}  # each turn makes a conversation longer
JSONL: FormatValues = {"max_new_tokens": DEFAULT_NEW_TOKENS}
OPENAI: FormatValues = {**JSONL, "temperature": 1.0}

_SHOWN = ("temperature", "top_p", "top_k")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
SAMPLING = (*_SHOWN, "min_p", *_PENALTIES)
"""Fields of SamplingParams that options and generation_config.json can set, besides lengths."""


@dataclass(frozen=True)
class Defaults:
    """The values of options and of the checkpoint, and where each of them was set."""

    params: SamplingParams
    origins: Mapping[str, Origin] | None = None  # by field; None: every field is set

    def is_set(self, name: str) -> bool:
        """Return whether an option or the checkpoint sets this field."""
        return self.origins is None or name in self.origins

    def fill(self, own: FormatValues) -> SamplingParams:
        """Return the parameters of a request that sets none, in a format with these values."""
        return replace(self.params, **{name: own[name] for name in own if not self.is_set(name)})


def describe(
    defaults: Defaults, own: FormatValues, openai: FormatValues | None, name_of: NameOf, seed: str
) -> str:
    """Return the values that hold and where each comes from, as one line for the user.

    openai: the values of OpenAI's requests in an input that also has others, or None. seed: the
    seed and its origin, shown if tokens are sampled.
    """
    params = defaults.fill(own)

    def origin(name: str) -> str:
        found = (defaults.origins or {}).get(name)
        if found == "checkpoint":
            return "generation_config.json"
        return name_of(name) if found == "option" else "default"

    def has_effect(name: str) -> bool:
        return bool(getattr(params, name) != getattr(SamplingParams(), name))

    values = {name: f"{getattr(params, name):g}" for name in _SHOWN}
    if params.min_p:
        values["min_p"] = f"{params.min_p:g}"
    notes = {"temperature": "greedy, " if params.temperature == 0 else ""}
    notes["top_k"] = "all tokens, " if params.top_k == 0 else ""
    if openai is not None and (theirs := defaults.fill(openai).temperature) != params.temperature:
        values["temperature"] = f"{theirs:g} in OpenAI's format, otherwise {values['temperature']}"
    if openai is None and params.temperature == 0:  # the others have no effect
        values, seed = {"temperature": values["temperature"]}, ""
    values |= {name: f"{getattr(params, name):g}" for name in _PENALTIES if has_effect(name)}
    parts = [
        f"{name} {value} ({notes.get(name, '')}{origin(name)})" for name, value in values.items()
    ]
    parts += [f"seed {seed}"] if seed else []
    limits = []
    if params.min_new_tokens:
        limits.append(f"at least {params.min_new_tokens} tokens ({origin('min_new_tokens')})")
    if params.max_new_tokens is not None:
        limits.append(f"at most {params.max_new_tokens} new tokens ({origin('max_new_tokens')})")
    if params.max_positions is not None:
        shown = f"at most {params.max_positions} tokens, prompt included"
        limits.append(f"{shown} ({origin('max_positions')})")
    else:
        within = origin("max_positions") if defaults.is_set("max_positions") else ""
        words = "within" if limits else "length up to"
        limits.append(f"{words} the model's limit" + (f" ({within})" if within else ""))
    length = ", ".join(limits)
    start = "" if openai is None else "unless a request sets its own: "
    return f"{start}{', '.join(parts)}; {length}"
