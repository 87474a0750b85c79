"""The fields of the embedded model's questions: how they are sampled, answered and explained.

All functions take or return the fields of one question: names as in its phrasings → text.
"""

from __future__ import annotations

import random
from collections.abc import Callable

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


# Sampling.


def random_word(rng: random.Random, low: int, high: int) -> str:
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


def random_number(rng: random.Random, digits: int) -> int:
    """Return a number of at most `digits` digits; one in ten is sampled from a single digit."""
    return rng.randrange(10) if rng.random() < 0.1 else rng.randrange(10**digits)


def random_numbers(rng: random.Random, low: int, high: int, digits: int) -> str:
    """Return between `low` and `high` different numbers, separated by commas."""
    count = rng.randint(low, high)
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        chosen[random_number(rng, digits)] = None
    return ", ".join(map(str, chosen))


def sample_sum(rng: random.Random) -> Fields:
    """Sample two numbers of at most two digits."""
    return {"a": str(random_number(rng, 2)), "b": str(random_number(rng, 2))}


def sample_difference(rng: random.Random) -> Fields:
    """Sample two numbers that differ by 10 or more, the larger one first."""
    while True:  # raw answers to differences below 10 are mostly wrong (off by a little)
        a, b = sorted((random_number(rng, 2), random_number(rng, 2)), reverse=True)
        if a - b >= 10:
            return {"a": str(a), "b": str(b)}


def sample_comparison(rng: random.Random) -> Fields:
    """Sample two different numbers and a relation."""
    a, b = random_numbers(rng, 2, 2, 3).split(", ")
    if rng.random() < 0.3 and len(a) == 3:  # same first digit: comparing it alone is not enough
        b = a[0] + f"{rng.randrange(100):02d}"
    if a == b:
        b = str(int(b) + 1)
    return {"a": a, "b": b, "relation": rng.choice(("greater", "larger", "less", "smaller"))}


def sample_sequence(rng: random.Random) -> Fields:
    """Sample four numbers with a constant step."""
    start, step = rng.randrange(100), rng.randint(1, 15)
    return {"numbers": ", ".join(str(start + step * i) for i in range(4))}


def sample_count(rng: random.Random) -> Fields:
    """Sample a word and a letter, which is often in the word more than once."""
    word = random_word(rng, 3, 7)
    if rng.random() < 0.4:  # repeat a letter; otherwise nearly every answer would be 1
        letter, spots = rng.choice(word), rng.sample(range(len(word)), 2)
        word = "".join(letter if i in spots else c for i, c in enumerate(word))
        return {"letter": letter, "word": word}
    alphabet = _VOWELS + _CONSONANTS
    return {"letter": rng.choice(word if rng.random() < 0.7 else alphabet), "word": word}


def sample_letter(rng: random.Random) -> Fields:
    """Sample a word and the position of a letter in it."""
    word = random_word(rng, 3, 7)
    return {"ordinal": rng.choice(ORDINALS[: min(len(word), 5)] + ORDINALS[-1:]), "word": word}


def sample_months(rng: random.Random) -> Fields:
    """Sample three or four months."""
    return {"months": ", ".join(rng.sample(MONTHS, rng.randint(3, 4)))}


# Answers and worked solutions.


def numbers_of(fields: Fields) -> list[int]:
    """Return the field `numbers` as integers."""
    return [int(x) for x in fields["numbers"].split(", ")]


def joined(values: list[int] | list[str]) -> str:
    """Join values as in a question's text, with commas."""
    return ", ".join(map(str, values))


def explain_sum(fields: Fields) -> str:
    """Return the digits' sums, with the carry."""
    a, b = int(fields["a"]), int(fields["b"])
    ones = a % 10 + b % 10
    steps = [f"{a % 10}+{b % 10}={ones}"]
    if a > 9 or b > 9:
        carry = "+1" if ones > 9 else ""
        steps.append(f"{a // 10}+{b // 10}{carry}={a // 10 + b // 10 + ones // 10}")
    return ", ".join(steps) + "."


def explain_difference(fields: Fields) -> str:
    """Return the digits' differences, with the borrow."""
    a, b = int(fields["a"]), int(fields["b"])
    borrow = a % 10 < b % 10
    top = a % 10 + 10 * borrow
    steps = [f"{top}-{b % 10}={top - b % 10}"]
    if a > 9:
        steps.append(f"{a // 10}-{b // 10}{'-1' * borrow}={a // 10 - b // 10 - borrow}")
    return ", ".join(steps) + "."


def explain_extreme(fields: Fields, pick: Callable[[int, int], int]) -> str:
    """Return the comparisons that find the largest or smallest number (`pick`: max or min)."""
    numbers = numbers_of(fields)
    best, steps = numbers[0], []
    for x in numbers[1:]:
        steps.append(f"{best}{'<' if best < x else '>'}{x}")
        best = pick(best, x)
    return ", ".join(steps) + "."


def compare(fields: Fields) -> str:
    """Return "yes" or "no"."""
    a, b = int(fields["a"]), int(fields["b"])
    return "yes" if (a > b) == (fields["relation"] in ("greater", "larger")) else "no"


def explain_comparison(fields: Fields) -> str:
    """Return the two numbers with `<` or `>` between them."""
    a, b = int(fields["a"]), int(fields["b"])
    return f"{a}{'>' if a > b else '<'}{b}."


def explain_sequence(fields: Fields) -> str:
    """Return the step and the last addition."""
    numbers = numbers_of(fields)
    step = numbers[1] - numbers[0]
    return f"Step {step}: {numbers[-1]}+{step}={numbers[-1] + step}."


def explain_count(fields: Fields) -> str:
    """Return the word's letters, each with the count so far."""
    count, steps = 0, []
    for c in fields["word"]:
        count += c == fields["letter"]
        steps.append(f"{c}{count}")
    return " ".join(steps) + "."


def nth_letter(fields: Fields) -> str:
    """Return the letter of the word that the ordinal names."""
    at = ORDINALS.index(fields["ordinal"])
    return fields["word"][-1 if fields["ordinal"] == "last" else at]


def spell(word: str) -> str:
    """Return the word's letters, numbered."""
    return " ".join(f"{c}{i}" for i, c in enumerate(word, 1)) + "."


def explain_letter(fields: Fields) -> str:
    """Return the word's numbered letters, up to the requested one."""
    at = ORDINALS.index(fields["ordinal"])
    word = fields["word"]
    return spell(word if fields["ordinal"] == "last" else word[: at + 1])


def sort_months(fields: Fields) -> str:
    """Return the months in calendar order."""
    return joined(sorted(fields["months"].split(", "), key=MONTHS.index))


def explain_months(fields: Fields) -> str:
    """Return the months in alphabetical order, each with its number."""
    return (
        ", ".join(f"{m} {MONTHS.index(m) + 1}" for m in sorted(fields["months"].split(", "))) + "."
    )


# Keys.


def unordered(fields: Fields) -> str:
    """Return a key that does not depend on the order of numbers, months, or a and b."""
    values = fields.get("numbers") or fields.get("months") or ""
    return joined(sorted(values.split(", ") if values else [fields["a"], fields["b"]]))


def ordered(fields: Fields) -> str:
    """Return a key of all fields in the order given."""
    return joined(list(fields.values()))
