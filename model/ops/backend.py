"""Backend: every operation of the decoder in plain torch, the reference for all kernels.

Written for clarity instead of speed: it computes in float32 internally and runs on any device.
`CpuBackend` (model.ops.cpu) and `TritonBackend` (model.ops.triton) override the operations and
storage layouts for which they have faster kernels. A fused operation is a method like any other:
its base form runs the steps one after the other.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from model.ops.adjustments import adjust_logits
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.kv_values import read_kv, vector_width, write_kv
from model.ops.mxfp4 import Mxfp4
from model.ops.recurrent import RecurrentOps
from model.ops.sampling import (
    NO_TOKEN,
    keyed_uniform,
    sample_sorted,
    sample_vocabulary,
    top_tokens,
)
from model.ops.specs import (
    Activation,
    AdjustmentTables,
    AttentionSpec,
    ExpertGroups,
    Experts,
    ExpertShard,
    HeadLinear,
    IntegerFormat,
    Linear,
    Norm,
    RopeArgs,
    Router,
    RouterSpec,
    SamplingTables,
    SharedExpert,
)
from model.ops.step_parts import ACTIVATION, DOWN_PROJ, INPUT_NORM, POST_NORM, ROPE, ROUTER

OPERATIONS = (
    "embed",
    "add_rms_norm",
    "linear",
    "logits",
    "rotate_and_write",
    "norm_qkv",
    "head_linear",
    "latent_query",
    "causal_conv",
    "delta_rule",
    "gated_norm",
    "attention",
    "output_gate",
    "activate",
    "gated",
    "scaled_sum",
    "norm_mlp",
    "route",
    "experts",
    "add_gated",
    "norm_experts",
    "argmax",
    "top_tokens",
    "adjust_logits",
    "sample_rows",
)
"""Operations whose kernels are checked and chosen; one that runs others comes after them."""
_HEAD_TOKENS = 1 << 14  # tokens of the vocabulary whose logits are computed at once

SMALLEST_SUM = 1e-20
"""Is added to the sum of a token's router weights, of which sigmoids may all be 0."""

Compute = Callable[[], torch.Tensor]


class KvDtypeError(ValueError):
    """The backend has no operations on a KV cache of this dtype; the text says why."""


