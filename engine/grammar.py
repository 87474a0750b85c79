"""Grammars: what the output of a request must match, for example a JSON schema."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["json_schema", "regex", "lark"]


@dataclass(frozen=True)
class Grammar:
    """What the output of a request must match, from its first token to the one that ends it.

    A token that could not lead to a match is never sampled, and the request ends when the match is
    complete. If it ends at its limit of tokens (finish reason "length"), its output is the start of
    a match. The package llguidance computes which tokens are allowed.

    `kind` is the language of `text`: a JSON schema, a regular expression, or a grammar in Lark's
    syntax (or in GBNF, llama.cpp's). `after_ids` are sequences of tokens; the part that must match
    begins after they have occurred, one after the other, with any tokens between. Until then every
    token except the stop ids is allowed. (): all of the output must match. With `opening_id` this
    holds for an output that begins with this token, which is then allowed: any other must match as
    a whole.
    """

    kind: Kind
    text: str
    after_ids: tuple[tuple[int, ...], ...] = ()
    opening_id: int | None = None

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError for a grammar that cannot be meant."""
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if not isinstance(self.text, str):
            raise TypeError(f"the text of a grammar must be a string, not {self.text!r:.80}")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> "Grammar":
        """Return the grammar of the JSON texts that are valid under a schema."""
        return cls("json_schema", json.dumps(schema))

    @classmethod
    def json_object(cls) -> "Grammar":
        """Return the grammar of all JSON objects."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def choice(cls, texts: Sequence[str]) -> "Grammar":
        """Return the grammar of these texts alone."""
        # Lark's strings have the escapes of JSON's. One terminal: a rule has at most 2,000 choices.
        found = " | ".join(json.dumps(text) for text in texts)
        return cls("lark", f"start: CHOICE\nCHOICE: {found}")
