"""Checks the arguments of an LLM's methods and brings them into one form."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from reprlib import repr  # long values are shortened
from typing import Any

from engine import SamplingParams
from getp.openai.body import read_body
from getp.openai.parsed import BadRequestError
from tokenizer import Message

Prompt = str | Sequence[int]
"""A text, or token ids."""


def _is_token_ids(value: Any) -> bool:
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__getitem__"):
        return False
    return len(value) > 0 and isinstance(value[0], Integral)


def _without_arrays(value: Any) -> Any:
    """Return an array or a tensor as a list, and anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def list_of_prompts(given: Any) -> list[Prompt]:
    """Return the prompts as a list. Raises TypeError."""
    given = _without_arrays(given)
    if isinstance(given, str) or _is_token_ids(given):
        return [given]
    if isinstance(given, (bytes, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(f"prompts must be a text or a list of texts, not {repr(given)}")
    prompts = [_without_arrays(prompt) for prompt in given]
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not _is_token_ids(prompt):
            remedy = ": use chat() for messages" if isinstance(prompt, Mapping) else ""
            raise TypeError(
                f"prompt {number} must be a text or a list of token ids, not {repr(prompt)}{remedy}"
            )
    return prompts


def list_of_conversations(given: Any) -> list[Sequence[Message]]:
    """Return the conversations as a list. Raises TypeError."""
    wanted = 'a list of messages such as {"role": "user", "content": "Hello"}'
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(f"messages must be {wanted}, or a list of such lists, not {repr(given)}")
    entries = list(given)
    if entries and all(isinstance(entry, Mapping) for entry in entries):
        entries = [entries]
    for number, entry in enumerate(entries):
        is_list = isinstance(entry, (list, tuple))
        if not is_list or not all(isinstance(turn, Mapping) for turn in entry):
            raise TypeError(f"conversation {number} must be {wanted}, not {repr(entry)}")
    return entries


def params_for_each(given: Any, default: SamplingParams, count: int) -> list[SamplingParams]:
    """Return the sampling parameters of each of `count` prompts. Raises TypeError, ValueError."""
    if given is None:
        given = default
    if isinstance(given, SamplingParams):
        return [given] * count
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"sampling_params must be SamplingParams, not {repr(given)}")
    for each in given:
        if not isinstance(each, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, not {repr(each)}")
    if len(given) != count:
        raise ValueError(
            f"there must be as many sampling_params as prompts: {len(given)} for {count}"
        )
    return list(given)


def tuple_of_stops(given: Any) -> tuple[str, ...]:
    """Return the stop strings. Raises TypeError, ValueError."""
    stops = (given,) if isinstance(given, str) else given
    if not isinstance(stops, (list, tuple)) or not all(isinstance(text, str) for text in stops):
        raise TypeError(f"stop must be a text or a list of texts, not {repr(given)}")
    if "" in stops:
        raise ValueError("stop must not be empty")
    return tuple(stops)


def check_samples(n: Any, params: Sequence[SamplingParams]) -> None:
    """Raise TypeError or ValueError for a number of samples that cannot be meant."""
    if not isinstance(n, int):
        raise TypeError(f"n must be an integer, not {repr(n)}")
    if n < 1:
        raise ValueError(f"n must be 1 or more, not {n}")
    if n > 1 and any(each.temperature == 0 for each in params):
        raise ValueError(
            f"n={n} needs a temperature above 0: at temperature 0 all answers are the same"
        )


def template_variables(given: Any) -> dict[str, Any]:
    """Return more variables of the chat template. Raises TypeError."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TypeError(
            'chat_template_kwargs must be a dict such as {"enable_thinking": False}, not '
            f"{repr(given)}"
        )
    return dict(given)


def tool_fields(tools: Any, choice: Any) -> dict[str, Any]:
    """Return the fields of a request with these tools. Raises TypeError, ValueError."""
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Iterable):
        raise TypeError(f"tools must be a list of tools, not {repr(tools)}")
    found = {"tools": list(tools), "tool_choice": choice}
    try:
        read_body({"messages": [{"role": "user", "content": "-"}], **found}, chat=True)
    except BadRequestError as error:
        raise ValueError(str(error)) from None
    return found
