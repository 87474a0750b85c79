"""Operations of the network: attention with sinks, expert dispatch, rotary embedding, SwiGLU."""

from typing import Any

import torch
from torch import Tensor


@torch.compile(dynamic=True)
def _attention_backward(
    score: Tensor, dprobability: Tensor, mask: Tensor, total: Tensor, row: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return probabilities and gradients of the unscaled scores [batch, heads, tokens, tokens]."""
    probability = torch.exp(score.float() * scale + mask - total.unsqueeze(-1))
    dscore = probability * (dprobability.float() - row.unsqueeze(-1)) * scale
    return probability.to(score.dtype), dscore.to(score.dtype)


class Attend(torch.autograd.Function):
    """Softmax attention with one sink per head, using torch's CPU flash kernel.

    A sink s only adds exp(s) to the denominator of the softmax. The kernel's output is therefore
    rescaled by sigmoid(lse - s), and the usual backward pass is correct with logaddexp(lse, s) in
    place of lse: probabilities, output and row sums then include the sink. The backward pass is
    written out here because the kernel's own is much slower on short sequences than plain matrix
    products.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        """q, k, v [batch, heads, tokens, head_dim], sinks [heads], mask [tokens, tokens]."""
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        sink = sinks.float()[None, :, None]
        out = out * torch.sigmoid(lse - sink).unsqueeze(-1).to(out.dtype)
        ctx.save_for_backward(q, k, v, out, torch.logaddexp(lse, sink), sinks, mask)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total, sinks, mask = ctx.saved_tensors
        grad = grads[0]
        row = (grad.float() * out.float()).sum(-1)
        probability, dscore = _attention_backward(
            q @ k.transpose(-1, -2), grad @ v.transpose(-1, -2), mask, total, row, ctx.scale
        )
        sink_probability = torch.exp(sinks.float()[None, :, None] - total)
        return (
            dscore @ k,
            dscore.transpose(-1, -2) @ q,
            probability.transpose(-1, -2) @ grad,
            -(sink_probability * row).sum((0, 2)).to(sinks.dtype),
            None,
            None,
        )


class Dispatch(torch.autograd.Function):
    """Copies rows of x [tokens, hidden] to [expert * capacity, hidden]; both passes are gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slot,) = ctx.saved_tensors
        gathered = grads[0].index_select(0, slot.flatten()).view(*slot.shape, -1)
        return gathered.sum(1), None, None


class Combine(torch.autograd.Function):
    """Weighted sum of y [expert * capacity, hidden] over a token's experts; both passes gather."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gates: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        chosen = y.index_select(0, slot.flatten()).view(*slot.shape, -1)
        ctx.save_for_backward(chosen, gates, source, slot)
        ctx.rows = y.shape[0]
        return (chosen * gates.unsqueeze(-1).to(y.dtype)).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chosen, gates, source, slot = ctx.saved_tensors
        grad = grads[0]
        weight = torch.zeros(ctx.rows, dtype=grad.dtype)
        weight[slot.flatten()] = gates.flatten().to(grad.dtype)
        dy = grad.index_select(0, source) * weight.unsqueeze(-1)
        dgates = torch.matmul(chosen, grad.unsqueeze(-1).to(chosen.dtype)).squeeze(-1)
        return dy, dgates.to(gates.dtype), None, None


@torch.compile(dynamic=True)
def rotate(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of y [batch, heads, tokens, head_dim] against each other."""
    a, b = y.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@torch.compile(dynamic=True)
def swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """Return gate·sigmoid(alpha·gate)·(up + 1), clamped; gate_up is [..., gates then ups]."""
    gate, up = gate_up.chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)
