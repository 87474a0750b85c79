"""The router: the top-k experts of each token and their weights, in one pass."""

from typing import Any

import torch
import triton
import triton.language as tl

from model.ops.specs import ExpertGroups, Router, RouterSpec
from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.sort_by_expert import store_sorted
from model.ops.triton.tiles import Target

MAX_PAIRS = 128  # that `route_and_sort` takes, counted with a power of two for each token


@triton.jit
def _within_best_groups(
    ranks,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CHOSEN: tl.constexpr,
    BEST: tl.constexpr,
):
    """ranks [BLOCK_T, BLOCK_E] → the same, but -inf for experts that are not in the best groups."""
    expert, group = tl.arange(0, BLOCK_E)[None, :], tl.arange(0, BLOCK_G)[None, :]
    group_of = expert // (EXPERTS // GROUPS)
    totals = tl.full((BLOCK_T, BLOCK_G), float("-inf"), tl.float32)
    for g in tl.static_range(GROUPS):
        own = tl.where(group_of == g, ranks, float("-inf"))
        total = tl.max(own, 1)
        for _ in tl.static_range(1, BEST):
            own = tl.where(expert == tl.argmax(own, 1)[:, None], float("-inf"), own)
            total += tl.max(own, 1)
        totals = tl.where(group == g, total[:, None], totals)
    kept = tl.zeros((BLOCK_T, BLOCK_E), tl.int1)
    for _ in tl.static_range(CHOSEN):
        best = tl.argmax(totals, 1)[:, None]
        totals = tl.where(group == best, float("-inf"), totals)
        kept = kept | (group_of == best)
    return tl.where(kept, ranks, float("-inf"))


