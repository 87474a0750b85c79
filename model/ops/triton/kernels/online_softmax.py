"""Attention of a tile of rows to keys and values in blocks, with a running softmax.

Source of the method: Dao et al., FlashAttention-2 (2023), section 3.1.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    top,
    total,
    mixed,
    query,
    query_tail,
    position,
    kv_ptr,
    value_offset,
    block_table_ptr,
    kv_head,
    first,
    unmasked,
    last,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax of rows (query [rows, BLOCK_D], position [rows]) over keys [first, last).

    With a TAIL the cache has latents, which all heads share: values are keys without their last
    TAIL values, and query_tail [rows, BLOCK_T] is multiplied by those.

    Updates the maximum of the scores (base 2), the sum of their exponentials and the weighted sum
    of values. CAUSAL: keys are masked by position and WINDOW. Without a window all rows attend to
    all keys before `unmasked`, a multiple of BLOCK_N, so those need no mask. (With a second loop
    for them Hopper's matrix products would wait for each other, because both loops accumulate in
    the same registers.)
    """
    dim = tl.arange(0, BLOCK_D)
    for start in tl.range(first, last, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        block = tl.load(block_table_ptr + at // BLOCK_SIZE, at < last, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE
        # Slots outside the context may hold anything, also NaN. The scores of such keys are
        # replaced, but a probability of 0 times a value of NaN is NaN, so values are zeroed.
        inside = (at < last)[:, None] & (dim < DIM - TAIL)[None, :]
        if TAIL:
            source = kv_ptr + slot[:, None] * DIM + dim[None, :]
            key = tl.load(source, inside, other=0.0)
            value = key
            behind = tl.arange(0, BLOCK_T)
            place = kv_ptr + slot[:, None] * DIM + DIM - TAIL + behind[None, :]
            tail = tl.load(place, (behind < TAIL)[None, :], other=0.0)
        else:
            source = kv_ptr + (slot * KV_HEADS + kv_head)[:, None] * DIM + dim[None, :]
            if BLOCK_D == DIM:
                key = tl.load(source)
            else:
                key = tl.load(source, (dim < DIM)[None, :], other=0.0)
            value = tl.load(source + value_offset, inside, other=0.0)
        # A cache in fp8 is converted: products of fp8 would also need the query in fp8.
        scores = tl.dot(query, key.to(query.dtype).T, input_precision=PRECISION)
        if TAIL:
            scores = tl.dot(query_tail, tail.to(query.dtype).T, scores, input_precision=PRECISION)
        if SOFTCAP is None:
            scores *= SCALE * LOG2E
        else:  # cap · tanh(s / cap) = cap · (1 - 2 / (e^(2s / cap) + 1))
            power = tl.exp2(scores * (2 * LOG2E * SCALE / SOFTCAP))
            scores = (SOFTCAP * LOG2E) * (1 - 2 / (power + 1))
        if CAUSAL and WINDOW is None:
            if start >= unmasked:
                mask = (at < last)[None, :] & (position[:, None] >= at[None, :])
                scores = tl.where(mask, scores, float("-inf"))
        else:
            mask = (at < last)[None, :]
            if CAUSAL:
                age = position[:, None] - at[None, :]
                mask = mask & (age >= 0) & (age < WINDOW)
            scores = tl.where(mask, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A row without unmasked keys so far has no maximum to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        probs = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(probs, 1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(
            probs.to(query.dtype), value.to(query.dtype), mixed, input_precision=PRECISION
        )
        top = higher
    return top, total, mixed


@triton.jit
def normalize(top, total, mixed, sinks_ptr, head, is_head, SINKS: tl.constexpr):
    """Divide the weighted sums by the sum of exponentials, which includes the head's sink.

    A sink is one more column of the softmax, whose value is zero. Rows without keys give zeros.
    """
    if SINKS:
        sink = tl.load(sinks_ptr + head, is_head, other=0.0).to(tl.float32) * LOG2E
        higher = tl.maximum(top, sink)
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.exp2(sink - higher)
        return mixed * (shrink / total)[:, None]
    return mixed / tl.where(total == 0, 1.0, total)[:, None]
