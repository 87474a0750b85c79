"""The operations on a CPU through torch: oneDNN's linears and torch's flash attention.

Weights are held in oneDNN's blocked layout (1.5 to 2.4 times the speed of plain rows at decode
sizes). Paged KV is gathered once per layer with indices that are derived once per step; for
positions that are not visible the null block is gathered, which is always zero, so that stale
values are never read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model.ops.backend import Backend
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.kv_values import read_kv, select_kv
from model.ops.mxfp4 import Mxfp4
from model.ops.sampling import reduce_blocks, take_block
from model.ops.specs import Activation, AttentionSpec, Experts, ExpertShard, Linear
from model.ops.step_parts import ACTIVATION, DOWN_PROJ

_NEG_INF = float("-inf")
_BLOCK = 1024  # tokens of the vocabulary whose maximum `argmax` takes at once
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def lacks_bfloat16() -> bool:
    """Whether oneDNN has no bfloat16 on this processor: on x86, without AVX-512."""
    mkldnn = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and not mkldnn._is_mkldnn_bf16_supported()


class OneDnnBackend(Backend):
    """Operations for which torch has a faster form on a CPU than that of the reference."""

    def keeps_mxfp4(self, stacked: bool) -> bool:
        """As Backend.keeps_mxfp4: torch has no kernel for MXFP4."""
        return False

    def keeps_integers(self, quantizes: bool) -> bool:
        """As Backend.keeps_integers: torch has no kernel for integers."""
        return False

    def keeps_float8(self, quantizes: bool) -> bool:
        """As Backend.keeps_float8: only on request, since each product converts the weight."""
        return quantizes

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight in oneDNN's layout where it has one for the dtype."""
        if weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
            return weight
        if lacks_bfloat16():
            return weight
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)

    def empty_head(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return float32 storage: oneDNN has no product of bfloat16 with float32 results."""
        return torch.empty(shape, dtype=torch.float32)

    def pack_head(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight in float32."""
        return weight.float()

    def pack_experts(self, weights: torch.Tensor) -> list[torch.Tensor]:
        """Return each expert's weight from `pack`."""
        return [OneDnnBackend.pack(self, weight) for weight in weights]

    def pack_mxfp4(self, weights: Mxfp4) -> list[torch.Tensor]:
        """Return each expert's weight made dense and packed, one expert after the other."""
        experts = range(len(weights))
        return [OneDnnBackend.pack(self, weights[e].dense(self.dtype)) for e in experts]

    def linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """As Backend.linear, for weights from `pack`."""
        return _linear(x, linear.format.dense(linear.weight, x.dtype), linear.bias)

    def logits(
        self, x: torch.Tensor, head: Linear, scale: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As Backend.logits, for a weight from `pack_head`."""
        if not isinstance(head.weight, torch.Tensor):
            return super().logits(x, head, scale, out)
        x, weight = x.float(), head.weight.t()
        if head.bias is None:
            logits = torch.mm(x, weight, out=out)
        else:
            logits = torch.addmm(head.bias.float(), x, weight, out=out)
        return logits if scale == 1 else logits.mul_(scale)

    def experts(
        self,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        experts: Experts,
        activation: Activation,
        shard: ExpertShard = ExpertShard(),  # noqa: B008 - immutable
    ) -> torch.Tensor:
        """As Backend.experts, with rows sorted by expert so that each expert reads one slice."""
        if shard.size > 1:
            return self._experts_of_shard(x, chosen, weights, experts, activation, shard)
        top_k = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=experts.count).tolist()
        used = [(expert, count) for expert, count in enumerate(counts) if count]
        gate_up_biases = _rows(experts.gate_up_bias, len(counts))
        down_biases = _rows(experts.down_bias, len(counts))

        def multiply(rows: torch.Tensor, packed: Any, biases: Any) -> torch.Tensor:
            slices = rows.split([count for _, count in used])
            results = [
                _linear(part, experts.format.dense(packed[expert], x.dtype), biases[expert])
                for part, (expert, _) in zip(slices, used, strict=True)
            ]
            return torch.cat(results)

        inner = multiply(x.index_select(0, order // top_k), experts.gate_up, gate_up_biases)
        with ACTIVATION:
            inner = self.activate(inner, activation)
        with DOWN_PROJ:
            result = multiply(inner, experts.down, down_biases).float()
        result = result * weights.flatten()[order].unsqueeze(1)
        # Restore the order of each token's experts: a sum then does not depend on the batch.
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return result[back].view(*chosen.shape, -1).sum(1).to(x.dtype)

    def _experts_of_shard(
        self,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        experts: Experts,
        activation: Activation,
        shard: ExpertShard,
    ) -> torch.Tensor:
        """As `experts`, for the (token, expert) pairs of this shard."""
        own = chosen - shard.rank * experts.count
        token, rank = torch.where((own >= 0) & (own < experts.count))
        results = x.new_zeros(*chosen.shape, x.shape[1])
        if len(token):
            one, weight = own[token, rank].unsqueeze(1), weights[token, rank].unsqueeze(1)
            results[token, rank] = self.experts(x[token], one, weight, experts, activation)
        return results.sum(1, dtype=torch.float32).to(x.dtype)

    def attention(
        self,
        query: torch.Tensor,
        kv: torch.Tensor,
        batch: ForwardBatch,
        group: GroupTables,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As Backend.attention.

        The query heads of a KV head take the place of query positions (single tokens) or of heads
        (chunks), so KV is neither repeated nor read twice. Sinks enter through the log-sum-exp:
        softmax with one more column is softmax times sigmoid(lse - sink).
        """
        if spec.softcap is not None:  # torch's flash attention has none
            return super().attention(query, kv, batch, group, spec, sinks)
        if group.plan is None:
            group.plan = _make_plan(batch, group, spec.window, kv.shape[2], query.dtype)
        plan: _Plan = group.plan
        heads, head_dim = query.shape[1:]
        kv_heads = kv.shape[3]
        shared = heads // kv_heads

        def select(part: int, slots: torch.Tensor) -> torch.Tensor:
            """Keys (0) or values (-1) of these slots, [slots, kv_heads, head_dim]."""
            return read_kv(select_kv(kv[part], slots), query.dtype)

        out = torch.empty_like(query)
        sinks = None if sinks is None else sinks.float().view(kv_heads, shared)
        if plan.single is not None:
            count = plan.single.mask.shape[0]
            shape = (count, -1, kv_heads, head_dim)
            mixed, lse = _flash(
                query[:count].view(count, kv_heads, shared, head_dim),
                select(0, plan.single.slots).view(shape).transpose(1, 2),
                select(-1, plan.single.slots).view(shape).transpose(1, 2),
                attn_mask=plan.single.mask.expand(-1, 1, shared, -1),
                scale=spec.scale,
            )
            if sinks is not None:
                mixed = mixed * torch.sigmoid(lse - sinks).unsqueeze(-1).to(mixed.dtype)
            out[:count] = mixed.reshape(count, heads, head_dim)
        for chunk in plan.chunks:
            count = chunk.last - chunk.first

            def by_head(rows: torch.Tensor) -> torch.Tensor:
                spread = rows.view(-1, kv_heads, 1, head_dim).expand(-1, -1, shared, -1)
                return spread.permute(1, 2, 0, 3)

            own = query[chunk.first : chunk.last].view(count, kv_heads, shared, head_dim)
            mixed, lse = _flash(
                own.permute(1, 2, 0, 3),
                by_head(select(0, chunk.slots)),
                by_head(select(-1, chunk.slots)),
                is_causal=chunk.mask is None,
                attn_mask=chunk.mask,
                scale=spec.scale,
            )
            if sinks is not None:
                mixed = mixed * torch.sigmoid(lse - sinks[:, :, None]).unsqueeze(-1).to(mixed.dtype)
            mixed = mixed.permute(2, 0, 1, 3).reshape(count, heads, head_dim)
            out[chunk.first : chunk.last] = mixed
        return out[..., : spec.latent_dim]

    def argmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As Backend.argmax, in two passes: the block of the largest logit, then its place.

        Only `amax` reads at the speed of memory on a CPU: over a large vocabulary argmax is seven
        times as slow, a tenth of a step.
        """
        if logits.shape[1] < 2 * _BLOCK:
            return logits.max(-1)
        highest, block = reduce_blocks(logits, torch.amax, _BLOCK).max(-1, keepdim=True)
        place = take_block(logits, block, float("-inf"), _BLOCK).max(-1, keepdim=True).indices
        return highest.squeeze(1), (block * _BLOCK + place).squeeze(1)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def _rows(bias: torch.Tensor | None, count: int) -> Sequence[torch.Tensor | None]:
    return [None] * count if bias is None else bias.unbind()


@dataclass
class _Single:
    """Sequences with one query token, computed in one call."""

    slots: torch.Tensor  # int64 [sequences · longest]
    mask: torch.Tensor  # [sequences, 1, 1, longest], added to the scores


@dataclass
class _Chunk:
    """One sequence with several query tokens."""

    first: int
    last: int
    slots: torch.Tensor  # int64 [visible]
    mask: torch.Tensor | None  # [1, 1, query, visible]; None: plain causal


@dataclass
class _Plan:
    single: _Single | None
    chunks: list[_Chunk]


def _make_plan(
    batch: ForwardBatch, group: GroupTables, window: int | None, block_size: int, dtype: torch.dtype
) -> _Plan:
    singles = batch.num_single
    single = None
    if singles:
        ends = torch.tensor(batch.host_context_lens[:singles]).unsqueeze(1)
        starts = torch.zeros_like(ends) if window is None else (ends - window).clamp(0)
        at = starts + torch.arange(int((ends - starts).max()))
        visible = at < ends
        table = group.block_table[:singles]
        blocks = table.gather(1, (at // block_size).clamp(max=table.shape[1] - 1))
        slots = torch.where(visible, blocks * block_size + at % block_size, 0)
        bias = torch.zeros(at.shape, dtype=dtype).masked_fill(~visible, _NEG_INF)
        single = _Single(slots.flatten(), bias[:, None, None])
    chunks = []
    first = singles
    for row in range(singles, len(batch.host_query_lens)):
        count, end = batch.host_query_lens[row], batch.host_context_lens[row]
        begin = end - count
        start = 0 if window is None else max(0, begin - window + 1)
        at = torch.arange(start, end)
        slots = group.block_table[row][at // block_size] * block_size + at % block_size
        mask: torch.Tensor | None = None
        if start < begin or (window is not None and window < end):
            age = torch.arange(begin, end).unsqueeze(1) - at
            hidden = age < 0
            if window is not None:
                hidden |= age >= window
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, _NEG_INF)
            mask = mask[None, None]
        chunks.append(_Chunk(first, first + count, slots, mask))
        first += count
    return _Plan(single, chunks)
