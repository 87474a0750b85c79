"""Cases of a sparse MLP: the router's choice, its experts, and the sum with the shared one."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from model.checks.case import Case, Tensors
from model.checks.inputs import Inputs, Weights, parameter_bytes
from model.layers.mlp import Moe
from model.ops.backend import Backend
from model.ops.experts import group_scores, router_scores, within_best_groups
from model.ops.specs import Experts, Norm, Router, RouterSpec, SharedExpert


def route_cases(layer: Moe, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of the router's choice; logits of a row are all different."""
    router, count = layer.router_spec, layer.router.outputs
    correction = _correction(layer, count, inputs)
    for rows in (1, 5, inputs.size.rows):
        order = torch.stack([inputs.order(count) for _ in range(rows)])
        logits = ((order - count // 2) / 16).float()

        def prepare(backend: Backend, logits: torch.Tensor = logits) -> Callable[[], Tensors]:
            return lambda: backend.route(logits, router, correction)

        moved = rows * (4 * count + 12 * router.top_k)
        yield Case("route", f"{rows} rows", prepare, moved, 0)


def _correction(layer: Moe, count: int, inputs: Inputs) -> torch.Tensor | None:
    """Return the correction of a router of `count` experts, if the layer has one."""
    if not (layer.router_spec.has_correction or layer.router_spec.scales_experts):
        return None
    return inputs.normal(count, scale=0.2, dtype=torch.float32)


def experts_cases(layer: Moe, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of experts: few, some and many rows for each, and experts without rows."""
    shard, top_k = layer.expert_shard, layer.router_spec.top_k
    experts = _fitting(layer.experts, layer.router_spec, inputs)
    weights = Weights(experts, inputs)
    every = experts.count * shard.size
    # Rows of an expert: one, some of a tile, a tile and a short rest, and more than a large tile.
    means = {"one token": 0, "few rows": 5, "some rows": 40, "many rows": 150}
    counts = {
        min(max(1, mean * every // top_k), inputs.size.tokens): label
        for label, mean in means.items()
    }
    for tokens, label in counts.items():
        yield _experts_case(layer, weights, tokens, every, label, inputs)


def _fitting(experts: Experts, router: RouterSpec, inputs: Inputs) -> Experts:
    """Return as many of the experts as the size of the inputs allows, without the shared one."""
    one = parameter_bytes(replace(experts, count=1), inputs.dtype.itemsize)
    count = router.smallest_count(max(router.top_k + 1, inputs.size.weight_bytes // one))
    return replace(experts, count=min(experts.count, count), shared=None)


def _experts_case(
    layer: Moe, weights: Weights, tokens: int, every: int, label: str, inputs: Inputs
) -> Case:
    experts, shard, router = weights.holder, layer.expert_shard, layer.router_spec
    x = inputs.normal(tokens, experts.hidden)
    logits = inputs.normal(tokens, every, dtype=torch.float32)
    if every > router.top_k:
        logits[:, shard.rank * experts.count] -= 1000  # an expert without rows
    logits[: tokens // 2, shard.rank * experts.count + experts.count - 1] += 1000  # a busy one
    plain = Backend(inputs.device, torch.float32)
    chosen, shares = plain.route(logits, replace(router, groups=None))

    def prepare(backend: Backend) -> Callable[[], Tensors]:
        own, loaded = x.to(backend.dtype), weights.on(backend)
        return lambda: (backend.experts(own, chosen, shares, loaded, layer.activation, shard),)

    item, first = inputs.dtype.itemsize, shard.rank * experts.count
    held = (chosen >= first) & (chosen < first + experts.count)
    used = int(chosen[held].unique().numel())
    moved = weights.bytes(item) * used // experts.count + 2 * x.numel() * item
    flops = 6 * int(held.sum()) * experts.hidden * experts.size
    is_timed = tokens == 1 or tokens >= inputs.size.rows
    label = f"{label}, {tokens} tokens"
    return Case("experts", label, prepare, moved, flops, is_timed, weights.tolerance)


def norm_experts_cases(layer: Moe, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of norm, router and experts in one, for few and for some rows."""
    shard, spec, norm = layer.expert_shard, layer.router_spec, inputs.norm(layer.norm)
    experts = Weights(_fitting(layer.experts, spec, inputs), inputs)
    router = Weights(replace(layer.router, outputs=experts.holder.count * shard.size), inputs)
    correction = _correction(layer, router.holder.outputs, inputs)
    item, hidden = inputs.dtype.itemsize, norm.size
    for rows in (1, 5, min(16, inputs.size.rows)):
        x, delta = _clear_rows(rows, norm, router, Router(layer.router, spec, correction), inputs)

        def prepare(
            backend: Backend, x: torch.Tensor = x, delta: torch.Tensor = delta
        ) -> Callable[[], Tensors]:
            own = delta.to(backend.dtype)
            chooses = Router(router.on(backend), spec, correction)
            loaded = experts.on(backend)

            def call() -> Tensors:
                summed, out = backend.norm_experts(
                    x, own, norm, chooses, loaded, layer.activation, shard
                )
                return summed, out if out.dim() == 2 else out.sum(1, dtype=torch.float32)

            return call

        used = min(rows * spec.top_k, experts.holder.count)
        moved = router.bytes(item) + experts.bytes(item) * used // experts.holder.count
        flops = 6 * rows * spec.top_k * hidden * experts.holder.size
        moved += rows * hidden * (8 + 2 * item)
        label = f"{rows} rows"
        yield Case("norm_experts", label, prepare, moved, flops, rows == 1, experts.tolerance)


def _clear_rows(
    rows: int, norm: Norm, weights: Weights, router: Router, inputs: Inputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and delta [rows, hidden] for which rounding does not change the choice of experts.

    They are those of many random rows whose last chosen expert, and group of experts, is clearest
    ahead of the next.
    """
    x = inputs.normal(64 * rows, norm.size, dtype=torch.float32)
    delta = inputs.normal(64 * rows, norm.size)
    plain, spec = Backend(inputs.device, torch.float32), router.spec
    _, normed = plain.add_rms_norm(x, delta.float(), norm)
    logits = plain.linear(normed, weights.on(plain))
    ranks = logits
    if spec.ranks_scores:
        ranks = router_scores(logits, spec)
        if router.correction is not None:
            ranks = ranks + router.correction
    ahead = torch.full((64 * rows,), float("inf"), device=x.device)
    if spec.groups is not None:
        ahead = _lead(group_scores(ranks, spec.groups), spec.groups.chosen)
        ranks = within_best_groups(ranks, spec.groups)
    ahead = ahead.minimum(_lead(ranks, spec.top_k))
    best = ahead.topk(rows).indices
    return x[best], delta[best]


def _lead(ranks: torch.Tensor, chosen: int) -> torch.Tensor:
    """Return how far the last of those chosen is ahead of the next in each row."""
    ordered = ranks.sort(-1, descending=True).values
    if ordered.shape[1] == chosen:
        return torch.full_like(ordered[:, 0], float("inf"))
    return ordered[:, chosen - 1] - ordered[:, chosen]


def add_gated_cases(shared: SharedExpert, hidden: int, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of adding the shared expert's result to that of the others."""
    item = inputs.dtype.itemsize
    for shape in ((1, 3, hidden), (3, hidden), (inputs.size.rows, hidden)):
        x, y = inputs.normal(*shape), inputs.normal(shape[0], hidden)
        gate = None if shared.gate is None else inputs.normal(shape[0], 1)

        def prepare(
            backend: Backend, x: torch.Tensor = x, y: torch.Tensor = y, gate: Any = gate
        ) -> Callable[[], Tensors]:
            own = [one.to(backend.dtype) for one in (x, y)]
            own_gate = None if gate is None else gate.to(backend.dtype)
            return lambda: (backend.add_gated(own[0], own[1], own_gate),)

        moved = (x.numel() + 2 * y.numel()) * item
        yield Case("add_gated", f"{shape[0]} rows", prepare, moved, 0)
