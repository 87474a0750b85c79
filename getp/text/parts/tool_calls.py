"""Finds the calls of tools in the text of an answer.

Which format a model writes is told by the first marker in the list below that its chat template
mentions. A call that cannot be read stays text.
"""

from collections.abc import Callable
from dataclasses import dataclass

from getp.text.parts.thinking import partial_length
from getp.text.parts.tool_bodies import (
    Schemas,
    ToolCall,
    read_deepseek,
    read_gemma,
    read_json,
    read_kimi,
    read_known,
    read_mistral,
    read_tagged,
)
from tokenizer import ChatTemplate, TemplateError
from tokenizer.harmony import FINAL, ChannelText

CALLS = "commentary"
"""The channel of calls, as that of gpt-oss."""


@dataclass(frozen=True)
class ToolFormat:
    """How a family writes calls: the markers around them, and what is between."""

    begin: str
    end: str | None  # None: a call goes on to the end of the answer
    read: Callable[[str, Schemas], list[ToolCall] | None]
    bare: str | None = None  # an answer that begins with this character is a call, too
    mentions: tuple[str, ...] = ()  # what a template of this format has besides the marker
    inside: tuple[str, ...] = ()  # markers between, which may be special tokens


_FORMATS = (
    ToolFormat("<tool_call>", "</tool_call>", read_tagged),  # Hermes, Qwen, GLM, SmolLM3
    ToolFormat("<seed:tool_call>", "</seed:tool_call>", read_tagged),
    ToolFormat("<minimax:tool_call>", "</minimax:tool_call>", read_tagged),
    ToolFormat("[TOOL_CALLS]", None, read_mistral, inside=("[ARGS]", "[CALL_ID]")),
    ToolFormat(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        read_deepseek,
        inside=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    ),
    ToolFormat(
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        read_kimi,
        inside=("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ),
    ToolFormat("<|tool_call>", "<tool_call|>", read_gemma, inside=('<|"|>',)),
    ToolFormat("<|tool_call|>", "<|/tool_call|>", read_json),  # Phi-4-mini
    ToolFormat(
        "<|python_tag|>", None, read_known, bare="{", mentions=('"parameters": dictionary',)
    ),  # Llama 3
)

FORCED = ToolFormat("[", None, read_json, bare="[")
"""How an answer is read whose grammar makes it a list of calls, whatever the model's format."""


def format_of(template: ChatTemplate | None) -> ToolFormat | None:
    """Return the format of calls that a template mentions; None for a model without one."""
    if template is None:
        return None
    try:
        source = template.source
    except TemplateError:
        return None
    marked = (each for each in _FORMATS if any(m in source for m in (each.begin, *each.mentions)))
    return next(marked, None)


class ToolCallParser:
    """Separates calls of tools from the text around them.

    White space next to a call is left out. Each call is returned as a whole.
    """

    def __init__(self, form: ToolFormat, schemas: Schemas) -> None:
        self._form, self._schemas = form, schemas
        self._begin: str | None = None  # what began the call that is being read
        self._before = ""  # the white space before it
        self._held = ""
        self._is_start = True  # no text so far
        self._after_call = False
        self._calls = 0

    def push(self, text: str) -> list[ChannelText]:
        """Add the next piece of the text; return what is certain."""
        self._held += text
        pieces: list[ChannelText] = []
        while True:
            if self._begin is None:
                pieces += self._text()
            if self._begin is None or not self._has_end():
                return pieces
            body, _, rest = self._held.partition(self._form.end or "")
            pieces += self._call(body, self._form.end or "")
            self._held = rest

    def flush(self) -> list[ChannelText]:
        """Return the text held back; call it at the end of the text."""
        held, self._held = self._held, ""
        if self._begin is not None:
            return self._call(held, "")
        text = held.lstrip() if self._after_call else held
        return [ChannelText(FINAL, text)] if text else []

    def _has_end(self) -> bool:
        return self._form.end is not None and self._form.end in self._held

    def _text(self) -> list[ChannelText]:
        """Return the text before the next call; what may belong to one is held."""
        if self._after_call:
            self._held = self._held.lstrip()
        held, begin = self._held, self._form.begin
        if self._is_start and self._form.bare and held.lstrip()[:1] == self._form.bare:
            self._begin, text = "", held[: len(held) - len(held.lstrip())]
        elif begin in held:
            text, _, held = held.partition(begin)
            self._begin = begin
        else:
            text = held[: len(held) - partial_length(held, begin)]
        shown = text.rstrip()
        if self._begin is None:
            self._held = held[len(shown) :]
        else:
            self._before, self._held = (
                text[len(shown) :],
                held.lstrip() if not self._begin else held,
            )
        if not shown:
            return []
        self._is_start = self._after_call = False
        return [ChannelText(FINAL, shown)]

    def _call(self, body: str, end: str) -> list[ChannelText]:
        """Return the calls of a text, or the text itself if there are none."""
        begin, self._begin = self._begin or "", None
        self._is_start = False
        calls = self._form.read(body, self._schemas)
        if calls is None:
            self._after_call = False
            return [ChannelText(FINAL, self._before + begin + body + end)]
        self._after_call = True
        pieces = []
        for call in calls:
            pieces.append(ChannelText(CALLS, call.arguments, call.recipient, self._calls, call.id))
            self._calls += 1
        return pieces
