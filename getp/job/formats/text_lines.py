"""Text lines: the text of one answer per line, in input order."""

from getp.job.formats.interface import JobRequest, OutputFormat, ResultContext
from getp.text.escape import escape
from getp.text.samples import Samples


class TextLines(OutputFormat):
    """The answers without reasoning, with calls of tools as JSON, and newlines escaped."""

    name, suffix = "text", ".txt"

    def completed(self, context: ResultContext, request: JobRequest, samples: Samples) -> bytes:
        answer = context.answer(request, samples.chosen[0])
        return escape(answer.with_calls).encode("utf-8", "replace")


TEXT_LINES = TextLines()
