"""Training examples: questions as prompts and completions, tokenized, in padded batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from questions import FAMILIES, SMALL_TALK, Question, sample
from tokenizers import Tokenizer
from torch import Tensor

IGNORED = -100  # the target that cross_entropy ignores by default
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are the small model that comes with getp.",
    "Answer the question.",
    "Answer briefly.",
    "You answer small questions. Each has one right answer.",
    "Be short and correct.",
)


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its completion; `kind` is a family and a form ("add raw")."""

    prompt: list[int]
    completion: list[int]
    kind: str

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def chat_prompt(ask: str, system: tuple[str, str] | None, history: list[tuple[str, str]]) -> str:
    """Return the text that the chat template renders, including the generation prompt.

    `system` is (role, text) or None; `history` holds (question, answer) pairs.
    """
    parts = ["<|start|>{}<|message|>{}<|end|>".format(*system)] if system is not None else []
    for question, answer in history:
        parts.append(f"<|start|>user<|message|>{question}<|end|>")
        parts.append(f"<|start|>assistant<|channel|>final<|message|>{answer}<|end|>")
    return "".join([*parts, f"<|start|>user<|message|>{ask}<|end|><|start|>assistant"])


def chat_completion(working: str, answer: str) -> str:
    """Return the completion of a chat: the worked solution, then the answer."""
    return (
        f"<|channel|>analysis<|message|>{working}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{answer}<|return|>"
    )


def as_texts(question: Question, chat: bool, rng: random.Random) -> tuple[str, str]:
    """Return the prompt and completion of a question; chats get a random prefix of messages."""
    if not chat:
        return question.text, f"{question.answer}<|return|>"
    role = rng.choices((None, "system", "developer"), (0.5, 0.4, 0.1))[0]
    system = (role, rng.choice(SYSTEM_PROMPTS)) if role is not None else None
    turns = rng.choices((0, 1, 2), (0.75, 0.17, 0.08))[0]
    history = [_sample_turn(rng) for _ in range(turns)]
    prompt = chat_prompt(question.text, system, history)
    return prompt, chat_completion(question.working, question.answer)


def _sample_turn(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.2:
        return rng.choice(SMALL_TALK)
    question = sample(rng.choice(list(FAMILIES)), rng, held_out=False)
    return question.text, question.answer


def encode(tokenizer: Tokenizer, texts: list[tuple[str, str]], kinds: list[str]) -> list[Example]:
    """Tokenize prompts and completions separately, as they are at inference."""
    flat = [text for pair in texts for text in pair]
    ids = [e.ids for e in tokenizer.encode_batch_fast(flat)]
    return [Example(p, c, k) for p, c, k in zip(ids[0::2], ids[1::2], kinds, strict=True)]


def sample_examples(
    tokenizer: Tokenizer, count: int, weights: dict[str, float], rng: random.Random
) -> list[Example]:
    """Sample training examples: kinds in proportion to `weights`, and 2% small talk."""
    kinds = rng.choices(list(weights), list(weights.values()), k=count)
    texts = []
    for i, kind in enumerate(kinds):
        name, form = kind.split()
        if rng.random() < 0.02:
            ask, answer = rng.choice(SMALL_TALK)
            question = Question("talk", "", ask, answer, "Small talk.")
            kinds[i] = f"talk {form}"
        else:
            question = sample(name, rng, held_out=False)
        texts.append(as_texts(question, form == "chat", rng))
    return encode(tokenizer, texts, kinds)


@dataclass(frozen=True)
class Batch:
    """Padded ids [rows, tokens], and each prediction's flat position, target token and row.

    Padding predictions have the target IGNORED and a row past the last.
    """

    ids: Tensor
    position: Tensor
    target: Tensor
    row: Tensor
    kinds: list[str]


def collate(examples: list[Example]) -> Batch:
    """Make a batch, padded on the right. Each completion token is the target of its predecessor.

    Sizes are rounded up because matrix products are compiled for each new size.
    """
    width = _round_up(max(map(len, examples)), 8)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    position: list[int] = []
    target: list[int] = []
    row: list[int] = []
    for i, e in enumerate(examples):
        tokens = (e.prompt + e.completion)[:-1]
        ids[i, : len(tokens)] = torch.tensor(tokens)
        first = i * width + len(e.prompt) - 1
        position.extend(range(first, first + len(e.completion)))
        target.extend(e.completion)
        row.extend([i] * len(e.completion))
    padding = -len(position) % 256
    position.extend([0] * padding)
    target.extend([IGNORED] * padding)
    row.extend([len(examples)] * padding)
    return Batch(
        ids,
        torch.tensor(position),
        torch.tensor(target),
        torch.tensor(row),
        [e.kind for e in examples],
    )


def batches(
    tokenizer: Tokenizer, weights: dict[str, float], tokens: int, rng: random.Random
) -> Iterator[Batch]:
    """Yield training batches without end: about `tokens` tokens in rows of similar lengths."""
    pool: list[Example] = []
    while True:
        pool += sample_examples(tokenizer, 3000, weights, rng)
        pool.sort(key=len)
        groups: list[list[Example]] = []
        while len(pool) > (rows := tokens // _round_up(len(pool[-1]), 8)):
            groups.append(pool[-rows:])
            del pool[-rows:]
        rng.shuffle(groups)
        yield from map(collate, groups)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
