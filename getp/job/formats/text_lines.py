"""Text lines: the text of one answer per line, in input order."""

from engine import Completion
from getp.job.formats.interface import JobRequest, OutputFormat, ResultContext
from getp.text.escape import escape
from tokenizer.harmony import FINAL


class TextLines(OutputFormat):
    """Text lines: the answers without reasoning, with newlines and backslashes escaped."""

    name, suffix = "text", ".txt"

    def completed(
        self, context: ResultContext, request: JobRequest, completion: Completion
    ) -> bytes:
        texts = context.texts(request, completion)
        text = texts.get(FINAL, "") if request.chat else "".join(texts.values())
        return escape(text).encode("utf-8", "replace")


TEXT_LINES = TextLines()
