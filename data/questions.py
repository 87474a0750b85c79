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
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_ONE_IN = 10

_WORD_LIST = """
    ANT APE ARM BAG BAT BED BEE BOX BUS CAR CAT COW CUP DAY DOG EAR EGG EYE FAN FOX HAT HEN ICE INK
    JAR KEY LEG MAP NET OAK OWL PEN PIG RED SEA SKY SUN TEA TOY VAN WEB ZOO BABY BALL BEAR BIRD BLUE
    BOAT BOOK CAKE CITY COIN CORN DEER DESK DOOR DUCK FARM FIRE FISH FLAG FROG GAME GATE GOAT GOLD
    HAND HILL HOME KING KITE LAKE LAMP LEAF LION MILK MOON NEST NOSE OVEN PARK POND RAIN RING ROAD
    ROCK ROSE SAND SHIP SNOW SOUP STAR TENT TREE WAVE WIND WOLF APPLE BEACH BREAD BRICK BRUSH CANDY
    CHAIR CLOCK CLOUD CROWN DREAM EAGLE EARTH FIELD FLOOR FRUIT GRAPE GRASS GREEN HEART HONEY HORSE
    HOUSE JUICE KNIFE LEMON LIGHT MANGO MONEY MOUSE MUSIC NIGHT OCEAN ONION PAPER PEACH PIANO PLANT
    PLATE QUEEN RADIO RIVER ROBOT SALAD SHEEP SHIRT SNAKE SPOON STONE STORM SUGAR TABLE TIGER TOOTH
    TOWER TRAIN WATER WHALE WHEAT WORLD ZEBRA ANIMAL BANANA BASKET BOTTLE BRIDGE BUTTER CAMERA
    CANDLE CARROT CASTLE CHEESE CHERRY CIRCLE COFFEE COTTON DESERT DINNER DOCTOR DRAGON ENGINE
    FAMILY FATHER FLOWER FOREST FRIEND GARDEN GUITAR HAMMER ISLAND JACKET KITTEN LADDER LETTER
    MARKET MIRROR MONKEY MOTHER NEEDLE NUMBER ORANGE PEPPER PENCIL PLANET POCKET POTATO RABBIT
    SCHOOL SILVER SPIDER SPRING SQUARE STREET SUMMER TEMPLE THREAD TICKET TOMATO TUNNEL VALLEY
    VIOLIN WINDOW WINTER BALLOON BICYCLE BLANKET CABBAGE CAPTAIN CHICKEN COMPASS DIAMOND DOLPHIN
    FEATHER FREEDOM GIRAFFE HARVEST JOURNEY KITCHEN LIBRARY MACHINE MORNING NETWORK OCTOPUS PACKAGE
    PENGUIN PICTURE RAINBOW SANDALS SCIENCE TEACHER THUNDER TRACTOR VILLAGE VOLCANO WEATHER WHISTLE
"""
WORDS = tuple(_WORD_LIST.split())
_MONTH_LIST = (
    "January February March April May June July August September October November December"
)
MONTHS = tuple(_MONTH_LIST.split())
ORDINALS = ("first", "second", "third", "fourth", "fifth", "last")
_VOWELS = "AEIOU"
_CONSONANTS = "BCDFGHJKLMNPQRSTVWXYZ"

Fields = dict[str, str]


@dataclass(frozen=True)
class Family:
    """One kind of question: its phrasings and the functions that define it.

    `sample` returns random fields, `answer` the correct answer to them, `working` the solution in
    steps, and `canonical` the text that identifies what is asked.
    """

    name: str
    phrasings: tuple[str, ...]
    sample: Callable[[random.Random], Fields]
    answer: Callable[[Fields], str]
    working: Callable[[Fields], str]
    canonical: Callable[[Fields], str]


@dataclass(frozen=True)
class Question:
    """A question, its only correct answer, and the short worked solution shown in a chat."""

    family: str
    key: str
    text: str
    answer: str
    working: str


# Sampling.


def _word(rng: random.Random, low: int, high: int) -> str:
    """Return a common word or, half of the time, alternating consonants and vowels."""
    if rng.random() < 0.5:
        while True:
            word = rng.choice(WORDS)
            if low <= len(word) <= high:
                return word
    sets = (_CONSONANTS, _VOWELS)
    start = rng.randrange(2)
    length = rng.randint(low, high)
    exceptions = [rng.random() < 0.15 for _ in range(length)]
    return "".join(rng.choice(sets[(start + i + exceptions[i]) % 2]) for i in range(length))


