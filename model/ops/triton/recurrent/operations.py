"""TritonRecurrentOps: the operations of recurrent layers as Triton kernels."""

from typing import Protocol

import torch

from model.ops.forward_batch import ForwardBatch
from model.ops.recurrent import RecurrentOps
from model.ops.specs import DeltaRuleGates, Norm
from model.ops.triton.recurrent.convolution import causal_conv, gated_norm, output_gate
from model.ops.triton.recurrent.delta_rule import delta_rule
from model.ops.triton.tiles import Target


class _HasTarget(Protocol):
    def _target(self, op: str) -> Target: ...


class TritonRecurrentOps(RecurrentOps):
    """The part of `TritonBackend` that recurrent layers use."""

    def causal_conv(
        self: _HasTarget,
        x: torch.Tensor,
        weight: torch.Tensor,
        state: torch.Tensor,
        batch: ForwardBatch,
    ) -> torch.Tensor:
        """As `Backend.causal_conv`."""
        return causal_conv(x, weight, state, batch, self._target("causal_conv"))

    def delta_rule(
        self: _HasTarget,
        mixed: torch.Tensor,
        gates: torch.Tensor,
        parameters: DeltaRuleGates,
        state: torch.Tensor,
        batch: ForwardBatch,
    ) -> torch.Tensor:
        """As `Backend.delta_rule`."""
        return delta_rule(mixed, gates, parameters, state, batch, self._target("delta_rule"))

    def gated_norm(
        self: _HasTarget, x: torch.Tensor, gate: torch.Tensor, norm: Norm
    ) -> torch.Tensor:
        """As `Backend.gated_norm`."""
        return gated_norm(x, gate, norm, self._target("gated_norm"))

    def output_gate(self: _HasTarget, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """As `Backend.output_gate`."""
        return output_gate(x, gate, self._target("output_gate"))
