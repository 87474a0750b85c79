"""The operations on a CPU: native kernels for bfloat16 where they are built, else torch."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch

from model.ops.backend import Compute
from model.ops.cpu import huge_pages, native
from model.ops.cpu.adjustments import adjust_logits
from model.ops.cpu.bindings import kernels, library
from model.ops.cpu.onednn import OneDnnBackend
from model.ops.cpu.packed import MXFP4, PANEL, Packed
from model.ops.cpu.recorder import Recorder, leave_to_torch
from model.ops.cpu.recurrent import CpuRecurrentOps
from model.ops.cpu.sampling import sample, sample_by_kind, top_tokens
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.mxfp4 import MXFP4_BLOCK
from model.ops.quantized import GroupedFloat
from model.ops.sampling import NO_TOKEN
from model.ops.specs import (
    COMPRESSED_ROWS,
    STEPS_BEFORE_COPIES,
    Activation,
    AdjustmentTables,
    AttentionSpec,
    Experts,
    ExpertShard,
    HeadLinear,
    IntegerFormat,
    Linear,
    Norm,
    RopeArgs,
    RouterSpec,
    SamplingTables,
)


class _Copies:
    """The compressed copies of dense weights, of `left` bytes at most."""

    _VALUES_OF_STEP = 1 << 24  # that are compressed after a step, at least: some ten milliseconds

    def __init__(self, left: int):
        self._left, self._steps = left, 0
        self._dense = self._copied = 0  # values
        self._missing: list[weakref.ref[Packed]] = []

    def add(self, weight: Packed) -> None:
        """Count a weight; it will have a copy if the memory for it is left."""
        if not weight.compressed_bytes:
            return
        self._dense += math.prod(weight.shape)
        if weight.compressed_bytes <= self._left:
            self._left -= weight.compressed_bytes
            self._missing.append(weakref.ref(weight))

    def make(self, values: float) -> None:
        """Make copies of at least so many values, as far as there are weights without one."""
        while self._missing and values > 0:
            weight = self._missing.pop()()
            if weight is None:  # freed
                continue
            try:
                done = weight.compress()
            except (MemoryError, RuntimeError):  # there is less memory than there was
                self._missing.clear()
                return
            self._copied += math.prod(weight.shape) * done
            values -= math.prod(weight.shape)

    def note_step(self, rows: int) -> float:
        """As Backend.note_step."""
        if not self._dense or not 0 < rows <= COMPRESSED_ROWS:
            return 0.0
        share = self._copied / self._dense
        self._steps += 1
        if self._steps > STEPS_BEFORE_COPIES:
            self.make(self._VALUES_OF_STEP)
        return share


class CpuBackend(CpuRecurrentOps, OneDnnBackend):
    """Native kernels for the sizes that they take; torch computes operations of other sizes.

    An operation that is left to torch cannot be recorded: `leave_to_torch` then raises.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, kv_dtype: str = "auto"):
        super().__init__(device, dtype, kv_dtype)
        self._has_kernels = dtype == torch.bfloat16 and library() is not None
        self._copies = _Copies(0)

    def kernels(self, processor: str) -> str:
        """As Backend.kernels; the native kernels round alike on every processor of their level."""
        return f"native {kernels.form}" if self._has_kernels else super().kernels(processor)

    def _fits(self, size: int, unit: int) -> bool:
        """Whether the kernels take this size, which must be a multiple of `unit`."""
        return self._has_kernels and size % unit == 0

    def _packs(self, shape: tuple[int, ...], parts: int = 1) -> bool:
        """Whether weights of this shape lie in the layout of the kernels."""
        *stack, outputs, inputs = shape
        # The outputs of experts are taken panel by panel.
        return self._fits(inputs, MXFP4_BLOCK) and not (stack and outputs % (parts * PANEL))

    def empty_weight(self, shape: tuple[int, ...], parts: int = 1) -> Any:
        """Return storage in the layout of the kernels where they take the shape."""
        if self._packs(shape, parts):
            return Packed.empty(shape, parts=parts)
        return super().empty_weight(shape, parts)

    def pack(self, weight: Any) -> Any:
        """As Backend.pack; weights for the kernels were packed as they were filled."""
        if isinstance(weight, Packed):
            return self._with_copy(weight)
        if isinstance(weight, GroupedFloat) or self._packs(weight.shape):
            return weight
        return super().pack(weight)

    def pack_experts(self, weights: Any) -> Any:
        """As Backend.pack_experts; see `pack`."""
        if isinstance(weights, Packed):
            return self._with_copy(weights)
        if isinstance(weights, GroupedFloat) or self._packs(weights.shape):
            return weights
        return super().pack_experts(weights)

    def empty_head(self, shape: tuple[int, ...]) -> Any:
        """As `empty_weight`."""
        if self._packs(shape):
            return Packed.empty(shape)
        return super().empty_head(shape)

    def pack_head(self, weight: Any) -> Any:
        """Return the weight if it was filled packed, else a copy."""
        if not self._packs(tuple(weight.shape)):
            return super().pack_head(weight)
        if isinstance(weight, Packed):
            return self._with_copy(weight)
        packed = Packed.empty(weight.shape)
        packed.copy_(weight)
        return self._with_copy(packed)

    def allow_copies(self, size: int) -> None:
        """As Backend.allow_copies."""
        self._copies = _Copies(size)

    def compress(self) -> None:
        """As Backend.compress."""
        self._copies.make(math.inf)

    def note_step(self, rows: int) -> float:
        """As Backend.note_step."""
        return self._copies.note_step(rows)

    def _with_copy(self, weight: Packed) -> Packed:
        """Return the weight, which will have a compressed copy if there is memory for it."""
        self._copies.add(weight)
        return weight

    def keeps_mxfp4(self, stacked: bool) -> bool:
        """As Backend.keeps_mxfp4: if there are kernels."""
        return self._has_kernels

    def empty_mxfp4(self, shape: tuple[int, ...], parts: int = 1) -> Any:
        """As `empty_weight`, for MXFP4."""
        if self._packs(shape, parts):
            return Packed.empty(shape, MXFP4, parts)
        return super().empty_mxfp4(shape, parts)

    def pack_mxfp4(self, weights: Any) -> Any:
        """As `pack_experts`, for MXFP4."""
        return weights if self._packs(weights.shape) else super().pack_mxfp4(weights)

    def keeps_integers(self, quantizes: bool) -> bool:
        """As Backend.keeps_integers: if there are kernels."""
        return self._has_kernels

    def empty_integers(self, shape: tuple[int, ...], form: IntegerFormat, parts: int = 1) -> Any:
        """As Backend.empty_integers."""
        group = form.group_of(shape[-1])
        if self._packs(shape, parts) and not (group % MXFP4_BLOCK or shape[-1] % group):
            return Packed.empty_integers(shape, form, parts)
        return self.empty_weight(shape, parts)

    def empty_cache(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return memory of which pages that are never touched cost nothing."""
        cache = huge_pages.empty(self.cache_shape(shape), self.kv_dtype)
        huge_pages.interleave(cache)  # any thread may read any sequence
        return cache

    def empty_state(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As `empty_cache`."""
        state = huge_pages.empty(shape, dtype)
        huge_pages.interleave(state)
        return state

    def recorder(self) -> Callable[[Compute], Compute] | None:
        """Return a recorder of the kernels' calls, if there are kernels."""
        return Recorder() if self._has_kernels else None

    def gather(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """As Backend.gather."""
        if library() is not None and table.is_contiguous():
            return native.gather(table, ids)
        leave_to_torch()
        return super().gather(table, ids)

    def embed(
        self, table: torch.Tensor, ids: torch.Tensor, scale: float, first: int = 0
    ) -> torch.Tensor:
        """As Backend.embed."""
        if self._has_kernels:
            return native.embed(table, ids, scale, first)
        leave_to_torch()
        return super().embed(table, ids, scale, first)

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        """As Backend.scale."""
        if factor == 1:
            return x
        if self._has_kernels and x.dtype == self.dtype:
            return native.scale(x, factor)
        leave_to_torch()
        return super().scale(x, factor)

    def _is_native(self, linear: Linear) -> bool:
        """Whether the kernels take the weight of a linear: none reads e4m3."""
        is_e4m3 = isinstance(linear.weight, GroupedFloat)
        return self._fits(linear.inputs, MXFP4_BLOCK) and not is_e4m3

    def linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """As Backend.linear."""
        if self._is_native(linear):
            return native.linear(x, linear.weight, linear.bias)
        leave_to_torch()
        return super().linear(x, linear)

    def logits(
        self, x: torch.Tensor, head: Linear, scale: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As Backend.logits."""
        if not self._is_native(head):
            leave_to_torch()
            return super().logits(x, head, scale, out)
        return native.logits(x, head.weight, head.bias, scale, out)

    def add_rms_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Backend.add_rms_norm."""
        if self._fits(norm.size, 16):
            return native.add_rms_norm(x, delta, norm)
        leave_to_torch()
        return super().add_rms_norm(x, delta, norm)

    def scaled_sum(
        self, x: torch.Tensor, delta: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        """As Backend.scaled_sum."""
        if self._has_kernels:
            return native.scaled_sum(x, delta, factor)
        leave_to_torch()
        return super().scaled_sum(x, delta, factor)

    def rms_norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """As Backend.rms_norm."""
        if self._fits(norm.size, 16):
            return native.rms_norm(x, norm.weight, norm.eps)
        leave_to_torch()
        return super().rms_norm(x, norm)

    def softcap(self, logits: torch.Tensor, cap: float | None) -> torch.Tensor:
        """As Backend.softcap."""
        if cap is None:
            return logits
        if library() is not None:
            return native.softcap(logits, cap)
        leave_to_torch()
        return super().softcap(logits, cap)

    def rotate_and_write(self, qkv: torch.Tensor, rope: RopeArgs) -> torch.Tensor:
        """As Backend.rotate_and_write."""
        fits = self._fits(rope.heads.head_dim, 32) and self._fits(rope.cos_sin.shape[1], 32)
        if fits and self.kv_dtype in native.KV_FORMS:
            return native.rotate_and_write(qkv, rope)
        leave_to_torch()
        return super().rotate_and_write(qkv, rope)

    def head_linear(self, x: torch.Tensor, linear: HeadLinear) -> torch.Tensor:
        """As Backend.head_linear."""
        if self._packs((linear.heads, linear.outputs, linear.inputs)):
            return native.head_linear(x, linear)
        leave_to_torch()
        return super().head_linear(x, linear)

    def latent_query(
        self,
        query: torch.Tensor,
        latent: torch.Tensor,
        norm: Norm,
        absorb: HeadLinear,
        rope: RopeArgs,
    ) -> torch.Tensor:
        """As Backend.latent_query."""
        fits = self._packs((absorb.heads, absorb.outputs, absorb.inputs))
        if fits and self._fits(rope.cos_sin.shape[1], 32) and self.kv_dtype in native.KV_FORMS:
            return native.latent_query(query, latent, norm, absorb, rope)
        leave_to_torch()
        return super().latent_query(query, latent, norm, absorb, rope)

    def attention(
        self,
        query: torch.Tensor,
        kv: torch.Tensor,
        batch: ForwardBatch,
        group: GroupTables,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As Backend.attention."""
        _, heads, head_dim = query.shape
        fits = heads // kv.shape[3] <= native.MAX_GROUP or spec.latent_dim is not None
        fits = fits and head_dim <= native.MAX_HEAD_DIM
        if fits and self._fits(head_dim, 32) and self.kv_dtype in native.KV_FORMS:
            return native.attention(query, kv, batch, group, spec, sinks)
        leave_to_torch()
        return super().attention(query, kv, batch, group, spec, sinks)

    def gated_linear(self, x: torch.Tensor, linear: Linear, activation: Activation) -> torch.Tensor:
        """As Backend.gated_linear."""
        fits = self._is_native(linear) and not linear.outputs % (2 * PANEL)
        if fits and activation.is_gated:
            return native.gated_linear(x, linear.weight, linear.bias, activation)
        return super().gated_linear(x, linear, activation)

    def gated(self, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """As Backend.gated."""
        if self._fits(gate.shape[1], 16):
            return native.gated(gate, up, activation)
        leave_to_torch()
        return super().gated(gate, up, activation)

    def route(
        self, logits: torch.Tensor, router: RouterSpec, correction: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Backend.route."""
        if self._has_kernels:
            return native.route(logits, router, correction)
        leave_to_torch()
        return super().route(logits, router, correction)

    def add_gated(
        self, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None
    ) -> torch.Tensor:
        """As Backend.add_gated."""
        if x.dim() == 2 and self._fits(y.shape[1], 16):
            return native.add_gated(x, y, gate)
        leave_to_torch()
        return super().add_gated(x, y, gate)

    def experts(
        self,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        experts: Experts,
        activation: Activation,
        shard: ExpertShard = ExpertShard(),  # noqa: B008 - immutable
    ) -> torch.Tensor:
        """As Backend.experts."""
        fits = self._packs((experts.count, 2 * experts.size, experts.hidden), 2)
        fits = fits and not isinstance(experts.down, GroupedFloat)
        if fits and shard.size == 1:
            return native.experts(x, chosen, weights, experts, activation)
        if not fits:
            leave_to_torch()
        return super().experts(x, chosen, weights, experts, activation, shard)

    def top_tokens(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As Backend.top_tokens."""
        return top_tokens(logits, count)

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor | None,
        top_p: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        """As Backend.sample."""
        return sample(logits, temperature, top_k, top_p, uniform)

    def adjust_logits(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        last: torch.Tensor,
        positions: torch.Tensor,
        tables: AdjustmentTables,
    ) -> torch.Tensor:
        """As Backend.adjust_logits."""
        return adjust_logits(logits, rows, last, positions, tables)

    def argmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As Backend.argmax, in one call."""
        if not self._has_kernels or logits.dtype != torch.float32:
            return super().argmax(logits)
        return native.argmax(logits.contiguous())

    def sample_rows(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        last: torch.Tensor,
        positions: torch.Tensor | None = None,
        tables: SamplingTables | None = None,
    ) -> torch.Tensor:
        """As Backend.sample_rows; each row is sampled in only the way that it needs."""
        highest, tokens = self.argmax(logits)
        if tables is not None and positions is not None:
            tokens = sample_by_kind(logits, highest, tokens, rows, positions, tables)
        last.index_copy_(0, rows, tokens)
        if not math.isfinite(sum(highest.tolist())):
            tokens = torch.where(highest.isfinite(), tokens, NO_TOKEN)
        return tokens
