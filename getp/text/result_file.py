"""Reads a result file of mode getp: token ids or JSONL, one answer per line."""

import json
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from getp.errors import GetpError
from getp.files import UTF8_BOM, path_name, read_bytes, split_lines
from getp.terminal import warn
from getp.text.parts.thinking import without_thinking
from getp.units import counted
from tokenizer import Tokenizer, answer_text

_TOKEN_ID = re.compile(rb"[0-9]{1,10}")
_MAX_TOKEN_ID = 2**31 - 1

TokenIds: TypeAlias = "array[int]"
"""The ids of one answer, four bytes each."""

LoadTokenizer = Callable[[], Tokenizer]


@dataclass(frozen=True)
class Results:
    """The answers in a result file, in its order."""

    name: str  # of the file, for messages
    ids: list[TokenIds] | None = None  # None: the file has texts
    texts: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts if self.ids is None else self.ids)

    def as_texts(self, load_tokenizer: LoadTokenizer) -> list[str]:
        """Return the text of each answer, without reasoning; the tokenizer decodes token ids."""
        if self.ids is None:
            return self.texts
        tokenizer = load_tokenizer()
        texts = (answer_text(tokenizer, row) for row in self.ids)
        return [without_thinking(tokenizer.template, text) for text in texts]


def read_results(path: str) -> Results:
    """Read the answers in a result file. Raises GetpError naming the first invalid line.

    JSONL is recognised by its first character. The answer of a request that failed is empty; a
    warning says how many failed.
    """
    data, name = read_bytes(path), path_name(path)
    if not data.removeprefix(UTF8_BOM).lstrip().startswith(b"{"):
        lines = enumerate(split_lines(data), start=1)
        return Results(name, ids=[_token_ids(line, f"{name}, line {at}") for at, line in lines])
    texts: list[str] = []
    failures: list[str] = []
    for number, line in enumerate(split_lines(data), start=1):
        if not line.strip():
            continue
        text, failure = _answer(line, f"{name}, line {number}")
        texts.append(text)
        if failure is not None:
            failures.append(f"line {number}: {failure}")
    if failures:
        warn(
            f"{name}: {counted(len(failures), 'request')} of {len(texts)} failed, so the answer is "
            f"empty; the first is {failures[0]}"
        )
    return Results(name, texts=texts)


def _token_ids(line: bytes, where: str) -> TokenIds:
    words = line.split()
    for word in words:
        if not _TOKEN_ID.fullmatch(word) or int(word) > _MAX_TOKEN_ID:
            shown = word[:40].decode("utf-8", "replace")
            raise GetpError(
                f"{where}: {shown!r} is not a token id; give a result of mode getp that has token "
                "ids or is JSONL (tables and text files have the answers as text already)"
            )
    return array("i", map(int, words))


def _answer(line: bytes, where: str) -> tuple[str, str | None]:
    """Return the answer in a line of a JSONL result; if there is none, the request's error."""
    try:
        record: Any = json.loads(line)
        error = record["error"]
        if error is not None:
            return "", str(error["message"])
        choice = record["response"]["body"]["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        if not isinstance(text, str | None):
            raise TypeError
    except (ValueError, LookupError, TypeError, RecursionError):
        raise GetpError(
            f"{where}: is not a line of a JSONL result (an object with 'response' and 'error'); "
            "give the output of mode getp, not its input"
        ) from None
    return text or "", None