def _number(rng: random.Random, digits: int) -> int:
    """Return a number of at most `digits` digits; one in ten is sampled from a single digit."""
    return rng.randrange(10) if rng.random() < 0.1 else rng.randrange(10**digits)


def _numbers(rng: random.Random, low: int, high: int, digits: int) -> str:
    """Return between `low` and `high` different numbers, separated by commas."""
    count = rng.randint(low, high)
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        chosen[_number(rng, digits)] = None
    return ", ".join(map(str, chosen))


def _sample_sum(rng: random.Random) -> Fields:
    return {"a": str(_number(rng, 2)), "b": str(_number(rng, 2))}


def _sample_difference(rng: random.Random) -> Fields:
    while True:  # raw answers to differences below 10 are mostly wrong (off by a little)
        a, b = sorted((_number(rng, 2), _number(rng, 2)), reverse=True)
        if a - b >= 10:
            return {"a": str(a), "b": str(b)}


def _sample_comparison(rng: random.Random) -> Fields:
    a, b = _numbers(rng, 2, 2, 3).split(", ")
    if rng.random() < 0.3 and len(a) == 3:  # same first digit: comparing it alone is not enough
        b = a[0] + f"{rng.randrange(100):02d}"
    if a == b:
        b = str(int(b) + 1)
    return {"a": a, "b": b, "relation": rng.choice(("greater", "larger", "less", "smaller"))}


def _sample_sequence(rng: random.Random) -> Fields:
    start, step = rng.randrange(100), rng.randint(1, 15)
    return {"numbers": ", ".join(str(start + step * i) for i in range(4))}


def _sample_count(rng: random.Random) -> Fields:
    word = _word(rng, 3, 7)
    if rng.random() < 0.4:  # repeat a letter; otherwise nearly every answer would be 1
        letter, spots = rng.choice(word), rng.sample(range(len(word)), 2)
        word = "".join(letter if i in spots else c for i, c in enumerate(word))
        return {"letter": letter, "word": word}
    alphabet = _VOWELS + _CONSONANTS
    return {"letter": rng.choice(word if rng.random() < 0.7 else alphabet), "word": word}


def _sample_letter(rng: random.Random) -> Fields:
    word = _word(rng, 3, 7)
    return {"ordinal": rng.choice(ORDINALS[: min(len(word), 5)] + ORDINALS[-1:]), "word": word}


def _sample_months(rng: random.Random) -> Fields:
    return {"months": ", ".join(rng.sample(MONTHS, rng.randint(3, 4)))}


# Answers and worked solutions.


def _ints(fields: Fields) -> list[int]:
    return [int(x) for x in fields["numbers"].split(", ")]


def _join(values: list[int] | list[str]) -> str:
    return ", ".join(map(str, values))


def _work_sum(fields: Fields) -> str:
    a, b = int(fields["a"]), int(fields["b"])
    ones = a % 10 + b % 10
    steps = [f"{a % 10}+{b % 10}={ones}"]
    if a > 9 or b > 9:
        carry = "+1" if ones > 9 else ""
        steps.append(f"{a // 10}+{b // 10}{carry}={a // 10 + b // 10 + ones // 10}")
    return ", ".join(steps) + "."


def _work_difference(fields: Fields) -> str:
    a, b = int(fields["a"]), int(fields["b"])
    borrow = a % 10 < b % 10
    top = a % 10 + 10 * borrow
    steps = [f"{top}-{b % 10}={top - b % 10}"]
    if a > 9:
        steps.append(f"{a // 10}-{b // 10}{'-1' * borrow}={a // 10 - b // 10 - borrow}")
    return ", ".join(steps) + "."


def _work_extreme(fields: Fields, pick: Callable[[int, int], int]) -> str:
    numbers = _ints(fields)
    best, steps = numbers[0], []
    for x in numbers[1:]:
        steps.append(f"{best}{'<' if best < x else '>'}{x}")
        best = pick(best, x)
    return ", ".join(steps) + "."


def _compare(fields: Fields) -> str:
    a, b = int(fields["a"]), int(fields["b"])
    return "yes" if (a > b) == (fields["relation"] in ("greater", "larger")) else "no"


