"""The router: the top-k experts of each token and their weights, in one pass."""

import torch
import triton
import triton.language as tl

from model.ops.specs import RouterSpec
from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.sort_by_expert import store_sorted
from model.ops.triton.tiles import Target

MAX_PAIRS = 128  # that `route_and_sort` takes, counted with a power of two for each token


@triton.jit
def _route_tokens(
    logits_ptr,
    chosen_ptr,
    weights_ptr,
    token,
    tokens,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AFTER_TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Route the tokens `token` [BLOCK_T], as `_route` → chosen int32 [BLOCK_T, BLOCK_K]."""
    expert = tl.arange(0, BLOCK_E)
    rank = tl.arange(0, BLOCK_K)
    inside = (token < tokens)[:, None] & (expert < EXPERTS)[None, :]
    source = logits_ptr + token[:, None].to(tl.int64) * EXPERTS + expert[None, :]
    logits = tl.load(source, inside, other=0.0).to(tl.float32)
    logits = tl.where((expert < EXPERTS)[None, :], logits, float("-inf"))
    highest = tl.max(logits, 1)[:, None]
    total = tl.sum(tl.exp(logits - highest), 1)

    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    values = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(logits, 1)
        # In a row of NaN the index may lie beyond the experts.
        best = tl.minimum(best, EXPERTS - 1)
        value = tl.max(logits, 1)
        is_rank = (rank == k)[None, :]
        chosen = tl.where(is_rank, best[:, None], chosen)
        values = tl.where(is_rank, value[:, None], values)
        logits = tl.where(expert[None, :] == best[:, None], float("-inf"), logits)
    probs = tl.exp(values - highest)
    if AFTER_TOP_K or NORMALIZE:  # equal, because the sum over all experts cancels
        probs = probs / tl.sum(probs, 1)[:, None]
    else:
        probs = probs / total[:, None]
    offset = token[:, None].to(tl.int64) * TOP_K + rank[None, :]
    mask = (token < tokens)[:, None] & (rank < TOP_K)[None, :]
    tl.store(chosen_ptr + offset, chosen.to(tl.int64), mask)
    tl.store(weights_ptr + offset, probs, mask)
    return chosen


@triton.jit(do_not_specialize=["tokens"])
def _route(
    logits_ptr,
    chosen_ptr,
    weights_ptr,
    tokens,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AFTER_TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Route BLOCK_T tokens; grid (⌈tokens / BLOCK_T⌉,).

    logits [tokens, EXPERTS] → chosen int64 and weights float32, both [tokens, TOP_K].
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    _route_tokens(
        logits_ptr, chosen_ptr, weights_ptr, token, tokens,
        EXPERTS, BLOCK_E, BLOCK_T, TOP_K, BLOCK_K, AFTER_TOP_K, NORMALIZE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "first"])
def _route_and_sort(
    logits_ptr,
    chosen_ptr,
    weights_ptr,
    order_ptr,
    expert_starts_ptr,
    tokens,
    first,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AFTER_TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """As `_route`, then sort the pairs by expert as `_sort_by_expert` does; grid (1,).

    HELD experts from `first` on are sorted; BLOCK_H is the power of two from HELD on.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    token = tl.arange(0, BLOCK_T)
    chosen = _route_tokens(
        logits_ptr, chosen_ptr, weights_ptr, token, tokens,
        EXPERTS, BLOCK_E, BLOCK_T, TOP_K, BLOCK_K, AFTER_TOP_K, NORMALIZE,
    )  # fmt: skip
    PAIRS: tl.constexpr = BLOCK_T * BLOCK_K
    lane = tl.arange(0, PAIRS)
    rank = lane % BLOCK_K
    is_pair = (lane // BLOCK_K < tokens) & (rank < TOP_K)
    pair = lane // BLOCK_K * TOP_K + rank
    local_expert = tl.where(is_pair, chosen.reshape(PAIRS) - first, -1)
    held = tl.arange(0, BLOCK_H)
    total = tl.sum((local_expert[:, None] == held[None, :]).to(tl.int32), 0)
    store_sorted(
        order_ptr, expert_starts_ptr, pair, local_expert, total, tl.zeros_like(total), 0,
        HELD, BLOCK_H, PAIRS,
    )  # fmt: skip


def route(
    logits: torch.Tensor, router: RouterSpec, target: Target
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Backend.route`; of equal logits the lower expert comes first."""
    logits = logits.contiguous()
    (tokens, count), top_k = logits.shape, router.top_k
    chosen = logits.new_empty(tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(tokens, top_k, dtype=torch.float32)
    if tokens:
        block = 4
        _route[(triton.cdiv(tokens, block),)](
            logits,
            chosen,
            weights,
            tokens,
            EXPERTS=count,
            BLOCK_E=triton.next_power_of_2(count),
            BLOCK_T=block,
            TOP_K=top_k,
            BLOCK_K=triton.next_power_of_2(top_k),
            AFTER_TOP_K=router.softmax_after_top_k,
            NORMALIZE=router.normalize,
            num_warps=4,
            **target.launch_options,
        )
    return chosen, weights


def route_and_sort(
    logits: torch.Tensor, router: RouterSpec, first: int, experts: int, target: Target
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`route` and `sort_by_expert` in one kernel → (chosen, weights, order, expert_starts).

    At least one token, and at most MAX_PAIRS pairs.
    """
    logits = logits.contiguous()
    (tokens, count), top_k = logits.shape, router.top_k
    chosen = logits.new_empty(tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(tokens, top_k, dtype=torch.float32)
    order = logits.new_empty(tokens * top_k, dtype=torch.int32)
    expert_starts = logits.new_empty(experts + 1, dtype=torch.int32)
    _route_and_sort[(1,)](
        logits,
        chosen,
        weights,
        order,
        expert_starts,
        tokens,
        first,
        EXPERTS=count,
        BLOCK_E=triton.next_power_of_2(count),
        BLOCK_T=triton.next_power_of_2(tokens),
        TOP_K=top_k,
        BLOCK_K=triton.next_power_of_2(top_k),
        AFTER_TOP_K=router.softmax_after_top_k,
        NORMALIZE=router.normalize,
        HELD=experts,
        BLOCK_H=triton.next_power_of_2(experts),
        num_warps=8,
        **target.launch_options,
    )
    return chosen, weights, order, expert_starts
