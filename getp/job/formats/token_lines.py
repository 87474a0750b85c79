"""Token lines: the token ids of one answer per line, separated by spaces, in input order."""

from getp.files import token_line
from getp.job.formats.interface import JobRequest, OutputFormat, ResultContext
from getp.text.samples import Samples


class TokenLines(OutputFormat):
    """Token lines, stop tokens included."""

    name, suffix = "ids", ".txt"

    def completed(self, context: ResultContext, request: JobRequest, samples: Samples) -> bytes:
        return token_line(samples.chosen[0].token_ids)


TOKEN_LINES = TokenLines()
