"""Text lines: the text of one answer per line, in input order."""

from engine import Completion
from getp.job.formats.interface import JobRequest, OutputFormat, ResultContext
from getp.text.escape import escape


class TextLines(OutputFormat):
    """Text lines: the answers without reasoning, with newlines and backslashes escaped."""

    name, suffix = "text", ".txt"

    def completed(
        self, context: ResultContext, request: JobRequest, completion: Completion
    ) -> bytes:
        answer = context.answer(request, completion)
        return escape(answer.content).encode("utf-8", "replace")


TEXT_LINES = TextLines()
