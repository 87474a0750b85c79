"""The embedded model's questions: families, phrasings, answers and the held-out split.

Every question has one correct answer that a program can check. A family is a set of phrasings with
the same fields. `solve` computes the answer from a question's text, so a checker needs only the
text.

The split depends on content, not on wording: a question's key identifies what it asks,
independently of the order of interchangeable arguments (3 + 45 and 45 + 3 have the same key). One
key in ten is held out, in every phrasing and in every message of a conversation. Sums and
differences of two single digits are never held out, because the worked solutions contain them.

Words to spell are written in capitals, because the tokenizer keeps each capital letter as a token.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass

from question_families import FAMILIES, SMALL_TALK, Family
from question_fields import ORDINALS, Fields

__all__ = [
    "FAMILIES",
    "SMALL_TALK",
    "Question",
    "evaluation_set",
    "is_held_out",
    "parse",
    "sample",
    "solve",
]

HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Question:
    """A question, its only correct answer, and the short worked solution shown in a chat."""

    family: str
    key: str
    text: str
    answer: str
    working: str


_FIELD_PATTERNS = {
    "a": r"\d+",
    "b": r"\d+",
    "n": r"\d+",
    "numbers": r"\d+(?:, \d+)+",
    "months": r"[A-Z][a-z]+(?:, [A-Z][a-z]+)+",
    "relation": "greater|larger|less|smaller",
    "ordinal": "|".join(ORDINALS),
    "word": "[A-Z]+",
    "left": "[A-Z]+",
    "right": "[A-Z]+",
    "letter": "[A-Z]",
}


def _phrasing_pattern(phrasing: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", phrasing)
    return re.compile(
        "".join(
            f"(?P<{part}>{_FIELD_PATTERNS[part]})" if i % 2 else re.escape(part)
            for i, part in enumerate(parts)
        )
    )


_PATTERNS = [
    (family, _phrasing_pattern(phrasing))
    for family in FAMILIES.values()
    for phrasing in family.phrasings
]


def _key(family: Family, fields: Fields) -> str:
    return f"{family.name}: {family.canonical({k: fields[k] for k in sorted(fields)})}"


def _question(family: Family, fields: Fields, text: str) -> Question:
    return Question(
        family.name, _key(family, fields), text, family.answer(fields), family.working(fields)
    )


def is_held_out(question: Question) -> bool:
    """Whether this question is excluded from training in every phrasing."""
    if question.family in ("add", "subtract") and len(question.key.split(": ")[1]) == len("1, 2"):
        return False
    return zlib.crc32(question.key.encode()) % HELD_OUT_ONE_IN == 0


def sample(name: str, rng: random.Random, held_out: bool) -> Question:
    """Sample a question of the family `name` from the held-out or the training set."""
    family = FAMILIES[name]
    while True:
        fields = family.sample(rng)
        text = rng.choice(family.phrasings).format(**fields)
        question = _question(family, fields, text)
        if is_held_out(question) == held_out:
            return question


def parse(text: str) -> Question:
    """Recover a question with its answer from its text.

    Raises ValueError if the text matches no phrasing of any family.
    """
    for family, pattern in _PATTERNS:
        match = pattern.fullmatch(text)
        if match:
            return _question(family, match.groupdict(), text)
    raise ValueError(f"the text matches no question family: {text!r}")


def solve(text: str) -> str:
    """Return the correct answer to a question from its text. Raises ValueError like `parse`."""
    return parse(text).answer


def evaluation_set(per_family: int, seed: int) -> list[Question]:
    """Return `per_family` distinct held-out questions of each family, families interleaved."""
    rng = random.Random(seed)
    rows: list[list[Question]] = []
    for name in FAMILIES:
        distinct: dict[str, Question] = {}
        while len(distinct) < per_family:
            question = sample(name, rng, held_out=True)
            distinct.setdefault(question.text, question)
        rows.append(list(distinct.values()))
    return [question for column in zip(*rows, strict=True) for question in column]
