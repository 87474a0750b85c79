"""Token lines: the token ids of one answer per line, separated by spaces, in input order."""

from engine import Completion
from getp.files import token_line
from getp.job.formats.interface import JobRequest, OutputFormat, ResultContext


class TokenLines(OutputFormat):
    """Token lines, stop tokens included."""

    name, suffix = "ids", ".txt"

    def completed(
        self, context: ResultContext, request: JobRequest, completion: Completion
    ) -> bytes:
        return token_line(completion.token_ids)


TOKEN_LINES = TokenLines()