def _work_comparison(fields: Fields) -> str:
    a, b = int(fields["a"]), int(fields["b"])
    return f"{a}{'>' if a > b else '<'}{b}."


def _work_sequence(fields: Fields) -> str:
    numbers = _ints(fields)
    step = numbers[1] - numbers[0]
    return f"Step {step}: {numbers[-1]}+{step}={numbers[-1] + step}."


def _work_count(fields: Fields) -> str:
    count, steps = 0, []
    for c in fields["word"]:
        count += c == fields["letter"]
        steps.append(f"{c}{count}")
    return " ".join(steps) + "."


def _nth(fields: Fields) -> str:
    at = ORDINALS.index(fields["ordinal"])
    return fields["word"][-1 if fields["ordinal"] == "last" else at]


def _spell(word: str) -> str:
    return " ".join(f"{c}{i}" for i, c in enumerate(word, 1)) + "."


def _work_letter(fields: Fields) -> str:
    at = ORDINALS.index(fields["ordinal"])
    word = fields["word"]
    return _spell(word if fields["ordinal"] == "last" else word[: at + 1])


def _sort_months(fields: Fields) -> str:
    return _join(sorted(fields["months"].split(", "), key=MONTHS.index))


def _work_months(fields: Fields) -> str:
    return (
        ", ".join(f"{m} {MONTHS.index(m) + 1}" for m in sorted(fields["months"].split(", "))) + "."
    )


# Keys.


def _unordered(fields: Fields) -> str:
    values = fields.get("numbers") or fields.get("months") or ""
    return _join(sorted(values.split(", ") if values else [fields["a"], fields["b"]]))


