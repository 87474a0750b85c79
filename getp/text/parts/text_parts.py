"""The parts of an answer's text: thinking, content and calls of tools."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from getp.text.parts.thinking import Markers, ThinkingParser, ends_with, markers_of
from getp.text.parts.tool_bodies import Schemas
from getp.text.parts.tool_calls import FORCED, ToolCallParser, ToolFormat, format_of
from tokenizer import StreamDecoder, Tokenizer
from tokenizer.harmony import FINAL, ChannelText

_known: WeakKeyDictionary[
    Tokenizer, dict[tuple[Markers | None, ToolFormat | None], frozenset[int]]
] = WeakKeyDictionary()


class TextParts:
    """Converts an answer's tokens to text, and separates its parts as its chat template says."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        chat: bool,
        tools: Schemas | None,
        forced: bool,
        skip_special: bool,
    ) -> None:
        """chat: the prompt came from the chat template; otherwise all text is content.

        tools: the request's tools and their parameters; None: calls are text. forced: the answer is
        a list of calls.
        """
        template = tokenizer.template if chat else None
        markers = markers_of(template)
        form = format_of(template) if tools is not None else None
        if forced:
            form = FORCED
        kept = _special_ids(tokenizer, markers, form)
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids - kept if skip_special else frozenset()
        self._decoder = StreamDecoder(tokenizer, skip_special, kept)
        self._thinking: ThinkingParser | None = None
        self._calls: ToolCallParser | None = None
        if markers is not None:
            is_open = ends_with(markers.start, tokenizer, prompt_ids)
            self._thinking = ThinkingParser(markers, is_open)
        if form is not None:
            self._calls = ToolCallParser(form, tools or {})

    def push(self, token_id: int) -> list[ChannelText]:
        """Process the next token; return the text that is certain."""
        return self._separate(self._decoder.push(token_id))

    def push_all(self, token_ids: Sequence[int]) -> list[ChannelText]:
        """Process all tokens of an answer, which is much faster than one by one."""
        ids = [each for each in token_ids if each not in self._skipped]
        return self._separate(self._tokenizer.decode(ids, skip_special=False))

    def flush(self) -> list[ChannelText]:
        """Return the text held back; call it after the last token."""
        pieces = self._separate(self._decoder.flush())
        if self._thinking is not None:
            pieces += self._find_calls(self._thinking.flush())
        return pieces + (self._calls.flush() if self._calls is not None else [])

    def _separate(self, text: str) -> list[ChannelText]:
        if not text:
            return []
        pieces = [ChannelText(FINAL, text)] if self._thinking is None else self._thinking.push(text)
        return self._find_calls(pieces)

    def _find_calls(self, pieces: list[ChannelText]) -> list[ChannelText]:
        calls = self._calls
        if calls is None:
            return pieces
        return [
            found
            for piece in pieces
            for found in (calls.push(piece.text) if piece.channel == FINAL else [piece])
        ]


def _special_ids(
    tokenizer: Tokenizer, markers: Markers | None, form: ToolFormat | None
) -> frozenset[int]:
    """Return the special tokens among the markers; the parsers need their text."""
    known = _known.setdefault(tokenizer, {})
    if (markers, form) not in known:
        known[markers, form] = _find_special_ids(tokenizer, markers, form)
    return known[markers, form]


def _find_special_ids(
    tokenizer: Tokenizer, markers: Markers | None, form: ToolFormat | None
) -> frozenset[int]:
    texts = [] if markers is None else [markers.start, markers.end]
    if form is not None:
        texts += [form.begin, form.end or "", *form.inside]
    ids = (each for text in texts for each in tokenizer.encode(text, special=False))
    return tokenizer.special_ids.intersection(ids)
