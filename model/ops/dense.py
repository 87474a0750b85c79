"""The operations of dense layers in plain torch: embedding, products, norms and activations."""

import torch
import torch.nn.functional as F

from model.ops.specs import Activation, Linear, Norm
from model.ops.step_parts import ACTIVATION, DOWN_PROJ, POST_NORM

_HEAD_TOKENS = 1 << 14  # tokens of the vocabulary whose logits are computed at once


class DenseOps:
    """The part of `Backend` that every layer uses.

    dtype: the compute dtype.
    """

    dtype: torch.dtype

    def gather(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """table [rows, size], ids int64 [tokens], each a valid row → [tokens, size]."""
        return table[ids]

    def embed(
        self, table: torch.Tensor, ids: torch.Tensor, scale: float, first: int = 0
    ) -> torch.Tensor:
        """The start of the residual stream: rows of the embedding times `scale`, in float32.

        table [rows, hidden] has the tokens from `first` on; ids int64 [tokens] → float32
        [tokens, hidden], zeros for tokens that the table does not have.
        """
        rows = ids - first
        is_elsewhere = (rows < 0) | (rows >= len(table))
        x = table[rows.masked_fill(is_elsewhere, 0)].float()
        return self.scale(x.masked_fill(is_elsewhere.unsqueeze(1), 0), scale)

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        """x of any shape → x · factor; x itself if the factor is 1."""
        return x if factor == 1 else x * factor

    def linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """x [tokens, in] → x · weightᵀ + bias [tokens, out]."""
        return F.linear(x, linear.format.dense(linear.weight, x.dtype), linear.bias)

    def logits(
        self, x: torch.Tensor, head: Linear, scale: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [rows, hidden] → (x · weightᵀ + bias) · scale, float32 [rows, vocab]; `out` if given.

        Also for the logits of experts: head is a linear of the format `HEAD`.
        """
        x, weight = x.float(), head.weight
        parts = []
        for first in range(0, len(weight), _HEAD_TOKENS):  # bounds the memory of the float32 copy
            part = head.format.dense(weight[first : first + _HEAD_TOKENS], x.dtype)
            parts.append(F.linear(x, part.float()))
        logits = torch.cat(parts, dim=1, out=out)
        if head.bias is not None:
            logits += head.bias
        return self.scale(logits, scale) if out is None else logits.mul_(scale)

    def add_rms_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream x float32 and delta [tokens, size] → (x + delta, its norm).

        Without a delta (x, its norm). The sum is float32, the norm has the compute dtype; it is
        the sum itself in that dtype where the model has no norm at this place. From a
        backend whose `norm_experts` returns parts, delta may also be [tokens, parts, size].
        """
        if delta is not None and delta.dim() == 3:
            delta = delta.sum(1, dtype=torch.float32)
        summed = x if delta is None else x + delta
        return summed, rms_norm(summed, norm).to(self.dtype)

    def scaled_sum(
        self, x: torch.Tensor, delta: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        """x float32 and delta [tokens, size], factor float32 [1] → (x + delta) · factor, float32.

        delta has no parts.
        """
        return (x + delta) * factor

    def rms_norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """x [tokens, size] → its norm, in the same dtype."""
        return rms_norm(x, norm).to(x.dtype)

    def softcap(self, logits: torch.Tensor, cap: float | None) -> torch.Tensor:
        """Logits float32 [rows, vocab] → cap · tanh(logits / cap), in place, if there is a cap."""
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def norm_mlp(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        norm: Norm,
        gate_up: Linear,
        down: Linear,
        activation: Activation,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`add_rms_norm`, `gated_linear` and `linear` → (x + delta, the MLP of its norm)."""
        with POST_NORM:
            x, normed = self.add_rms_norm(x, delta, norm)
        inner = self.gated_linear(normed, gate_up, activation)
        with DOWN_PROJ:
            return x, self.linear(inner, down)

    def gated_linear(self, x: torch.Tensor, linear: Linear, activation: Activation) -> torch.Tensor:
        """x [tokens, in] → `linear` to [tokens, 2 · size], then `activate` → [tokens, size]."""
        gate_up = self.linear(x, linear)
        with ACTIVATION:
            return self.activate(gate_up, activation)

    def activate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """gate_up [tokens, 2 · size], gate first → [tokens, size]; see `Activation`.

        [tokens, size] if the activation is not gated.
        """
        gate, up = split_gate(gate_up, activation)
        return self.gated(gate, up, activation)

    def gated(self, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """gate and up [tokens, size], with any distance of rows → [tokens, size]."""
        limit = activation.limit
        if activation.kind == "gelu_tanh":
            return F.gelu(gate, approximate="tanh") * up
        if activation.kind == "relu":
            return F.relu(gate) * up
        if limit is None:
            return F.silu(gate) * up
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)


def split_gate(gate_up: torch.Tensor, by: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [tokens, parts · size] → gate and up [tokens, size]; the same one without a gate."""
    gate, *up = gate_up.chunk(by.parts, dim=-1)
    return gate, up[0] if up else gate


def rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """x [..., size] by its root mean square over the last dimension, times the weight; float32."""
    return x.float() if norm.is_identity else normalize(x, norm.eps) * norm.weight


def normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., size] by its root mean square over the last dimension; float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