def _ordered(fields: Fields) -> str:
    return _join(list(fields.values()))


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "add",
            (
                "What is {a} plus {b}?",
                "Add {a} and {b}.",
                "What is the sum of {a} and {b}?",
                "How much is {a} + {b}?",
                "I had {a} coins and got {b} more. How many coins do I have now?",
            ),
            _sample_sum,
            lambda f: str(int(f["a"]) + int(f["b"])),
            _work_sum,
            _unordered,
        ),
        Family(
            "subtract",
            (
                "What is {a} minus {b}?",
                "Subtract {b} from {a}.",
                "How much is {a} - {b}?",
                "Take {b} away from {a}. What is left?",
                "I had {a} coins and lost {b}. How many coins are left?",
            ),
            _sample_difference,
            lambda f: str(int(f["a"]) - int(f["b"])),
            _work_difference,
            _ordered,
        ),
        Family(
            "largest",
            (
                "Which number is the largest: {numbers}?",
                "What is the largest of {numbers}?",
                "Find the biggest number in this list: {numbers}.",
                "Out of {numbers}, which one is the greatest?",
            ),
            lambda rng: {"numbers": _numbers(rng, 3, 5, 3)},
            lambda f: str(max(_ints(f))),
            lambda f: _work_extreme(f, max),
            _unordered,
        ),
        Family(
            "smallest",
            (
                "Which number is the smallest: {numbers}?",
                "What is the smallest of {numbers}?",
                "Find the lowest number in this list: {numbers}.",
                "Out of {numbers}, which one is the least?",
            ),
            lambda rng: {"numbers": _numbers(rng, 3, 5, 3)},
            lambda f: str(min(_ints(f))),
            lambda f: _work_extreme(f, min),
            _unordered,
        ),
        Family(
            "sort_up",
            (
                "Sort these numbers from smallest to largest: {numbers}.",
                "Put {numbers} in ascending order.",
                "Write these numbers in order, lowest first: {numbers}.",
                "What is {numbers} sorted from low to high?",
            ),
            lambda rng: {"numbers": _numbers(rng, 3, 4, 2)},
            lambda f: _join(sorted(_ints(f))),
            lambda f: "<".join(map(str, sorted(_ints(f)))) + ".",
            _unordered,
        ),
        Family(
            "sort_down",
            (
                "Sort these numbers from largest to smallest: {numbers}.",
                "Put {numbers} in descending order.",
                "Write these numbers in order, highest first: {numbers}.",
                "What is {numbers} sorted from high to low?",
            ),
            lambda rng: {"numbers": _numbers(rng, 3, 4, 2)},
            lambda f: _join(sorted(_ints(f), reverse=True)),
            lambda f: ">".join(map(str, sorted(_ints(f), reverse=True))) + ".",
            _unordered,
        ),
        Family(
            "compare",
            (
                "Is {a} {relation} than {b}?",
                "Yes or no: is {a} {relation} than {b}?",
                "Is the number {a} {relation} than the number {b}?",
                "Tell me if {a} is {relation} than {b}.",
            ),
            _sample_comparison,
            _compare,
            _work_comparison,
            _unordered,
        ),
        Family(
            "parity",
            (
                "Is {n} even or odd?",
                "Is the number {n} odd or even?",
                "Even or odd: {n}?",
                "Tell me if {n} is an even or an odd number.",
            ),
            lambda rng: {"n": str(_number(rng, 4))},
            lambda f: "odd" if int(f["n"]) % 2 else "even",
            lambda f: f"Last digit {f['n'][-1]}.",
            _ordered,
        ),
        Family(
            "next",
            (
                "What comes next: {numbers}?",
                "What is the next number in the sequence {numbers}?",
                "Continue the sequence {numbers} with one number.",
                "Which number follows {numbers}?",
            ),
            _sample_sequence,
            lambda f: str(2 * _ints(f)[-1] - _ints(f)[-2]),
            _work_sequence,
            _ordered,
        ),
        Family(
            "reverse",
            (
                "Reverse the word {word}.",
                "Spell {word} backwards.",
                "What is {word} written backwards?",
                "Write the letters of {word} in reverse order.",
            ),
            lambda rng: {"word": _word(rng, 3, 6)},
            lambda f: f["word"][::-1],
            lambda f: " ".join(f["word"][::-1]) + ".",
            _ordered,
        ),
        Family(
            "count",
            (
                "How many times does the letter {letter} appear in {word}?",
                "Count the letter {letter} in the word {word}.",
                "How often is {letter} used in {word}?",
                "How many {letter} are there in {word}?",
            ),
            _sample_count,
            lambda f: str(f["word"].count(f["letter"])),
            _work_count,
            lambda f: _join([f["letter"], f["word"]]),
        ),
        Family(
            "length",
            (
                "How many letters are in the word {word}?",
                "How long is the word {word}?",
                "Count the letters in {word}.",
                "What is the number of letters in {word}?",
            ),
            lambda rng: {"word": _word(rng, 3, 9)},
            lambda f: str(len(f["word"])),
            lambda f: _spell(f["word"]),
            _ordered,
        ),
        Family(
            "letter",
            (
                "What is the {ordinal} letter of {word}?",
                "Which letter comes {ordinal} in the word {word}?",
                "Give me the {ordinal} letter in {word}.",
                "In the word {word}, what is the {ordinal} letter?",
            ),
            _sample_letter,
            _nth,
            _work_letter,
            lambda f: _join([f["ordinal"], f["word"]]),
        ),
        Family(
            "join",
            (
                "Join the words {left} and {right}.",
                "Write {left} and {right} as one word.",
                "Put {left} and {right} together with no space.",
                "What do you get when you write {right} right after {left}?",
            ),
            lambda rng: {"left": _word(rng, 3, 5), "right": _word(rng, 3, 5)},
            lambda f: f["left"] + f["right"],
            lambda f: f"{f['left']}+{f['right']}.",
            lambda f: _join([f["left"], f["right"]]),
        ),
        Family(
            "months",
            (
                "Sort these months from early to late in the year: {months}.",
                "Put {months} in calendar order.",
                "Write these months in order: {months}.",
                "In which order do {months} come in the year?",
            ),
            _sample_months,
            _sort_months,
            _work_months,
            _unordered,
        ),
    )
}

SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("Hello!", "Hello! Ask me a small question."),
    ("Hello", "Hello! Ask me a small question."),
    ("Hi", "Hello! Ask me a small question."),
    ("Hi!", "Hello! Ask me a small question."),
    ("Good morning!", "Good morning! Ask me a small question."),
    ("How are you?", "I am well, thank you. Ask me a small question."),
    ("Thanks!", "You are welcome."),
    ("Thank you.", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Who are you?", "I am the small model that comes with getp."),
    ("What are you?", "I am the small model that comes with getp."),
    ("What is your name?", "I am the small model that comes with getp."),
    ("What can you do?", "I can add, subtract, sort, compare, count letters and reverse words."),
    ("Help", "I can add, subtract, sort, compare, count letters and reverse words."),
    ("Bye", "Goodbye!"),
    ("Goodbye!", "Goodbye!"),
)

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
