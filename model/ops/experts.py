"""The operations of mixtures of experts in plain torch: router, routed and shared experts."""

import torch
import torch.nn.functional as F

from model.ops.dense import DenseOps
from model.ops.specs import (
    Activation,
    ExpertGroups,
    Experts,
    ExpertShard,
    Norm,
    Router,
    RouterSpec,
    SharedExpert,
)
from model.ops.step_parts import ACTIVATION, DOWN_PROJ, POST_NORM, ROUTER

SMALLEST_SUM = 1e-20
"""Is added to the sum of a token's router weights, of which sigmoids may all be 0."""


class ExpertOps(DenseOps):
    """The part of `Backend` that layers with experts use."""

    def norm_experts(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        norm: Norm,
        router: Router,
        experts: Experts,
        activation: Activation,
        shard: ExpertShard = ExpertShard(),  # noqa: B008 - immutable
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`add_rms_norm`, `logits`, `route`, `experts`, `shared_expert` → (x + delta, their sum).

        A backend may leave their sum to the next norm and return [tokens, parts, hidden], where it
        takes such a delta and the shard holds all experts.
        """
        with POST_NORM:
            x, normed = self.add_rms_norm(x, delta, norm)
        with ROUTER:
            logits = self.logits(normed, router.linear, 1)
            chosen, weights = self.route(logits, router.spec, router.correction)
        out = self.experts(normed, chosen, weights, experts, activation, shard)
        if experts.shared is not None:
            out = self.shared_expert(normed, out, experts.shared, activation)
        return x, out

    def route(
        self, logits: torch.Tensor, router: RouterSpec, correction: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [tokens, experts] → (experts int64, weights), both [tokens, top_k].

        Logits and weights are float32.

        correction: float32 [experts], added to the scores for the choice alone; or, if the router
        scales experts, a factor of each expert's weights.
        """
        factors = None
        if router.scales_experts:
            factors, correction = correction, None
        if router.softmax_after_top_k:
            chosen, experts = logits.topk(router.top_k, dim=-1)
            return experts, chosen.softmax(-1)
        scores = router_scores(logits, router)
        ranks = scores if correction is None else scores + correction
        if router.groups is not None:
            ranks = within_best_groups(ranks, router.groups)
        experts = ranks.topk(router.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if router.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + SMALLEST_SUM)
        if factors is not None:
            weights = weights * factors[experts]
        return experts, self.scale(weights, router.scale)

    def shared_expert(
        self, x: torch.Tensor, routed: torch.Tensor, shared: SharedExpert, activation: Activation
    ) -> torch.Tensor:
        """x [tokens, hidden] → its shared expert, which is added to the sum of the others."""
        inner = self.gated_linear(x, shared.gate_up, activation)
        with DOWN_PROJ:
            out = self.linear(inner, shared.down)
            gate = None if shared.gate is None else self.linear(x, shared.gate)
            return self.add_gated(routed, out, gate)

    def add_gated(
        self, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None
    ) -> torch.Tensor:
        """x + sigmoid(gate) · y [tokens, size], or x + y without a gate [tokens, 1].

        x may also be the parts of a sum as from `norm_experts`, [tokens, parts, size].
        """
        if x.dim() == 3:
            x = x.sum(1, dtype=torch.float32)
        wide = y.float() if gate is None else gate.float().sigmoid() * y.float()
        return (x.float() + wide).to(y.dtype)

    def experts(
        self,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        experts: Experts,
        activation: Activation,
        shard: ExpertShard = ExpertShard(),  # noqa: B008 - immutable
    ) -> torch.Tensor:
        """Weighted sum of each token's experts, of those that this shard holds.

        x [tokens, hidden]; chosen (expert ids over all shards) and weights [tokens, top_k] →
        [tokens, hidden].
        """
        out = torch.zeros_like(x, dtype=torch.float32)
        first = shard.rank * experts.count
        for expert in range(experts.count):
            token, rank = torch.where(chosen == first + expert)
            weight = experts.format.dense(experts.gate_up[expert], x.dtype)
            inner = F.linear(x[token], weight, _row(experts.gate_up_bias, expert))
            with ACTIVATION:
                inner = self.activate(inner, activation)
            with DOWN_PROJ:
                weight = experts.format.dense(experts.down[expert], x.dtype)
                result = F.linear(inner, weight, _row(experts.down_bias, expert))
                out.index_add_(0, token, result.float() * weights[token, rank, None].float())
        return out.to(x.dtype)


def router_scores(logits: torch.Tensor, router: RouterSpec) -> torch.Tensor:
    """Logits float32 [tokens, experts] → scores, of which the weights of the chosen are taken."""
    return logits.sigmoid() if router.sigmoid else logits.softmax(-1)


def group_scores(ranks: torch.Tensor, groups: ExpertGroups) -> torch.Tensor:
    """ranks [tokens, experts] → the sum of the highest of each group [tokens, groups]."""
    return ranks.unflatten(-1, (groups.count, -1)).topk(groups.best, dim=-1).values.sum(-1)


def within_best_groups(ranks: torch.Tensor, groups: ExpertGroups) -> torch.Tensor:
    """ranks [tokens, experts] → the same, but -inf for experts that are not in the best groups."""
    totals = group_scores(ranks, groups)
    best = totals.topk(groups.chosen, dim=-1).indices
    is_out = torch.ones_like(totals, dtype=torch.bool).scatter_(-1, best, False)
    return ranks.masked_fill(
        is_out.repeat_interleave(ranks.shape[-1] // groups.count, -1), float("-inf")
    )


def _row(bias: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if bias is None else bias[expert]
