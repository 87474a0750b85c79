"""What a predicted job needs to know of a file of requests: their lengths in tokens."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from getp.job.inputs import scan
from getp.job.openai_api import BadRequestError, ParsedBody
from getp.job.request_reader import Defaults, Failure, Task, TaskReader
from tokenizer import Tokenizer


@dataclass
class Requests:
    """The requests that can be run, and those that mode getp would refuse."""

    counted: str  # how
    prompts: list[int] = field(default_factory=list)  # tokens of each
    limits: list[int | None] = field(default_factory=list)  # most new tokens of each
    refused: int = 0
    first_refused: str | None = None  # which line it is, and why


def read_requests(path: str, folder: Path | None, defaults: Defaults) -> Requests:
    """Read a file as mode getp does. Without a tokenizer's `folder` four bytes are a token."""
    source = scan(path)
    if folder is None:
        found = Requests("taken as 4 bytes each")
        reader: TaskReader = _ByteReader(source, defaults, cast(Tokenizer, None))
    else:
        found = Requests("counted")
        reader = TaskReader(source, defaults, Tokenizer.load(folder))
    for task in map(reader.read, source.lines()):
        if isinstance(task, Task):
            found.prompts.append(len(task.prompt_ids))
            found.limits.append(task.params.max_new_tokens)
        elif isinstance(task, Failure):
            found.refused += 1
            found.first_refused = found.first_refused or f"line {task.line}: {task.message}"
    return found


class _ByteReader(TaskReader):
    """Takes four bytes of text for a token, a chat for the texts of its messages.

    It never asks the tokenizer.
    """

    def _encode(self, asked: ParsedBody, chat: bool, most: int | None) -> list[int]:
        if isinstance(asked.prompt, list):
            return asked.prompt
        texts = [message.get("content") for message in asked.messages or ()]
        texts += [asked.prompt, self._defaults.system if chat else None]
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts if text)
        if not size:
            raise BadRequestError("empty_prompt", "the prompt is empty")
        return [0] * -(-size // 4)
