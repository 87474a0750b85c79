"""Chat templates: a checkpoint's own Jinja template makes one text of a conversation.

The environment and the names a template sees are those of transformers'
`apply_chat_template`, so the templates on the Hub run unchanged. They are other people's
programs: they run in Jinja's sandbox, and every loop, text and number of theirs has a limit.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from tokenizer.errors import TemplateError, TokenizerError
from tokenizer.sandbox import LONGEST_TEXT, Sandbox

_LONGEST_SOURCE = 1 << 20  # characters; templates on the Hub have up to some ten thousand

Message = Mapping[str, Any]
"""One turn: {"role": "system" | "user" | "assistant", "content": text}, and what a template
may know besides."""


class ChatTemplate:
    """A compiled template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self._special_tokens = dict(special_tokens or {})
        if len(source) > _LONGEST_SOURCE:
            raise TokenizerError(f"the chat template is longer than {_LONGEST_SOURCE} characters")
        try:
            self._environment = _environment()
            tree = self._environment.parse(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree))
            self._template = self._environment.from_string(self._environment.limit(tree))
        except (jinja2.TemplateError, RecursionError, MemoryError, ValueError) as error:
            raise TokenizerError(f"the chat template is not valid: {error}") from error

    @classmethod
    def load(
        cls, folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
    ) -> "ChatTemplate | None":
        """Take chat_template.jinja in `folder`, else what tokenizer_config.json has, else None."""
        file = folder / "chat_template.jinja"
        source = config.get("chat_template")
        if file.is_file():
            try:
                # In bytes up to four times as many as characters.
                with open(file, "rb") as opened:
                    source = opened.read(4 * _LONGEST_SOURCE + 1).decode("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise TokenizerError(f"{file} cannot be read: {error}") from error
        elif isinstance(source, list):  # several, by name
            named = {e.get("name"): e.get("template") for e in source if isinstance(e, dict)}
            source = named.get("default")
        return cls(source, special_tokens) if isinstance(source, str) else None

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Return the conversation as text, ending where the assistant's answer begins.

        `variables` are further names for the template (`reasoning_effort="low"`, …); those it
        asks about are in `self.variables`. Raises TemplateError with the template's own words
        when it refuses the conversation.
        """
        names: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens}
        names |= variables
        names |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        self._environment.begin()
        pieces, length = [], 0
        try:
            for piece in self._template.generate(names):
                pieces.append(piece)
                length += len(piece)
                if length > LONGEST_TEXT:
                    raise TemplateError(f"it makes a text of more than {LONGEST_TEXT} characters")
        except Exception as error:  # a template is a program: it can raise anything
            raise TemplateError(f"the chat template refused the conversation: {error}") from error
        return "".join(pieces)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant said; it is just rendered."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Replace the block by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> Sandbox:
    """Return the environment that templates on the Hub are written for."""
    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, >, & and ', which no model was trained on.
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        return encoder.encode(value)
    pieces, length = [], 0
    for piece in encoder.iterencode(value):  # deep inside a line is mostly its indent
        pieces.append(piece)
        length += len(piece)
        if length > LONGEST_TEXT:
            raise TemplateError(f"it makes a text of more than {LONGEST_TEXT} characters")
    return "".join(pieces)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
