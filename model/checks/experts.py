"""Cases of a sparse MLP: the router's choice and its experts."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from model.checks.case import Case, Tensors
from model.checks.inputs import Inputs, Weights, parameter_bytes
from model.mlp import Moe
from model.ops.backend import Backend
from model.ops.specs import Experts


def route_cases(layer: Moe, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of the router's choice; logits of a row are all different."""
    router, count = layer.router_spec, layer.router.outputs
    for rows in (1, 5, inputs.size.rows):
        order = torch.stack([inputs.order(count) for _ in range(rows)])
        logits = ((order - count // 2) / 16).to(inputs.dtype)

        def prepare(backend: Backend, logits: torch.Tensor = logits) -> Callable[[], Tensors]:
            own = logits.to(backend.dtype)
            return lambda: backend.route(own, router)

        moved = rows * (count * inputs.dtype.itemsize + 12 * router.top_k)
        yield Case("route", f"{rows} rows", prepare, moved, 0)


def experts_cases(layer: Moe, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of experts: few, some and many rows for each, and experts without rows."""
    shard, top_k = layer.expert_shard, layer.router_spec.top_k
    experts = _fitting(layer.experts, top_k, inputs)
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


def _fitting(experts: Experts, top_k: int, inputs: Inputs) -> Experts:
    """Return as many of the experts as the size of the inputs allows."""
    one = parameter_bytes(replace(experts, count=1), inputs.dtype.itemsize)
    count = max(top_k + 1, inputs.size.weight_bytes // one)
    return replace(experts, count=min(experts.count, count))


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
    chosen, shares = plain.route(logits, router)

    def prepare(backend: Backend) -> Callable[[], Tensors]:
        own, loaded = x.to(backend.dtype), weights.on(backend)
        return lambda: (backend.experts(own, chosen, shares, loaded, layer.activation, shard),)

    item, first = inputs.dtype.itemsize, shard.rank * experts.count
    held = (chosen >= first) & (chosen < first + experts.count)
    used = int(chosen[held].unique().numel())
    moved = weights.bytes(item) * used // experts.count + 2 * x.numel() * item
    flops = 6 * int(held.sum()) * experts.hidden * experts.size
    is_timed = tokens == 1 or tokens >= inputs.size.rows
    return Case("experts", f"{label}, {tokens} tokens", prepare, moved, flops, is_timed)
