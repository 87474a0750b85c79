"""The gpt-oss network for training, its MXFP4 quantization, and its checkpoint layout.

The mathematics is that of the published gpt-oss models: attention sinks, alternating windows,
YaRN, clamped SwiGLU experts selected by top-k. The implementation is optimized for small models on
a CPU: tokens are sorted into one padded batch per expert, so that a layer's experts are two
batched matrix products, and attention uses torch's CPU flash kernel, with the sinks folded into
its log-sum-exp. Expert matrices have the same layout as in the checkpoint, [expert, out, in],
except that gate and up rows are two halves here (cheap to split) and alternate in the checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mxfp4 import fake_mxfp4, pack_mxfp4
from network_ops import Attend, Combine, Dispatch, rotate, swiglu
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the network, with the names used in config.json."""

    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 160
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    sliding_window: int = 16
    max_position_embeddings: int = 512
    original_max_position_embeddings: int = 32
    rope_theta: float = 1000.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    rms_norm_eps: float = 1e-5
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    @property
    def layer_types(self) -> list[str]:
        """Even layers use a sliding window, odd layers full attention."""
        kinds = ("sliding_attention", "full_attention")
        return [kinds[i % 2] for i in range(self.num_hidden_layers)]

    @property
    def rope_factor(self) -> float:
        """Factor by which YaRN extends the original context."""
        return self.max_position_embeddings / self.original_max_position_embeddings


def rotary_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return YaRN cosines and sines [position, head_dim / 2].

    Source: arXiv 2309.00071; the bounds of the ramp are not rounded.
    """
    dim, base = shape.head_dim, shape.rope_theta

    def dimension_of(rotations: float) -> float:
        """Return the dimension that makes this number of rotations in the original context."""
        ratio = shape.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(base))

    low = max(dimension_of(shape.beta_fast), 0.0)
    high = min(dimension_of(shape.beta_slow), dim - 1.0)
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequency = frequency * (1 - ramp) + frequency / shape.rope_factor * ramp
    angle = torch.arange(shape.max_position_embeddings).float()[:, None] * frequency
    scale = 0.1 * math.log(shape.rope_factor) + 1.0
    return angle.cos() * scale, angle.sin() * scale


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a weight."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., hidden]."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with biases and sinks."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        q_size = shape.num_attention_heads * shape.head_dim
        kv_size = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, q_size)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size)
        self.o_proj = nn.Linear(q_size, shape.hidden_size)
        self.sinks = nn.Parameter(torch.zeros(shape.num_attention_heads))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Return [batch, tokens, hidden] for x of the same shape.

        cos and sin are [tokens, head_dim / 2], mask is added to the scores [tokens, tokens].
        """
        batch, tokens, _ = x.shape
        dim = self.shape.head_dim

        def heads(y: Tensor, is_rotated: bool, repeat: int = 1) -> Tensor:
            y = y.view(batch, tokens, -1, dim).transpose(1, 2)
            y = rotate(y, cos, sin) if is_rotated else y
            return y.repeat_interleave(repeat, 1) if repeat > 1 else y

        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        q = heads(self.q_proj(x), True)
        k = heads(self.k_proj(x), True, group)
        v = heads(self.v_proj(x), False, group)
        out = Attend.apply(q, k, v, self.sinks, mask, dim**-0.5)
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))


class Router(nn.Module):
    """Weight and bias of the layer that scores the experts."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape.num_local_experts, shape.hidden_size) * 0.05)
        self.bias = nn.Parameter(torch.zeros(shape.num_local_experts))


class Experts(nn.Module):
    """Matrices and biases of one layer's experts."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        experts, hidden, inner = (
            shape.num_local_experts,
            shape.hidden_size,
            shape.intermediate_size,
        )
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * hidden**-0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 2 * inner))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner) * 0.5 * inner**-0.5)
        self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden))


