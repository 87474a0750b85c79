"""Token lines: the token ids of one answer per line, separated by spaces, in input order."""

from engine import Completion
from getp.files import json_line, token_line
from getp.job.formats.interface import Failure, JobRequest, OutputFormat, ResultContext


class TokenLines(OutputFormat):
    """Token lines. The line of a failed request is empty; the errors file has the reason."""

    name, suffix, holds_failures = "tokens", ".txt", False

    def completed(
        self, context: ResultContext, request: JobRequest, completion: Completion
    ) -> bytes:
        return token_line(completion.token_ids)

    def failed(self, context: ResultContext, failure: Failure) -> bytes:
        return json_line(
            {
                "line": failure.line,
                "index": failure.index,
                "code": failure.code,
                "message": failure.message,
            }
        )


TOKEN_LINES = TokenLines()
