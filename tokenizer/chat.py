"""Chat templates: a checkpoint's own Jinja template renders a conversation as one text.

A template gets the same environment and the same names as in transformers'
`apply_chat_template`, so templates from the Hub run unchanged. A template is untrusted code: it
runs in Jinja's sandbox, with limits on loops, text, numbers and time.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from tokenizer.errors import TemplateError, TokenizerError
from tokenizer.sandbox import MAX_TEXT, Sandbox

_MAX_SOURCE = 1 << 20  # characters; templates on the Hub have at most tens of thousands

# content is none, content'] == None
_TESTS_NONE = re.compile(r"content['\"]?\]?\s*(is\s+(not\s+)?|[!=]=\s*)none\b", re.IGNORECASE)
# arguments'] + '…', '…' ~ call.arguments, {{ call.arguments }}
_JOINS_ARGUMENTS = re.compile(
    r"arguments['\"]?\]?\s*[+~]|[+~]\s*[\w.\['\"\]]{0,99}\barguments['\"]?\]?|"
    r"\{\{-?\s*[\w.\['\"\]]{0,99}\barguments['\"]?\]?\s*-?\}\}"
)
_READS_ARGUMENTS = re.compile(r"arguments['\"]?\]?\s*(\||is\s)")  # arguments | tojson

Message = Mapping[str, Any]
"""One message: {"role": "system" | "user" | "assistant", "content": text}, plus any other keys
that the template uses."""


class ChatTemplate:
    """A compiled template and the special tokens it can refer to by name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens or {})
        if len(source) > _MAX_SOURCE:
            raise TokenizerError(f"the chat template is longer than {_MAX_SOURCE} characters")
        try:
            self._environment = _environment()
            tree = self._environment.parse(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree))
            self._template = self._environment.from_string(self._environment.add_limits(tree))
        except (jinja2.TemplateError, RecursionError, MemoryError, ValueError) as error:
            raise TokenizerError(f"the chat template is not valid: {error}") from error

    @classmethod
    def load(
        cls, folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
    ) -> "ChatTemplate | None":
        """Load the template from chat_template.jinja in `folder`, or else from `config`.

        `config` is the content of tokenizer_config.json. Returns None if neither has a template.
        Raises TokenizerError.
        """
        file = folder / "chat_template.jinja"
        source = config.get("chat_template")
        if file.is_file():
            try:
                # A character has at most four bytes in UTF-8.
                with open(file, "rb") as opened:
                    source = opened.read(4 * _MAX_SOURCE + 1).decode("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise TokenizerError(f"{file} cannot be read: {error}") from error
        elif isinstance(source, list):  # several named templates
            named = {e.get("name"): e.get("template") for e in source if isinstance(e, dict)}
            source = named.get("default")
        return cls(source, special_tokens) if isinstance(source, str) else None

    @cached_property
    def distinguishes_none(self) -> bool:
        """Whether the template handles a message whose content is None."""
        return _TESTS_NONE.search(self._source) is not None

    @cached_property
    def writes_arguments_as_text(self) -> bool:
        """Whether the template needs the arguments of a tool call as text, not as an object."""
        return bool(_JOINS_ARGUMENTS.search(self._source)) and not (
            _READS_ARGUMENTS.search(self._source)
        )

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Return the conversation as text, ending where the assistant's answer begins.

        `variables` are additional template variables (`reasoning_effort="low"`, …);
        `self.variables` holds the names of all variables that the template uses. Raises
        TemplateError, with the template's own message if the template rejects the conversation.
        """
        names: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens}
        names |= variables
        names |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        self._environment.reset_limits()
        pieces, length = [], 0
        try:
            for piece in self._template.generate(names):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_TEXT:
                    raise TemplateError(f"it creates more than {MAX_TEXT} characters of text")
        except Exception as error:  # a template is a program: it can raise anything
            raise TemplateError(f"the chat template failed: {error}") from error
        return "".join(pieces)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text; only its body matters."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it the same way

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Replace the block by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> Sandbox:
    """Return the environment that templates on the Hub expect."""
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
    # Jinja's own filter escapes <, >, & and '; no model was trained on such text.
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        return encoder.encode(value)
    pieces, length = [], 0
    for piece in encoder.iterencode(value):  # with deep nesting, indentation dominates the text
        pieces.append(piece)
        length += len(piece)
        if length > MAX_TEXT:
            raise TemplateError(f"it creates more than {MAX_TEXT} characters of text")
    return "".join(pieces)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
