"""What the command line tells a user in one line."""


class GetpError(Exception):
    """A run that cannot go on; the message is one sentence for the user."""

    exit_code = 1


class UsageProblem(GetpError):
    """Options that do not go together, or a value that is not allowed; names the option."""

    exit_code = 2


class Interrupted(GetpError):
    """The user pressed Ctrl-C."""

    exit_code = 130  # what a shell reports for SIGINT
