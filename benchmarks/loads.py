"""The loads every engine is timed on: token ids in, a fixed number of tokens out, EOS ignored."""

import random
from typing import Literal

Load = Literal["uniform", "ragged", "single"]


def make_load(kind: Load, vocab: int = 16_000) -> tuple[list[list[int]], list[int]]:
    """(prompts as token ids, output lengths), the same ones every time.

    uniform: 32 prompts of 128 tokens, 128 out: what a static batch does best.
    ragged: 64 prompts of 32 to 256 tokens, 32 to 128 out: what continuous batching is for.
    single: one prompt of 128 tokens, 128 out: bound by memory bandwidth.
    """
    draw = random.Random(0)
    if kind == "ragged":
        sizes = [draw.randint(32, 256) for _ in range(64)]
        outputs = [draw.randint(32, 128) for _ in range(64)]
    else:
        count = 32 if kind == "uniform" else 1
        sizes, outputs = [128] * count, [128] * count
    return [[draw.randint(3, vocab - 1) for _ in range(size)] for size in sizes], outputs
