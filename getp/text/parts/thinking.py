"""The thinking of a model that writes it before its answer, between two markers.

    <think>Let me see…</think>It is 4.

Many templates end with the first marker, so that the answer begins with the thinking itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

from engine.sampling_params import ThinkingBudget
from tokenizer import ChatTemplate, TemplateError, Tokenizer
from tokenizer.harmony import FINAL, ChannelText, supports_harmony

THINKING = "thinking"
"""The channel of the thinking between markers."""

_MAX_MARKER_TOKENS = 16  # at the end of a prompt; a marker in text and the white space after it


class Markers(NamedTuple):
    """The texts around the thinking, and what stands beside its end if that is forced."""

    start: str
    end: str
    before_end: str = ""
    after_end: str = ""


_MARKERS = (
    Markers("<think>", "</think>", "\n", "\n\n"),
    Markers("<seed:think>", "</seed:think>"),
    Markers("[THINK]", "[/THINK]"),  # Magistral, Ministral 3
    Markers("<|channel>thought\n", "<channel|>", "\n"),  # Gemma 4
)
_HARMONY = Markers(
    "<|channel|>analysis<|message|>",
    "<|end|>",
    after_end="<|start|>assistant<|channel|>final<|message|>",
)


def markers_of(template: ChatTemplate | None) -> Markers | None:
    """Return the markers whose end the template mentions; None for a model without them."""
    if template is None:
        return None
    try:
        return next((each for each in _MARKERS if each.end in template.source), None)
    except TemplateError:
        return None


def ends_with(marker: str, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Whether a prompt ends with this marker of thinking, and white space after it."""
    end = tokenizer.decode(list(prompt_ids[-_MAX_MARKER_TOKENS:]), skip_special=False)
    return end.rstrip().endswith(marker.rstrip())


def thinking_budget(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], max_tokens: int
) -> ThinkingBudget | None:
    """Return a budget for the answer to a prompt; None if the model does not mark its thinking."""
    markers = _HARMONY if supports_harmony(tokenizer) else markers_of(tokenizer.template)
    if markers is None:
        return None
    start, end, before, after = (tuple(tokenizer.encode(text, special=False)) for text in markers)
    opened = ends_with(markers.start, tokenizer, prompt_ids)
    return ThinkingBudget(max_tokens, start, end, before + end + after, opened)


def without_thinking(template: ChatTemplate | None, text: str) -> str:
    """Return the text of an answer without its thinking, where the prompt is not known."""
    markers = markers_of(template)
    if markers is None or markers.end not in text:
        return text
    parser = ThinkingParser(markers, not text.lstrip().startswith(markers.start))
    pieces = parser.push(text) + parser.flush()
    return "".join(piece.text for piece in pieces if piece.channel == FINAL)


class ThinkingParser:
    """Separates the thinking at the start of an answer from what follows.

    White space around the thinking is left out. Thinking without an end is all that there is.
    """

    def __init__(self, markers: Markers, is_open: bool) -> None:
        """is_open: the answer begins within the thinking."""
        self._markers = markers
        self._state = "open" if is_open else "start"  # then: open, after, closed
        self._has_thought = False
        self._held = ""

    def push(self, text: str) -> list[ChannelText]:
        """Add the next piece of the text; return what is certain."""
        self._held += text
        pieces = []
        if self._state == "start":
            self._open()
        if self._state == "open":
            pieces += self._think()
        if self._state == "after":
            self._held = self._held.lstrip()
            self._state = "closed" if self._held else "after"
        if self._state == "closed" and self._held:
            pieces.append(ChannelText(FINAL, self._held))
            self._held = ""
        return pieces

    def flush(self) -> list[ChannelText]:
        """Return the text held back; call it at the end of the text."""
        channel = THINKING if self._state == "open" else FINAL
        text = self._held.rstrip() if channel == THINKING else self._held
        self._held = ""
        return [ChannelText(channel, text)] if text else []

    def _open(self) -> None:
        text, start = self._held.lstrip(), self._markers.start
        if text.startswith(start):
            self._state, self._held = "open", text[len(start) :]
        elif not start.startswith(text):
            self._state = "closed"

    def _think(self) -> list[ChannelText]:
        end = self._markers.end
        if not self._has_thought:
            self._held = self._held.lstrip()
        text, found, rest = self._held.partition(end)
        thought = text if found else text[: len(text) - partial_length(text, end)]
        thought = thought.rstrip()
        self._held = rest if found else text[len(thought) :]
        if found:
            self._state = "after"
        self._has_thought = self._has_thought or bool(thought)
        return [ChannelText(THINKING, thought)] if thought else []


def partial_length(text: str, marker: str) -> int:
    """Return the length of the longest end of `text` with which `marker` begins."""
    lengths = range(min(len(marker) - 1, len(text)), 0, -1)
    return next((each for each in lengths if marker.startswith(text[-each:])), 0)
