"""The families of the embedded model's questions, and its small talk."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from question_fields import (
    Fields,
    compare,
    explain_comparison,
    explain_count,
    explain_difference,
    explain_extreme,
    explain_letter,
    explain_months,
    explain_sequence,
    explain_sum,
    joined,
    nth_letter,
    numbers_of,
    ordered,
    random_number,
    random_numbers,
    random_word,
    sample_comparison,
    sample_count,
    sample_difference,
    sample_letter,
    sample_months,
    sample_sequence,
    sample_sum,
    sort_months,
    spell,
    unordered,
)


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
            sample_sum,
            lambda f: str(int(f["a"]) + int(f["b"])),
            explain_sum,
            unordered,
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
            sample_difference,
            lambda f: str(int(f["a"]) - int(f["b"])),
            explain_difference,
            ordered,
        ),
        Family(
            "largest",
            (
                "Which number is the largest: {numbers}?",
                "What is the largest of {numbers}?",
                "Find the biggest number in this list: {numbers}.",
                "Out of {numbers}, which one is the greatest?",
            ),
            lambda rng: {"numbers": random_numbers(rng, 3, 5, 3)},
            lambda f: str(max(numbers_of(f))),
            lambda f: explain_extreme(f, max),
            unordered,
        ),
        Family(
            "smallest",
            (
                "Which number is the smallest: {numbers}?",
                "What is the smallest of {numbers}?",
                "Find the lowest number in this list: {numbers}.",
                "Out of {numbers}, which one is the least?",
            ),
            lambda rng: {"numbers": random_numbers(rng, 3, 5, 3)},
            lambda f: str(min(numbers_of(f))),
            lambda f: explain_extreme(f, min),
            unordered,
        ),
        Family(
            "sort_up",
            (
                "Sort these numbers from smallest to largest: {numbers}.",
                "Put {numbers} in ascending order.",
                "Write these numbers in order, lowest first: {numbers}.",
                "What is {numbers} sorted from low to high?",
            ),
            lambda rng: {"numbers": random_numbers(rng, 3, 4, 2)},
            lambda f: joined(sorted(numbers_of(f))),
            lambda f: "<".join(map(str, sorted(numbers_of(f)))) + ".",
            unordered,
        ),
        Family(
            "sort_down",
            (
                "Sort these numbers from largest to smallest: {numbers}.",
                "Put {numbers} in descending order.",
                "Write these numbers in order, highest first: {numbers}.",
                "What is {numbers} sorted from high to low?",
            ),
            lambda rng: {"numbers": random_numbers(rng, 3, 4, 2)},
            lambda f: joined(sorted(numbers_of(f), reverse=True)),
            lambda f: ">".join(map(str, sorted(numbers_of(f), reverse=True))) + ".",
            unordered,
        ),
        Family(
            "compare",
            (
                "Is {a} {relation} than {b}?",
                "Yes or no: is {a} {relation} than {b}?",
                "Is the number {a} {relation} than the number {b}?",
                "Tell me if {a} is {relation} than {b}.",
            ),
            sample_comparison,
            compare,
            explain_comparison,
            unordered,
        ),
        Family(
            "parity",
            (
                "Is {n} even or odd?",
                "Is the number {n} odd or even?",
                "Even or odd: {n}?",
                "Tell me if {n} is an even or an odd number.",
            ),
            lambda rng: {"n": str(random_number(rng, 4))},
            lambda f: "odd" if int(f["n"]) % 2 else "even",
            lambda f: f"Last digit {f['n'][-1]}.",
            ordered,
        ),
        Family(
            "next",
            (
                "What comes next: {numbers}?",
                "What is the next number in the sequence {numbers}?",
                "Continue the sequence {numbers} with one number.",
                "Which number follows {numbers}?",
            ),
            sample_sequence,
            lambda f: str(2 * numbers_of(f)[-1] - numbers_of(f)[-2]),
            explain_sequence,
            ordered,
        ),
        Family(
            "reverse",
            (
                "Reverse the word {word}.",
                "Spell {word} backwards.",
                "What is {word} written backwards?",
                "Write the letters of {word} in reverse order.",
            ),
            lambda rng: {"word": random_word(rng, 3, 6)},
            lambda f: f["word"][::-1],
            lambda f: " ".join(f["word"][::-1]) + ".",
            ordered,
        ),
        Family(
            "count",
            (
                "How many times does the letter {letter} appear in {word}?",
                "Count the letter {letter} in the word {word}.",
                "How often is {letter} used in {word}?",
                "How many {letter} are there in {word}?",
            ),
            sample_count,
            lambda f: str(f["word"].count(f["letter"])),
            explain_count,
            lambda f: joined([f["letter"], f["word"]]),
        ),
        Family(
            "length",
            (
                "How many letters are in the word {word}?",
                "How long is the word {word}?",
                "Count the letters in {word}.",
                "What is the number of letters in {word}?",
            ),
            lambda rng: {"word": random_word(rng, 3, 9)},
            lambda f: str(len(f["word"])),
            lambda f: spell(f["word"]),
            ordered,
        ),
        Family(
            "letter",
            (
                "What is the {ordinal} letter of {word}?",
                "Which letter comes {ordinal} in the word {word}?",
                "Give me the {ordinal} letter in {word}.",
                "In the word {word}, what is the {ordinal} letter?",
            ),
            sample_letter,
            nth_letter,
            explain_letter,
            lambda f: joined([f["ordinal"], f["word"]]),
        ),
        Family(
            "join",
            (
                "Join the words {left} and {right}.",
                "Write {left} and {right} as one word.",
                "Put {left} and {right} together with no space.",
                "What do you get when you write {right} right after {left}?",
            ),
            lambda rng: {"left": random_word(rng, 3, 5), "right": random_word(rng, 3, 5)},
            lambda f: f["left"] + f["right"],
            lambda f: f"{f['left']}+{f['right']}.",
            lambda f: joined([f["left"], f["right"]]),
        ),
        Family(
            "months",
            (
                "Sort these months from early to late in the year: {months}.",
                "Put {months} in calendar order.",
                "Write these months in order: {months}.",
                "In which order do {months} come in the year?",
            ),
            sample_months,
            sort_months,
            explain_months,
            unordered,
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