class MoE(nn.Module):
    """Top-k mixture of experts."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.router = Router(shape)
        self.experts = Experts(shape)

    def forward(self, x: Tensor, quantized: bool) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the experts of x [tokens, hidden], and the balance loss.

        The balance loss is 1 if all experts are used equally, and larger otherwise.
        """
        count, top_k = self.shape.num_local_experts, self.shape.num_experts_per_tok
        with torch.autocast("cpu", enabled=False):
            scores = F.linear(x.float(), self.router.weight, self.router.bias)
            top, expert = scores.topk(top_k, -1)
            gates = top.softmax(-1)
        flat = expert.flatten()
        load = torch.bincount(flat, minlength=count)
        capacity = -(-int(load.max()) // 64) * 64  # rounded up, since each new size is compiled
        order = flat.argsort(stable=True)
        start = load.cumsum(0) - load
        place = torch.arange(len(flat)) - start[flat[order]] + flat[order] * capacity
        slot = torch.empty_like(flat)
        slot[order] = place
        source = torch.zeros(count * capacity, dtype=torch.long)
        source[place] = order // top_k
        slot = slot.view(-1, top_k)

        w = self.experts
        up: Tensor = w.gate_up_proj
        down: Tensor = w.down_proj
        if quantized:
            up, down = fake_mxfp4(up), fake_mxfp4(down)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        rows = Dispatch.apply(x.to(dtype), source, slot).view(count, capacity, -1)
        h = torch.baddbmm(
            w.gate_up_proj_bias.to(dtype)[:, None], rows, up.to(dtype).transpose(1, 2)
        )
        h = swiglu(h, self.shape.swiglu_alpha, self.shape.swiglu_limit)
        y = torch.baddbmm(w.down_proj_bias.to(dtype)[:, None], h, down.to(dtype).transpose(1, 2))
        out = Combine.apply(y.flatten(0, 1), gates, source, slot)
        balance = count * (scores.softmax(-1).mean(0) * (load / len(flat))).sum()
        return out, balance


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MoE(shape)
        self.input_layernorm = RMSNorm(shape)
        self.post_attention_layernorm = RMSNorm(shape)


class Decoder(nn.Module):
    """Embedding, layers and final normalization."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList([Layer(shape) for _ in range(shape.num_hidden_layers)])
        self.norm = RMSNorm(shape)


class Network(nn.Module):
    """The whole network; parameters are named as in a gpt-oss checkpoint."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.quantized = False
        self.model = Decoder(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        cos, sin = rotary_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():
            if name.endswith("_proj.weight"):
                nn.init.normal_(weight, std=shape.hidden_size**-0.5)
            elif name.endswith("_proj.bias"):
                nn.init.zeros_(weight)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.5)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(self, ids: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits [positions, vocab] and the mean balance loss for ids [batch, tokens].

        `wanted` selects flat positions; None selects all. Sequences are padded on the right, where
        the causal mask excludes the padding.
        """
        tokens = ids.shape[1]
        at = torch.arange(tokens)
        back = at[:, None] - at[None, :]
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        hidden = torch.zeros(tokens, tokens, dtype=dtype)
        masks = {
            "full_attention": hidden.masked_fill(back < 0, -1e9),
            "sliding_attention": hidden.masked_fill(
                (back < 0) | (back >= self.shape.sliding_window), -1e9
            ),
        }
        cos, sin = self.cos[:tokens].to(dtype), self.sin[:tokens].to(dtype)
        x = self.model.embed_tokens(ids)
        balance = torch.zeros(())
        for layer, kind in zip(self.model.layers, self.shape.layer_types, strict=True):
            assert isinstance(layer, Layer)
            x = x + layer.self_attn(layer.input_layernorm(x), cos, sin, masks[kind])
            y = layer.post_attention_layernorm(x).flatten(0, 1)
            mixed, layer_balance = layer.mlp(y, self.quantized)
            x = x + mixed.view_as(x)
            balance = balance + layer_balance / self.shape.num_hidden_layers
        x = x.flatten(0, 1)
        if wanted is not None:
            x = x[wanted]
        return self.lm_head(self.model.norm(x)).float(), balance


def checkpoint_tensors(network: Network) -> dict[str, Tensor]:
    """Return the tensors of a gpt-oss checkpoint: experts in MXFP4, everything else in bfloat16."""
    tensors: dict[str, Tensor] = {}
    for name, weight in network.state_dict().items():
        if ".gate_up_proj" in name:
            gates, ups = weight.chunk(2, 1)
            weight = torch.stack((gates, ups), 2).flatten(1, 2)  # gate and up rows alternate
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = pack_mxfp4(weight)
        else:
            tensors[name] = weight.to(torch.bfloat16)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
