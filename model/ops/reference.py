"""Every op in plain torch: the definition that kernels are checked against.

Written to be plainly right, in float32 inside, on any device; speed is no concern here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model.ops.forward_batch import ForwardBatch, GroupTables

# The 16 values of FP4 E2M1 by code: bit 3 is the sign (OCP Microscaling Formats 1.0, 5.3.3).
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_BLOCK = 32  # values that share one scale


@dataclass(frozen=True)
class Mxfp4:
    """Weights [experts, out, in] as MXFP4: 32 values along `in` share a power-of-two scale."""

    blocks: torch.Tensor  # uint8 [experts, out, in / 32, 16], two values a byte, low nibble first
    scales: torch.Tensor  # uint8 [experts, out, in / 32], E8M0 with bias 127

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.blocks.device

    def __len__(self) -> int:
        """Return the number of experts."""
        return len(self.blocks)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values: experts, out, in."""
        *outer, groups = self.scales.shape
        return *outer, groups * MXFP4_BLOCK

    def __getitem__(self, index: int | slice) -> "Mxfp4":
        """Return one expert, or one expert's rows."""
        return Mxfp4(self.blocks[index], self.scales[index])

    def copy_(self, source: "Mxfp4") -> None:
        """Take the values of another."""
        self.blocks.copy_(source.blocks)
        self.scales.copy_(source.scales)

    def random_(self, generator: torch.Generator) -> None:
        """Fill with random values of a usual size."""
        self.blocks.random_(0, 256, generator=generator)
        self.scales.fill_(120)  # values of up to 6 · 2⁻⁷

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values."""
        return dequantize_mxfp4(self.blocks, self.scales, dtype)


ExpertWeights = torch.Tensor | Sequence[torch.Tensor] | Mxfp4
"""[experts, out, in], as stacked, as one (packed) tensor an expert, or as MXFP4."""


def empty_weight(
    like: torch.Tensor | Mxfp4, dtype: torch.dtype, device: torch.device, parts: int
) -> torch.Tensor | Mxfp4:
    """Plain storage of the same shape."""
    if isinstance(like, Mxfp4):
        return Mxfp4(
            torch.empty(like.blocks.shape, dtype=torch.uint8, device=device),
            torch.empty(like.scales.shape, dtype=torch.uint8, device=device),
        )
    return torch.empty(like.shape, dtype=dtype, device=device)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The weight as it is."""
    return weight


def pack_experts(weights: torch.Tensor | Mxfp4, dtype: torch.dtype) -> ExpertWeights:
    """The weights as they are."""
    return weights


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [tokens, in], weight [out, in], bias [out] → [tokens, out]."""
    return F.linear(x, weight, bias)


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    limit: float | None,
    alpha: float,
) -> torch.Tensor:
    """`linear` to [tokens, 2 · size], then `swiglu` → [tokens, size]."""
    return swiglu(linear(x, weight, bias), limit, alpha)


def keeps_mxfp4(dtype: torch.dtype) -> bool:
    """Each expert is made dense when it is used."""
    return True


def empty_cache(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory for KV blocks."""
    return torch.empty(shape, dtype=dtype, device=device)


def gather(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """table [rows, size], ids int64 [tokens], all of them rows → [tokens, size]."""
    return table[ids]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., size] divided by its root mean square over the last dimension, times weight."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and delta [tokens, size] → (their sum, its RMSNorm); without a delta the sum is x."""
    summed = x if delta is None else x + delta
    return summed, rms_norm(summed, weight, eps)


def in_steps(*arguments: object) -> None:
    """As norm_qkv and norm_mlp of ops: no kernel does a norm together with what follows."""


norm_qkv = norm_mlp = in_steps


