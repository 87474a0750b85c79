"""The loads that all engines are timed on: token ids in, a fixed number of tokens out, no EOS."""

import random
from typing import Literal

Load = Literal["uniform", "ragged", "single"]


def make_load(kind: Load, vocab: int = 16_000) -> tuple[list[list[int]], list[int]]:
    """Return (prompts as token ids, output lengths), which are the same in every call.

    uniform: 32 prompts of 128 tokens, 128 out: the best case of a static batch.
    ragged: 64 prompts of 32 to 256 tokens, 32 to 128 out: needs continuous batching.
    single: one prompt of 128 tokens, 128 out: bound by memory bandwidth.
    """
    rng = random.Random(0)
    if kind == "ragged":
        sizes = [rng.randint(32, 256) for _ in range(64)]
        outputs = [rng.randint(32, 128) for _ in range(64)]
    else:
        count = 32 if kind == "uniform" else 1
        sizes, outputs = [128] * count, [128] * count
    return [[rng.randint(3, vocab - 1) for _ in range(size)] for size in sizes], outputs
