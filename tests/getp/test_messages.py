"""Messages name options only in the command line, and are written in standard English."""

import re

from getp.cli.main import command
from getp.cli.wording import option_name
from tests.getp.messages import Message, messages

# Options of other tools, which messages may name.
_FOREIGN_OPTIONS = re.compile(r"nvcc --version|ray start|pip install( -e)?")
_OPTION = re.compile(r"(?<![\w…-])--?[a-z][a-z-]*")
_NONSTANDARD_PHRASES = [
    r"(?<!there) is no \w+",
    r"(?<!there) are no \w+",
    r"\bholds no\b",
    r"\bknows no\b",
    r"\bgo(es|ing)? on\b",
    r"\bgone on\b",
    r"\bas one\b",
    r"\bnobody\b",
    r"\bwhoever\b",
    r"\bwherever\b",
    r"\blikeliest\b",
    r"\bso many\b",
    r"\bthere (is|are) none\b",
    r"\bfor something else\b",
    r", too(?=[.,;:]|$)",
    r"\bcut at\b",
    r"\bbut lost\b",
    r"\bcomputed in are\b",
    r"\bsafe from\b",
    r"\bat work on\b",
]
_NONSTANDARD = re.compile("|".join(_NONSTANDARD_PHRASES), re.IGNORECASE)


def listing(found: list[Message]) -> str:
    return "\n".join(f"{each.file}:{each.line}: {each.text}" for each in found)


def test_only_the_command_line_names_options() -> None:
    named = [
        each
        for each in messages()
        if not each.file.startswith("getp/cli/")
        and _OPTION.search(_FOREIGN_OPTIONS.sub("", each.text))
    ]
    assert not named, listing(named)


def test_messages_are_in_standard_english() -> None:
    found = [each for each in messages() if _NONSTANDARD.search(each.text)]
    assert not found, listing(found)


def test_names_in_braces_are_replaced() -> None:
    left = [
        each
        for each in messages()
        if each.literal
        and re.search(r"\{[a-z_]+\}", each.text)
        and not each.has_fields
        and each.file.startswith("getp/")
    ]
    assert not left, listing(left)


def test_every_option_that_messages_name_exists() -> None:
    known = {name for parameter in command.params for name in parameter.opts}
    known |= {name for parameter in command.params for name in parameter.secondary_opts}
    settings = {name for each in messages() for name in re.findall(r"\{([a-z_]+)\}", each.text)}
    options = {option_name(name) for name in settings} - settings - {"CHECKPOINT"}
    assert options
    for option in options:
        assert set(option.split("/")) <= known, option


if __name__ == "__main__":
    print(listing(messages()))
