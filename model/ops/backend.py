"""Backend: every operation of the decoder in plain torch, the reference for all kernels.

Most stand in files by subject (dense, experts, recurrent, sampling); here are the storage layouts
and attention. They are written for clarity instead of speed: they compute in float32 internally and
run on any device.

`CpuBackend` (model.ops.cpu) and `TritonBackend` (model.ops.triton) override the operations and
storage layouts for which they have faster kernels. A fused operation is a method like any other:
its base form runs the steps one after the other.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch

from model.ops.dense import normalize, rms_norm
from model.ops.experts import ExpertOps
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.kv_values import read_kv, vector_width, write_kv
from model.ops.mxfp4 import Mxfp4
from model.ops.quantized import GroupedFloat, GroupedInt
from model.ops.recurrent import RecurrentOps
from model.ops.sampling import SamplingOps
from model.ops.specs import (
    AttentionSpec,
    Float8Format,
    HeadLinear,
    IntegerFormat,
    Linear,
    Norm,
    RopeArgs,
)
from model.ops.step_parts import INPUT_NORM, ROPE

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

Compute = Callable[[], torch.Tensor]


class KvDtypeError(ValueError):
    """The backend has no operations on a KV cache of this dtype; the text says why."""


class Backend(ExpertOps, RecurrentOps, SamplingOps):
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
        """Return a filled weight in the form that `logits` takes: the head's or a router's.

        The head's may be the embedding.
        """
        return weight

    def allow_copies(self, size: int) -> None:
        """Let weights that are packed from now on have copies of `size` bytes in all.

        Steps of few rows read these copies, which have 12 bits for each value of a dense weight.
        They are made by `compress`, or little by little after steps of few rows.
        """

    def compress(self) -> None:
        """Make all copies of weights that are allowed."""

    def note_step(self, rows: int) -> float:
        """Note a step, and return the share of the dense weights that it read in 12 bits a value.

        After so many steps of few rows that it pays, some of the copies are made.
        """
        return 0.0

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

    def keeps_integers(self, quantizes: bool) -> bool:
        """Return whether weights are integers of 8 or 4 bits in memory; otherwise they are dense.

        quantizes: weights that are dense in files; otherwise those that are integers there.
        """
        return not quantizes

    def empty_integers(self, shape: tuple[int, ...], form: IntegerFormat, parts: int = 1) -> Any:
        """Return storage for integers [out, in] or [experts, out, in], filled as `empty_weight`'s.

        Dense where the kernels do not take the shape.
        """
        if shape[-1] % form.group_of(shape[-1]):
            return self.empty_weight(shape, parts)
        return GroupedInt.empty(shape, form, self.device)

    def keeps_float8(self, quantizes: bool) -> bool:
        """As `keeps_integers`, of weights in e4m3."""
        return True

    def empty_float8(self, shape: tuple[int, ...], form: Float8Format, parts: int = 1) -> Any:
        """As `empty_integers`, for weights in e4m3."""
        group = form.group or shape[-1]
        if shape[-1] % group:
            return self.empty_weight(shape, parts)
        return GroupedFloat.empty(shape, group, self.device)

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