def rotate_and_write(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
    heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """What lies between the QKV projection and attention.

    qkv [tokens, heads + 2 · kv_heads, head_dim]: the first `heads` are queries, then keys, then
    values. Queries and keys are normalised per head (norms: their weights [head_dim]) and
    rotated by cos_sin, float32 [tokens, head_dim]; keys and values are stored at slots, int64
    [tokens], of kv [2, blocks, block_size, kv_heads, head_dim] → query [tokens, heads, head_dim].
    """
    kv_heads = kv.shape[3]
    query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
    if norms is not None:
        query, key = rms_norm(query, norms[0], eps), rms_norm(key, norms[1], eps)
    write_kv(kv, slots, rotate(key, cos_sin), value)
    return rotate(query, cos_sin)


def rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotation: x [tokens, heads, head_dim], cos_sin float32 [tokens, head_dim]."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def write_kv(kv: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Store key and value [tokens, kv_heads, head_dim] in kv [2, blocks, block_size, …]."""
    flat = kv.flatten(1, 2)
    flat[0].index_copy_(0, slots, key)
    flat[1].index_copy_(0, slots, value)


def attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    batch: ForwardBatch,
    group: GroupTables,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of each sequence's new tokens over its paged KV.

    query [tokens, heads, head_dim] (heads ordered kv_head-major, so that head h reads KV head
    h // (heads / kv_heads)); kv [2, blocks, block_size, kv_heads, head_dim]; sinks [heads] or
    None → [tokens, heads, head_dim]. Scores are scaled by head_dim^-½. A sink is one more column
    of the softmax, after scaling, that is then dropped.
    """
    _, heads, head_dim = query.shape
    kv_heads = kv.shape[3]
    out = torch.empty_like(query)
    first = 0
    for row, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        key, value = kv[:, group.block_table[row]].flatten(1, 2)[:, :context].float()
        q = query[first : first + count].float().unflatten(1, (kv_heads, heads // kv_heads))
        scores = torch.einsum("qhgd,khd->hgqk", q, key) * head_dim**-0.5
        at = torch.arange(context, device=query.device)
        age = at[context - count :, None] - at[None, :]  # 0 for the token itself
        seen = age >= 0
        if group.window is not None:
            seen &= age < group.window
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            column = sinks.float().view(kv_heads, -1, 1, 1).expand(-1, -1, count, 1)
            scores = torch.cat((scores, column), dim=-1)
        shares = scores.softmax(-1)[..., :context]
        # Values nobody may see can be anything, NaN included, and 0 · NaN is NaN.
        value = value.masked_fill(~seen.any(0)[:, None, None], 0.0)
        mixed = torch.einsum("hgqk,khd->qhgd", shares, value)
        out[first : first + count] = mixed.flatten(1, 2).to(query.dtype)
        first += count
    return out


def swiglu(gate_up: torch.Tensor, limit: float | None, alpha: float) -> torch.Tensor:
    """gate_up [tokens, 2 · size], gate first → [tokens, size].

    Plain: silu(gate) · up. With a limit (gpt-oss): gate clamped from above, up on both sides,
    gate · sigmoid(alpha · gate) · (up + 1).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is None:
        return F.silu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def route(
    logits: torch.Tensor, top_k: int, softmax_after_top_k: bool, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [tokens, experts] → (experts int64, weights float32), both [tokens, top_k]."""
    logits = logits.float()
    if softmax_after_top_k:
        chosen, experts = logits.topk(top_k, dim=-1)
        return experts, chosen.softmax(-1)
    weights, experts = logits.softmax(-1).topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: ExpertWeights,
    gate_up_bias: torch.Tensor | None,
    down: ExpertWeights,
    down_bias: torch.Tensor | None,
    limit: float | None,
    alpha: float,
    part: tuple[int, int] = (0, 1),
) -> torch.Tensor:
    """Weighted sum of each token's experts, of those in the part (which, of how many).

    x [tokens, hidden], chosen and weights [tokens, top_k]; for each expert gate_up
    [2 · size, hidden], down [hidden, size] and their biases; limit and alpha as in `swiglu` →
    [tokens, hidden].
    """
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(len(gate_up)):
        token, rank = torch.where(chosen == part[0] * len(gate_up) + expert)
        inner = F.linear(x[token], _dense(gate_up[expert], x.dtype), _row(gate_up_bias, expert))
        inner = swiglu(inner, limit, alpha)
        result = F.linear(inner, _dense(down[expert], x.dtype), _row(down_bias, expert))
        out.index_add_(0, token, result.float() * weights[token, rank, None].float())
    return out.to(x.dtype)


def _dense(weight: torch.Tensor | Mxfp4, dtype: torch.dtype) -> torch.Tensor:
    return weight.dense(dtype) if isinstance(weight, Mxfp4) else weight


def _row(bias: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if bias is None else bias[expert]


def dequantize_mxfp4(
    blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """MXFP4 → dense: blocks uint8 [..., groups, 16], scales uint8 [..., groups] → [..., groups·32].

    Two values a byte, low nibble first; a scale is a power of two, E8M0 with bias 127 (OCP
    Microscaling Formats 1.0, 5.2 and 5.3.3).
    """
    values = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)], device=blocks.device)
    pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    # By their bits: exp2 is one of the functions that torch compiles when a GPU first needs them.
    bits = torch.where(scales == 0, 1 << 22, scales.int() << 23)
    dense = values[pairs.int()] * bits.view(torch.float32).unsqueeze(-1)
    return dense.flatten(-2).to(dtype)


def draw(
    logits: torch.Tensor,
    heat: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """A token of each row from what top-k and then top-p leave of its softmax.

    logits [rows, vocab]; for each row heat float32, the temperature, above 0; top_k int64, how
    many tokens may be drawn, 0 for all (None: all in every row); top_p float32, the share of what
    top-k leaves that the likeliest of them must reach; uniform float64 in [0, 1) → int64 [rows].

    Tokens are in order of probability, of equal ones the lower first, for both limits and for the
    draw: the inverse of the cumulative distribution at `uniform`. This order costs nothing more,
    as both limits need it, and a draw from the likeliest few never depends on how many follow.
    A row of NaN gives some token that exists.
    """
    values, ids = logits.sort(descending=True, stable=True)
    values = values.float() / heat.unsqueeze(1)
    total = values.logsumexp(-1, keepdim=True)
    return pick(values, ids, total, counts_kept(logits, top_k), top_p, uniform)


def counts_kept(logits: torch.Tensor, top_k: torch.Tensor | None) -> torch.Tensor:
    """top_k int64 [rows] as in `draw`, with the size of the vocabulary where it is no limit."""
    rows, vocab = logits.shape
    if top_k is None:
        return torch.full((rows,), vocab, device=logits.device)
    return torch.where(top_k == 0, vocab, top_k)


def pick(
    values: torch.Tensor,
    ids: torch.Tensor,
    total: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """As `draw`, from the likeliest candidates of each row.

    values [rows, candidates] descending, by temperature, ids int64 of the same shape; total
    [rows, 1]: logsumexp of the values of all tokens; top_k from `counts_kept`. If candidates are
    not all tokens, they must be as many as top-k or, where that is no limit, reach top-p.
    """
    shares = (values - total).exp().double()
    rank = torch.arange(values.shape[1], device=values.device)
    top_k = top_k.unsqueeze(1)
    shares = shares.masked_fill(rank >= top_k, 0.0)
    whole = torch.where(top_k <= values.shape[1], shares.sum(-1, keepdim=True), 1.0)
    before = shares.cumsum(-1) - shares
    shares = shares.masked_fill((before >= top_p.unsqueeze(1) * whole) & (rank > 0), 0.0)
    upto = shares.cumsum(-1)
    chosen = (upto <= uniform.unsqueeze(1) * upto[:, -1:]).sum(-1, keepdim=True)
    # Rounding may point behind the last kept one, and NaN has none.
    last = ((shares > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    return ids.gather(1, torch.minimum(chosen, last)).squeeze(1)


def locate(shares: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the running sum of shares float64 [rows, n] passes `at` [rows, 1].

    Both results are [rows, 1]: the place, whose share is never 0, and what is left of `at` there.
    """
    upto = shares.cumsum(-1)
    at = at.clamp(min=0).minimum(upto[:, -1:].nextafter(at.new_zeros(())))
    place = torch.searchsorted(upto, at, right=True)
    return place, at - (upto - shares).gather(1, place)