class Backend(RecurrentOps):
    """The operations on one device in one compute dtype.

    kv_dtype: of the KV cache, "auto" (the compute dtype) or one of `model.config.KV_DTYPES`. Raises
    KvDtypeError for one that the backend does not have.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, kv_dtype: str = "auto"):
        self.device, self.dtype, self.kv_name = device, dtype, kv_dtype
        self.kv_dtype = dtype if kv_dtype == "auto" else self.stored_kv_dtype(kv_dtype)

    def stored_kv_dtype(self, name: str) -> torch.dtype:
        """Return the dtype in memory of one of `model.config.KV_DTYPES`. Raises KvDtypeError."""
        dtype: torch.dtype = torch.float8_e4m3fn if name == "fp8" else getattr(torch, name)
        return dtype

    def kernels(self, processor: str) -> str:
        """Return what the rounding of results depends on, the dtype and versions of torch aside.

        processor: its name, which also stands for what torch's libraries choose for it.
        """
        return f"torch on {processor}"

    def kernel_choices(self, op: str) -> list[Any]:
        """Return alternatives to an operation's kernel, as JSON values, the most promising first.

        The last one is plain torch. Empty if the operation has no kernel that could be replaced.
        """
        return []

    def with_choices(self, choices: Mapping[str, Any]) -> "Backend":
        """Return this backend with other kernels for some operations, from `kernel_choices`.

        Raises ValueError for a choice that is not known, as of another version or another backend.
        """
        if choices:
            raise ValueError(f"no choice of kernels on {self.device.type}: {', '.join(choices)}")
        return self

    def describe_choice(self, op: str, choice: Any) -> str:
        """Return a choice of an operation as a report shows it."""
        return f"{op}: {choice}"

    # Storage

    def empty_weight(self, shape: tuple[int, ...], parts: int = 1) -> Any:
        """Return storage for a dense weight [out, in] or experts [experts, out, in].

        It is filled by rows, `storage[first:last].copy_(source)` or
        `storage[expert][first:last].copy_(source)`, and then passed to `pack` or `pack_experts`.
        parts: how many equal parts of the outputs are used together, as gate and up are.
        """
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def pack(self, weight: Any) -> Any:
        """Return a filled weight [out, in] in the form that `linear` is fastest with."""
        return weight

    def pack_experts(self, weights: Any) -> Any:
        """Return filled weights [experts, out, in] in the form that `experts` is fastest with."""
        return weights

    def empty_head(self, shape: tuple[int, ...]) -> Any:
        """Return storage for the weight of the head, filled as `empty_weight`'s is."""
        return self.empty_weight(shape)

    def pack_head(self, weight: Any) -> Any:
        """Return a filled weight in the form that `logits` takes: the head's or the embedding."""
        return weight

    def keeps_mxfp4(self, stacked: bool) -> bool:
        """Return whether a weight, or a stack of experts, stays MXFP4 in memory.

        Otherwise it becomes dense on loading.
        """
        return True

    def empty_mxfp4(self, shape: tuple[int, ...], parts: int = 1) -> Any:
        """Return storage for MXFP4 weights of a shape as `empty_weight`'s, filled like it."""
        return Mxfp4.empty(shape, self.device)

    def pack_mxfp4(self, weights: Any) -> Any:
        """Return filled MXFP4 weights in the form that `linear` or `experts` is fastest with."""
        return weights

    @property
    def keeps_integers(self) -> bool:
        """Whether weights stay integers of 8 or 4 bits in memory; otherwise they are dense."""
        return False

    def empty_integers(self, shape: tuple[int, ...], form: IntegerFormat, parts: int = 1) -> Any:
        """Return storage for integers [out, in] or [experts, out, in], filled as `empty_weight`'s.

        Dense where the kernels do not take the shape.
        """
        return self.empty_weight(shape, parts)

    def empty_cache(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return uninitialized memory for KV blocks [2, blocks, block_size, kv_heads, head_dim].

        Of latents, which are keys and values in one, [1, blocks, …]. It has the cache's dtype, and
        as last dimension `kv_values.vector_width`. Raises OutOfMemoryError or MemoryError.
        """
        return torch.empty(self.cache_shape(shape), dtype=self.kv_dtype, device=self.device)

    def empty_state(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return uninitialized memory for states of recurrent layers, by row.

        Raises OutOfMemoryError or MemoryError.
        """
        return torch.empty(shape, dtype=dtype, device=self.device)

    def cache_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in memory of vectors [..., head_dim] of the KV cache."""
        return (*shape[:-1], vector_width(self.kv_dtype, shape[-1]))

    def recorder(self) -> Callable[[Compute], Compute] | None:
        """Return a recorder of computations for replay on the host; None if there is none."""
        return None

    def without_programmatic_launch(self) -> "Backend":
        """Return this backend with every kernel launched after the previous one has ended."""
        return self

    # Operations

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
        """x [rows, hidden] → x · weightᵀ · scale, float32 [rows, vocab]; `out` if it is given."""
        parts = head.weight.split(_HEAD_TOKENS)  # bounds the memory of the float32 copy
        x = x.float()
        logits = torch.cat([F.linear(x, part.float()) for part in parts], dim=1, out=out)
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

    def norm_qkv(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        norm: Norm,
        qkv: Linear,
        rope: RopeArgs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`add_rms_norm`, `linear` and `rotate_and_write` → (x + delta, query)."""
        with INPUT_NORM:
            x, normed = self.add_rms_norm(x, delta, norm)
        projected = self.linear(normed, qkv).unflatten(-1, (-1, rope.heads.head_dim))
        with ROPE:
            return x, self.rotate_and_write(projected, rope)

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
        """`add_rms_norm`, `linear`, `route`, `experts`, `shared_expert` → (x + delta, their sum).

        A backend may leave their sum to the next norm and return [tokens, parts, hidden], where it
        takes such a delta and the shard holds all experts.
        """
        with POST_NORM:
            x, normed = self.add_rms_norm(x, delta, norm)
        with ROUTER:
            logits = self.linear(normed, router.linear)
            chosen, weights = self.route(logits, router.spec, router.correction)
        out = self.experts(normed, chosen, weights, experts, activation, shard)
        if experts.shared is not None:
            out = self.shared_expert(normed, out, experts.shared, activation)
        return x, out

    def rotate_and_write(self, qkv: torch.Tensor, rope: RopeArgs) -> torch.Tensor:
        """Norms of heads, rotary embedding and the write to the KV cache.

        qkv [tokens, sum of `Heads.parts`, head_dim]: queries, then keys, then values. Queries and
        keys are normalized where the layer has such norms, each head or all heads at once, and the
        first rotary_dim values of each head are rotated by rope.cos_sin, before or after that;
        keys and values are stored in rope.kv at rope.slot_mapping → query [tokens, heads,
        head_dim], times rope.query_scale if there is one.
        """
        heads = rope.heads
        query, key, *rest = qkv.split(heads.parts, dim=1)
        value = rest[0] if rest else key
        if heads.rotates_before_norm:
            query, key = rotate(query, rope.cos_sin), rotate(key, rope.cos_sin)
        query, key = norm_heads(query, heads.q_norm), norm_heads(key, heads.k_norm)
        if not heads.rotates_before_norm:  # keys are then rounded once, to the cache's dtype
            query, key = rotate(query, rope.cos_sin), rotate(key.float(), rope.cos_sin)
        if heads.norms_values and heads.q_norm is not None:
            value = normalize(value, heads.q_norm.eps).to(value.dtype)
        if heads.kv_heads:
            write_kv(rope.kv, rope.slot_mapping, key, value)
        if rope.query_scale is not None:
            query = (query * rope.query_scale.unsqueeze(-1)).to(qkv.dtype)
        return query

    def head_linear(self, x: torch.Tensor, linear: HeadLinear) -> torch.Tensor:
        """x [tokens, heads, in] → the product of each head with its weight [tokens, heads, out].

        The values of a head of x must be next to each other, but heads need not be. The result may
        be longer in memory, too.
        """
        return torch.einsum("thi,hoi->tho", x, linear.weight)

    def latent_query(
        self,
        query: torch.Tensor,
        latent: torch.Tensor,
        norm: Norm,
        absorb: HeadLinear,
        rope: RopeArgs,
    ) -> torch.Tensor:
        """Queries of latents, and the write of the tokens' latents to the KV cache.

        query [tokens, heads, plain + rotary_dim]: the plain values, which `absorb` multiplies by
        the rows of W_UK (DeepSeek-V2, 2.1.2), and the rotated ones; latent [tokens, rank +
        rotary_dim]: the latent, which is normalized, and the key that is rotated for all heads →
        [tokens, heads, rank + rotary_dim]. Latents are stored like that in rope.kv.
        """
        rotary = rope.cos_sin.shape[1]
        plain, turned = query.split((query.shape[2] - rotary, rotary), dim=-1)
        compressed, key = latent.unsqueeze(1).split((latent.shape[1] - rotary, rotary), dim=-1)
        key = rotate(key.float(), rope.cos_sin)
        write_kv(rope.kv, rope.slot_mapping, torch.cat((rms_norm(compressed, norm), key), dim=-1))
        absorbed = self.head_linear(plain, absorb)
        return torch.cat((absorbed, rotate(turned, rope.cos_sin)), dim=-1)

    def attention(
        self,
        query: torch.Tensor,
        kv: torch.Tensor,
        batch: ForwardBatch,
        group: GroupTables,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of each sequence's new tokens over its paged KV.

        query [tokens, heads, head_dim] (head h reads KV head h // (heads / kv_heads)); kv as
        `empty_cache` returns it; sinks [heads] or None → [tokens, heads, head_dim]. A sink is one
        more column of the softmax, after scaling, that is then dropped. With a spec.latent_dim the
        result is [tokens, heads, latent_dim], whose heads may be further apart in memory.
        """
        if len(batch.host_context_lens) != len(batch.host_query_lens):
            raise RuntimeError("torch's attention needs lengths that a captured step does not have")
        _, heads, _ = query.shape
        kv_heads = kv.shape[3]
        out = query.new_empty(*query.shape[:2], spec.latent_dim or query.shape[2])
        first = 0
        lengths = zip(batch.host_query_lens, batch.host_context_lens, strict=True)
        for row, (count, context) in enumerate(lengths):
            stored = kv[:, group.block_table[row]].flatten(1, 2)[:, :context]
            vectors = read_kv(stored, torch.float32)
            key, value = vectors[0], vectors[-1][..., : out.shape[2]]
            q = query[first : first + count].float().unflatten(1, (kv_heads, heads // kv_heads))
            scores = torch.einsum("qhgd,khd->hgqk", q, key) * spec.scale
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            position = torch.arange(context, device=query.device)
            age = position[context - count :, None] - position[None, :]  # 0 for the token itself
            visible = age >= 0
            if spec.window is not None:
                visible &= age < spec.window
            scores = scores.masked_fill(~visible, float("-inf"))
            if sinks is not None:
                column = sinks.float().view(kv_heads, -1, 1, 1).expand(-1, -1, count, 1)
                scores = torch.cat((scores, column), dim=-1)
            probs = scores.softmax(-1)[..., :context]
            # Values outside the window can be anything, NaN included, and 0 · NaN is NaN.
            value = value.masked_fill(~visible.any(0)[:, None, None], 0.0)
            mixed = torch.einsum("hgqk,khd->qhgd", probs, value)
            out[first : first + count] = mixed.flatten(1, 2).to(query.dtype)
            first += count
        return out

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

    def route(
        self, logits: torch.Tensor, router: RouterSpec, correction: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [tokens, experts] → (experts int64, weights float32), both [tokens, top_k].

        correction: float32 [experts], added to the scores for the choice alone; or, if the router
        scales experts, a factor of each expert's weights.
        """
        logits, factors = logits.float(), None
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

    def argmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [rows, vocab] → (largest logit, its token) [rows]; of equal ones the first."""
        return logits.max(-1)

    def top_tokens(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest logits of each row, equal ones by id: (values, ids int64) [rows, count].

        logits [rows, vocab]; fewer than `count` if the vocabulary is smaller.
        """
        return top_tokens(logits, count)

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor | None,
        top_p: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        """Sample a token for each row from its softmax after truncation by top-k, then top-p.

        logits [rows, vocab]; for each row temperature float32, above 0; top_k int64, how many
        tokens may be sampled, 0 for all (None: all in every row); top_p float32, the share of the
        probability that top-k leaves which the most likely tokens must reach; uniform float64 in
        [0, 1) → int64 [rows].

        Tokens are ordered by probability, equal ones by id, both for the limits and for the inverse
        of the cumulative distribution at `uniform`. The limits need this order anyway, and a sample
        among the most likely tokens then does not depend on the number of others. A row of NaN
        yields a valid token.
        """
        return sample_sorted(logits, temperature, top_k, top_p, uniform)

    def adjust_logits(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        last: torch.Tensor,
        positions: torch.Tensor,
        tables: AdjustmentTables,
    ) -> torch.Tensor:
        """Change the logits by what the rows' requests ask for, in place, and return them.

        The arguments are those of `sample_rows`, which follows. First the biases that apply at the
        row's position, then the repetition, frequency and presence penalties, then min-p, whose
        tokens become -inf. The row's last token is counted before, unless it was counted when the
        row was set. Nothing here waits for the device or depends on its values, so that a GPU can
        capture it.
        """
        return adjust_logits(logits, rows, last, positions, tables)

    def sample_rows(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        last: torch.Tensor,
        positions: torch.Tensor | None = None,
        tables: SamplingTables | None = None,
    ) -> torch.Tensor:
        """Choose each sequence's next token and write it to `last`, by the sequence's row.

        logits float32 [n, vocab]; rows int64 [n], the sequences' rows; last int64 [all rows];
        positions int32 or int64 [n], the index of the new token in its sequence. A row's token is
        the most likely one at temperature 0 or without tables, from `sample` if top-k or top-p
        leaves tokens out, and else from `sample_vocabulary`, with the number of `keyed_uniform`.

        Returns the tokens int64 [n], NO_TOKEN where the row's largest logit is not finite; such a
        row has a valid token in `last`. Nothing here waits for the device or depends on its values,
        so that a GPU can capture it.
        """
        highest, tokens = self.argmax(logits)
        if tables is not None and positions is not None:
            temperature, top_p = tables.temperature_and_top_p[rows].unbind(1)
            top_k, seeds = tables.top_k_and_seed[rows].unbind(1)
            is_greedy = temperature == 0
            temperature = torch.where(is_greedy, 1.0, temperature)
            uniform = keyed_uniform(seeds, positions.long())
            sampled = torch.where(
                (top_k > 0) | (top_p < 1),
                self.sample(logits, temperature, top_k, top_p, uniform),
                sample_vocabulary(logits, highest, temperature, uniform),
            )
            tokens = torch.where(is_greedy, tokens, sampled)
        last.index_copy_(0, rows, tokens)
        return torch.where(highest.isfinite(), tokens, NO_TOKEN)


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


def norm_heads(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """The norm of each head of x [tokens, heads, head_dim], or of all at once, by its size."""
    if norm is None:
        return x
    rows = x if norm.size == x.shape[-1] else x.flatten(1)
    return rms_norm(rows, norm).to(x.dtype).view_as(x)


def rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotation of the first rotary_dim values of each head; the others stay.

    x [tokens, heads, head_dim], cos_sin float32 [tokens, rotary_dim].
    """
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    rotary, rest = x.split((cos_sin.shape[1], x.shape[2] - cos_sin.shape[1]), dim=-1)
    first, second = rotary.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


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


def choose_backend(device: torch.device, dtype: torch.dtype, kv_dtype: str = "auto") -> Backend:
    """Return the fastest backend for a device, a compute dtype and a dtype of the KV cache.

    torch's device type "cuda" also stands for AMD's GPUs where torch is built for HIP. Raises
    KvDtypeError.
    """
    if device.type == "cpu":
        from model.ops.cpu.backend import CpuBackend

        return CpuBackend(device, dtype, kv_dtype)
    if device.type == "cuda" and find_spec("triton") is not None:
        # Imported only here: torch for CPUs comes without Triton.
        from model.ops.triton.backend import TritonBackend

        return TritonBackend(device, dtype, kv_dtype=kv_dtype)
    return Backend(device, dtype, kv_dtype)
