"""Chat templates: a checkpoint's own Jinja template renders a conversation as one text.

A template gets the same environment and the same names as in transformers'
`apply_chat_template`, so templates from the Hub run unchanged. A template is untrusted code: it
runs in a sandbox, a process with limits on its memory and its time.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizer.errors import TemplateError
from tokenizer.files import read_file
from tokenizer.sandbox import Sandbox

_MAX_SOURCE = 1 << 20  # characters; templates on the Hub have at most tens of thousands
_sandbox = Sandbox()  # of all templates of this process

# content is none, content'] == None; but reasoning_content is none
_TESTS_NONE = re.compile(
    r"(?<!\w)content['\"]?\]?\s*(is\s+(not\s+)?|[!=]=\s*)none\b", re.IGNORECASE
)
_TESTS_EMPTY = re.compile(r"(?<!\w)content['\"]?\]?\s*==\s*(''|\"\")")  # content == ''
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
    """A template and the special tokens that it can refer to by name.

    It is compiled when it is first used, because most jobs do not use it: whatever is wrong with it
    is raised then.
    """

    def __init__(
        self, source: str | bytes, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        """source: the template, or the content of its file."""
        self._given = source
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def load(
        cls, folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
    ) -> "ChatTemplate | None":
        """Load the template from chat_template.jinja in `folder`, or else from `config`.

        `config` is the content of tokenizer_config.json. Returns None if neither has a template.
        Raises TokenizerError if the file cannot be read.
        """
        # A character has at most four bytes in UTF-8.
        file = read_file(folder / "chat_template.jinja", 4 * _MAX_SOURCE)
        source = config.get("chat_template") if file is None else file
        if isinstance(source, list):  # several named templates
            named = {e.get("name"): e.get("template") for e in source if isinstance(e, dict)}
            source = named.get("default")
        return cls(source, special_tokens) if isinstance(source, str | bytes) else None

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names of all variables that the template uses.

        Raises TemplateError if the template is not valid.
        """
        return _sandbox.variables(self.source)

    def check(self) -> None:
        """Raise TemplateError if the template is not valid."""
        _ = self.variables

    @cached_property
    def distinguishes_none(self) -> bool:
        """Whether a message whose content is None is another one than without text.

        A template that tests for both may yet fail at None (Ministral 3).
        """
        tests_empty = _TESTS_EMPTY.search(self.source) is not None
        return _TESTS_NONE.search(self.source) is not None and not tests_empty

    @cached_property
    def writes_arguments_as_text(self) -> bool:
        """Whether the template needs the arguments of a tool call as text, not as an object."""
        return bool(_JOINS_ARGUMENTS.search(self.source)) and not (
            _READS_ARGUMENTS.search(self.source)
        )

    @cached_property
    def reads_thinking(self) -> bool:
        """Whether the reasoning of earlier messages has the key `thinking`, as in gpt-oss."""
        return "message.thinking" in self.source and "reasoning_content" not in self.source

    @cached_property
    def needs_short_ids(self) -> bool:
        """Whether the template refuses ids of calls that do not have nine characters (Mistral)."""
        return "length != 9" in self.source

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> str:
        """Return the conversation as text, ending where the assistant's answer begins.

        `variables` are additional template variables (`reasoning_effort`, …), or other values for
        those that every template gets; `now` is the time that the template sees. Raises
        TemplateError, with the template's own message if the template rejects the conversation.
        """
        names: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": True}
        names |= self._special_tokens | dict(variables or {}) | {"messages": messages}
        return _sandbox.render(self.source, names, now)

    def close(self) -> None:
        """End the process of the sandbox; it starts again when a template needs it."""
        _sandbox.close()

    @cached_property
    def source(self) -> str:
        """The text of the template. Raises TemplateError if it is not UTF-8 or too long."""
        given = self._given
        try:
            text = given if isinstance(given, str) else given.decode("utf-8")
        except UnicodeDecodeError as error:
            raise TemplateError(f"the chat template is not valid: {error}") from None
        if len(text) > _MAX_SOURCE:
            raise TemplateError(f"the chat template is longer than {_MAX_SOURCE} characters")
        return text
