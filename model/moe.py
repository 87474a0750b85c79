"""Sparse mixture-of-experts MLP: router, grouping by expert, experts, weighted sum."""

import torch

from model import ops
from model.config import ModelConfig
from model.layers import Linear, declare
from model.ops.reference import MXFP4_BLOCK
from model.sharding import ALONE, Shard


class Experts:
    """The experts of one layer; rows of `gate_up` are gate first, then up, in every family."""

    def __init__(self, count: int, hidden: int, size: int, biases: bool, mxfp4: bool):
        weights = _declare_mxfp4 if mxfp4 else declare
        self.gate_up: ops.ExpertWeights = weights(count, 2 * size, hidden)
        self.down: ops.ExpertWeights = weights(count, hidden, size)
        self.gate_up_bias = declare(count, 2 * size) if biases else None
        self.down_bias = declare(count, hidden) if biases else None


def _declare_mxfp4(count: int, outputs: int, inputs: int) -> ops.Mxfp4:
    groups = inputs // MXFP4_BLOCK
    return ops.Mxfp4(declare(count, outputs, groups, 16), declare(count, outputs, groups))


class Moe:
    """top_k of the experts for each token, summed with the router's weights.

    Ranks share the experts out, each of them whole, and every rank has the router.
    """

    def __init__(self, config: ModelConfig, shard: Shard = ALONE):
        if config.moe is None:
            raise ValueError("the model has no experts")
        self.config, self.shard = config.moe, shard
        self.limit, self.alpha = config.swiglu_limit, config.swiglu_alpha
        self.router = Linear(config.hidden_size, self.config.num_experts, self.config.biases)
        self.experts = Experts(
            self.config.num_experts // shard.size,
            config.hidden_size,
            self.config.intermediate_size,
            self.config.biases,
            config.mxfp4_experts,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden] → [tokens, hidden]."""
        config, experts = self.config, self.experts
        chosen, weights = ops.route(
            self.router(x), config.top_k, config.softmax_after_top_k, config.normalize
        )
        own = ops.experts(
            x,
            chosen,
            weights,
            experts.gate_up,
            experts.gate_up_bias,
            experts.down,
            experts.down_bias,
            self.limit,
            self.alpha,
            (self.shard.rank, self.shard.size),
        )
        return self.shard.sum(own)
