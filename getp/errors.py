"""What the command line tells a user in one line, and the exit statuses.

0: all done. 1: the job or the program failed. 2: wrong options. 3: the job ran to its end, but
some of its requests failed. 128 + N: ended by signal N (130: Ctrl-C).
"""

import signal

SOME_FAILED = 3


class GetpError(Exception):
    """A run that cannot go on; the message is one sentence for the user."""

    exit_code = 1


class UsageProblem(GetpError):
    """Options that do not go together, or a value that is not allowed; names the option."""

    exit_code = 2


class Interrupted(GetpError):
    """The user pressed Ctrl-C, or another signal asked for the end."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # as a shell reports it
