"""Launches of sampling with top-k and top-p: the passes of three searches."""

import torch
import triton

from model.ops.triton.kernels.sampling import count_digits, find_token, row_maxima
from model.ops.triton.tiles import Target

_BLOCK = 2048  # tokens that a program tests for the prefix at a time
_PART = 256  # tokens that a program counts at a time
_SPLITS = 64  # maximum number of programs of a row; each reads the sums of all of them
_KEY_BITS = 16
_BITS = 4  # bits of a digit: 16 counters fit in a thread's registers
_TOP_K, _TOP_P, _SAMPLE = range(1, 4)  # purpose of a search


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
    target: Target,
) -> torch.Tensor:
    """As `Backend.sample`, for vocabularies of up to a million tokens."""
    logits, temperature, top_p = logits.contiguous(), temperature.contiguous(), top_p.contiguous()
    top_k = None if top_k is None else top_k.contiguous()
    uniform = uniform.contiguous()
    rows, vocab = logits.shape
    tokens = logits.new_empty(rows, dtype=torch.int64)
    if not rows:
        return tokens
    # Rows of small batches are split over the device. More programs than it can run at once would
    # only read more tables.
    splits = min(_SPLITS, triton.cdiv(4 * target.processors, rows))
    span = triton.cdiv(triton.cdiv(vocab, splits), _BLOCK) * _BLOCK
    splits = triton.cdiv(vocab, span)
    passes = _KEY_BITS // _BITS
    goals = (_TOP_P, _SAMPLE) if top_k is None else (_TOP_K, _TOP_P, _SAMPLE)
    steps = [(0, False, _KEY_BITS - _BITS)]
    for goal in goals:
        for i in range(1, passes):
            steps.append((goal if i == 1 else 0, goal == _TOP_K, _KEY_BITS - _BITS * (i + 1)))
    highest = logits.new_empty(rows, splits, dtype=torch.float32)
    tables = logits.new_empty(len(steps), rows, splits, 2, 16, dtype=torch.int64)
    states = logits.new_empty(len(steps), rows, 4, dtype=torch.int64)
    options = {"BLOCK": _BLOCK, "num_warps": 4, **target.launch_options}
    row_maxima[rows, splits](logits, highest, vocab, span, splits, **options)
    for step, (goal, by_count, shift) in enumerate(steps):
        count_digits[rows, splits](
            logits,
            temperature,
            tokens if top_k is None else top_k,
            top_p,
            uniform,
            highest,
            tables,
            states,
            vocab,
            span,
            splits,
            step,
            goal,
            int(by_count),
            shift,
            PART=_PART,
            SPLITS=_SPLITS,
            TOP_K=_TOP_K,
            TOP_P=_TOP_P,
            **options,
        )
    find_token[(rows,)](
        logits,
        temperature,
        highest,
        tables,
        states,
        tokens,
        vocab,
        span,
        splits,
        len(steps) - 1,
        SPLITS=_SPLITS,
        **options,
    )
    return tokens
