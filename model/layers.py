"""The building blocks of a decoder layer; parameters are shapes until `weights` fills them."""

import torch

from model import ops
from model.sharding import ALONE, Shard


def declare(*shape: int) -> torch.Tensor:
    """A parameter that has a shape and no storage yet."""
    return torch.empty(shape, device="meta")


class Linear:
    """x [tokens, inputs] → [tokens, outputs]; the weight is packed for its device once loaded."""

    def __init__(self, inputs: int, outputs: int, bias: bool):
        self.weight: ops.Weight = declare(outputs, inputs)
        self.bias = declare(outputs) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.weight, self.bias)


class RowLinear(Linear):
    """A linear whose inputs are shared out among ranks: what each makes of its own is summed.

    `inputs` are this rank's. One rank adds the bias, which every rank keeps.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, shard: Shard = ALONE):
        super().__init__(inputs, outputs, bias)
        self.shard = shard

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias if self.shard.rank == 0 else None
        return self.shard.sum(ops.linear(x, self.weight, bias))


class RMSNorm:
    """Root-mean-square normalisation of the residual stream, after adding to it."""

    def __init__(self, size: int, eps: float):
        self.weight = declare(size)
        self.eps = eps

    def __call__(
        self, x: torch.Tensor, delta: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, delta [tokens, size] → (x + delta, its norm); no delta: (x, its norm)."""
        return ops.add_rms_norm(x, delta, self.weight, self.eps)


class Mlp:
    """Dense SwiGLU MLP; gate and up are one linear, gate rows first."""

    def __init__(self, hidden: int, size: int, bias: bool, shard: Shard = ALONE):
        own = size // shard.size
        self.gate_up = Linear(hidden, 2 * own, bias)
        self.down = RowLinear(own, hidden, bias, shard)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = self.gate_up
        return self.down(ops.gated_linear(x, gate_up.weight, gate_up.bias, None, 1.0))
