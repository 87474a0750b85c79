"""What a request asks for, whatever its format."""

from dataclasses import dataclass, field
from typing import Any, Literal

from tokenizer import Message


class BadRequestError(Exception):
    """An invalid request; other requests are not affected."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class ParsedBody:
    """The prompt and parameters of one request; parameters that it does not set are absent."""

    prompt: str | list[int] | None = None  # text or token ids
    messages: list[Message] | None = None
    params: dict[str, Any] = field(default_factory=dict)  # fields of SamplingParams
    names: dict[str, str] = field(default_factory=dict)  # what the request calls these fields
    stops: tuple[str, ...] | None = None  # None: the job's
    bad_words: tuple[str, ...] | None = None  # None: the job's
    variables: dict[str, Any] = field(default_factory=dict)  # variables of the chat template
    chat: bool | None = None  # whether to apply the chat template; None: the job's default
    openai: bool = False  # in OpenAI's format, which has its own defaults
    n: int = 1  # answers
    best_of: int | None = None  # answers of which the n most likely are returned; None: n
    answer: dict[str, Any] = field(default_factory=dict)  # fields of AnswerOptions
    thinking_budget: int | None = None  # tokens, -1: no limit; None: the job's
    tools: list[dict[str, Any]] = field(default_factory=list)  # as the template gets them
    tool_choice: Literal["none", "auto", "required"] = "auto"
    called_tool: str | None = None  # the only tool that may be called

    @property
    def offered_tools(self) -> dict[str, Any]:
        """For each tool that the model may call, the schema of its parameters."""
        if self.tool_choice == "none":
            return {}
        functions = (tool["function"] for tool in self.tools)
        return {each["name"]: each.get("parameters") for each in functions}