@triton.jit
def _route_tokens(
    logits_ptr,
    correction_ptr,
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
    RANKS_SCORES: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CHOSEN_GROUPS: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    SCALE: tl.constexpr,
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
    scores = logits
    ranks = logits
    if RANKS_SCORES:
        scores = tl.sigmoid(logits) if SIGMOID else tl.exp(logits - highest) / total[:, None]
        ranks = scores
        if CORRECTED:
            ranks += tl.load(correction_ptr + expert, expert < EXPERTS, other=0.0)[None, :]
        ranks = tl.where((expert < EXPERTS)[None, :], ranks, float("-inf"))
        if GROUPS > 1:
            ranks = _within_best_groups(
                ranks, EXPERTS, BLOCK_E, BLOCK_T, GROUPS, BLOCK_G, CHOSEN_GROUPS, GROUP_BEST
            )

    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    values = tl.full((BLOCK_T, BLOCK_K), 0.0 if RANKS_SCORES else float("-inf"), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(ranks, 1)
        # In a row of NaN the index may lie beyond the experts.
        best = tl.minimum(best, EXPERTS - 1)
        is_best = expert[None, :] == best[:, None]
        value = tl.sum(tl.where(is_best, scores, 0.0), 1) if RANKS_SCORES else tl.max(ranks, 1)
        is_rank = (rank == k)[None, :]
        chosen = tl.where(is_rank, best[:, None], chosen)
        values = tl.where(is_rank, value[:, None], values)
        ranks = tl.where(is_best, float("-inf"), ranks)
    if RANKS_SCORES:
        probs = values
        if NORMALIZE:
            probs = probs / (tl.sum(probs, 1)[:, None] + 1e-20)
    else:
        probs = tl.exp(values - highest)
        if AFTER_TOP_K or NORMALIZE:  # equal, because the sum over all experts cancels
            probs = probs / tl.sum(probs, 1)[:, None]
        else:
            probs = probs / total[:, None]
    if SCALE != 1:
        probs *= SCALE
    offset = token[:, None].to(tl.int64) * TOP_K + rank[None, :]
    mask = (token < tokens)[:, None] & (rank < TOP_K)[None, :]
    tl.store(chosen_ptr + offset, chosen.to(tl.int64), mask)
    tl.store(weights_ptr + offset, probs, mask)
    return chosen


@triton.jit(do_not_specialize=["tokens"])
def _route(
    logits_ptr,
    correction_ptr,
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
    RANKS_SCORES: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CHOSEN_GROUPS: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    SCALE: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Route BLOCK_T tokens; grid (⌈tokens / BLOCK_T⌉,).

    logits [tokens, EXPERTS], correction float32 [EXPERTS] (if CORRECTED) → chosen int64 and weights
    float32, both [tokens, TOP_K].
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    _route_tokens(
        logits_ptr, correction_ptr, chosen_ptr, weights_ptr, token, tokens,
        EXPERTS, BLOCK_E, BLOCK_T, TOP_K, BLOCK_K, AFTER_TOP_K, NORMALIZE,
        RANKS_SCORES, SIGMOID, CORRECTED, GROUPS, BLOCK_G, CHOSEN_GROUPS, GROUP_BEST, SCALE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "first"])
def _route_and_sort(
    logits_ptr,
    correction_ptr,
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
    RANKS_SCORES: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CHOSEN_GROUPS: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    SCALE: tl.constexpr,
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
        logits_ptr, correction_ptr, chosen_ptr, weights_ptr, token, tokens,
        EXPERTS, BLOCK_E, BLOCK_T, TOP_K, BLOCK_K, AFTER_TOP_K, NORMALIZE,
        RANKS_SCORES, SIGMOID, CORRECTED, GROUPS, BLOCK_G, CHOSEN_GROUPS, GROUP_BEST, SCALE,
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


def _options(router: RouterSpec, experts: int) -> dict[str, Any]:
    """Return the constants of a router in both kernels."""
    groups = router.groups or ExpertGroups(1, 1, 1)
    return {
        "EXPERTS": experts,
        "BLOCK_E": triton.next_power_of_2(experts),
        "TOP_K": router.top_k,
        "BLOCK_K": triton.next_power_of_2(router.top_k),
        "AFTER_TOP_K": router.softmax_after_top_k,
        "NORMALIZE": router.normalize,
        "RANKS_SCORES": router.ranks_scores,
        "SIGMOID": router.sigmoid,
        "CORRECTED": router.has_correction,
        "GROUPS": groups.count,
        "BLOCK_G": triton.next_power_of_2(groups.count),
        "CHOSEN_GROUPS": groups.chosen,
        "GROUP_BEST": groups.best,
        "SCALE": router.scale,
    }


def route(
    logits: torch.Tensor, router: RouterSpec, correction: torch.Tensor | None, target: Target
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
            logits if correction is None else correction,
            chosen,
            weights,
            tokens,
            BLOCK_T=block,
            num_warps=4,
            **_options(router, count),
            **target.launch_options,
        )
    return chosen, weights


def route_and_sort(
    logits: torch.Tensor, router: Router, first: int, experts: int, target: Target
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`route` and `sort_by_expert` in one kernel → (chosen, weights, order, expert_starts).

    At least one token, and at most MAX_PAIRS pairs.
    """
    logits = logits.contiguous()
    (tokens, count), top_k = logits.shape, router.spec.top_k
    chosen = logits.new_empty(tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(tokens, top_k, dtype=torch.float32)
    order = logits.new_empty(tokens * top_k, dtype=torch.int32)
    expert_starts = logits.new_empty(experts + 1, dtype=torch.int32)
    _route_and_sort[(1,)](
        logits,
        logits if router.correction is None else router.correction,
        chosen,
        weights,
        order,
        expert_starts,
        tokens,
        first,
        BLOCK_T=triton.next_power_of_2(tokens),
        HELD=experts,
        BLOCK_H=triton.next_power_of_2(experts),
        num_warps=8,
        **_options(router.spec, count),
        **target.launch_options,
    )
    return chosen, weights, order, expert_starts
