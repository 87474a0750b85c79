"""Errors that name settings, worded for the command line or for Python."""

import pickle

from getp.cli.wording import option_name
from getp.errors import GetpError, Interrupted, UsageProblem, worded


def test_fields_are_filled_in_and_settings_are_named_by_the_caller() -> None:
    error = UsageProblem("{line} must be at most {lines}, not {given}", lines=3, given="{seed}")
    assert str(error) == "line must be at most 3, not {seed}"
    assert error.worded(option_name) == "--line must be at most 3, not {seed}"
    assert worded(error, str.upper) == "LINE must be at most 3, not {seed}"


def test_text_without_fields_is_the_message() -> None:
    assert GetpError("cannot read {seed}.txt").worded(option_name) == "cannot read {seed}.txt"
    assert worded(ValueError("any {line}"), option_name) == "any {line}"


def test_errors_keep_their_fields_when_pickled() -> None:
    for error in (GetpError("{restart} {path}", path="x"), Interrupted("{output} {n}", 15, n=1)):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert copy.worded(option_name) == error.worded(option_name)
        assert copy.exit_code == error.exit_code
