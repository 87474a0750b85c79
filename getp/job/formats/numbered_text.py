"""Numbered text: line 1 is the number of prompts, then one prompt per line.

UTF-8; lines end at newlines only. Blank lines are (empty) prompts. Lines after the last prompt are
ignored.
"""

import re

from getp.defaults import TEXT
from getp.errors import GetpError
from getp.job.formats.interface import InputFormat, Line, ParsedBody, decode_line
from getp.job.formats.token_lines import TOKEN_LINES

_COUNT = re.compile(rb"[0-9]{1,12}")


class NumberedText(InputFormat):
    """Numbered text, which is also the format of any file that no other format recognises."""

    name, suffix, output = "text", ".txt", TOKEN_LINES
    has_ids, has_messages = False, False
    defaults = TEXT

    def recognises(self, start: bytes) -> bool:
        return True

    def announced_count(self, name: str, first: bytes | None) -> int:
        count = (first or b"").strip()
        if not _COUNT.fullmatch(count):
            shown = repr(count[:40].decode("utf-8", "replace"))
            found = f"not {shown}" if count else "but it is empty"
            raise GetpError(
                f"{name}, line 1: must be the number of prompts, {found} (numbered text: the "
                "first line is the number of prompts; use .jsonl for prompts without it)"
            )
        return int(count)

    def is_request(self, number: int, data: bytes | None) -> bool:
        return number > 1

    def identify(self, line: Line) -> tuple[str, None]:
        return f"request-{line.index}", None

    def parse(self, line: Line, record: None) -> ParsedBody:
        return ParsedBody(prompt=decode_line(line, "prompt"))


FORMAT = NumberedText()
