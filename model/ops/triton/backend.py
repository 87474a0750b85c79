"""TritonBackend: the operations as Triton kernels, one source for NVIDIA's and AMD's GPUs.

Dense linear layers are computed by torch (cuBLAS, hipBLASLt) except for few rows, so dense weights
keep torch's layout.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import triton

from model.ops.backend import Backend, KvDtypeError
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.specs import (
    Activation,
    AdjustmentTables,
    AttentionSpec,
    Experts,
    ExpertShard,
    Float8Format,
    HeadLinear,
    IntegerFormat,
    Linear,
    Norm,
    RopeArgs,
    Router,
    RouterSpec,
    SamplingTables,
)
from model.ops.triton.attention import arrival_counters, attention
from model.ops.triton.experts import experts as grouped_experts
from model.ops.triton.fused import norm_experts, norm_mlp, norm_qkv
from model.ops.triton.kernels.cache_keys import fix_cache_keys
from model.ops.triton.kernels.embedding import embed
from model.ops.triton.linear import float32_product, head_linear, is_one_row, norm_linear
from model.ops.triton.linear import linear as few_rows_linear
from model.ops.triton.mxfp4 import dense_weights, pack
from model.ops.triton.norm import (
    activate,
    add_gated,
    add_rms_norm,
    delta_parts,
    gated,
    scaled_sum,
)
from model.ops.triton.quantized.linear import quantized_linear
from model.ops.triton.quantized.weights import UNIT, QuantizedWeight
from model.ops.triton.recurrent.operations import TritonRecurrentOps
from model.ops.triton.rotary import latent_query, rotate_and_write
from model.ops.triton.route import MAX_PAIRS, route
from model.ops.triton.sampling import adjust_logits, sample_rows
from model.ops.triton.selection import TORCH_METHODS, Choice, Selection, candidates, describe
from model.ops.triton.tiles import Target, target_of

fix_cache_keys()  # of all kernels: their modules are imported above

_IN_EXPERTS = ("add_rms_norm", "route", "experts")
"""Operations whose kernels the fused `norm_experts` runs, or whose storage it reads."""


class TritonBackend(TritonRecurrentOps, Backend):
    """Triton kernels; fused ones for up to the number of rows for which they are faster.

    target: the device that kernels are launched for; by default the backend's device. selection:
    the operations that do not use the default kernels and tiles.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        target: Target | None = None,
        selection: Selection = Selection(),  # noqa: B008 - immutable
        kv_dtype: str = "auto",
    ):
        self.target = target_of(device) if target is None else target
        super().__init__(device, dtype, kv_dtype)
        self.selection = selection
        self._targets = {op: selection.target(op, self.target) for op in selection.choices}
        for op in selection.choices:
            if selection.is_torch(op):
                for name in (op, *TORCH_METHODS.get(op, ())):
                    setattr(self, name, MethodType(getattr(Backend, name), self))
        self._arrivals = arrival_counters(self.target, device)

    def stored_kv_dtype(self, name: str) -> torch.dtype:
        """As `Backend.stored_kv_dtype`, with the form of fp8 that the hardware has."""
        if name == "int8":
            raise KvDtypeError("kernels for GPUs have no KV cache in int8")
        if name != "fp8":
            return super().stored_kv_dtype(name)
        if self.target.fp8 is None:
            raise KvDtypeError(f"{self.target.architecture} has no fp8")
        return self.target.fp8

    def kernel_choices(self, op: str) -> list[Choice]:
        """As `Backend.kernel_choices`; none for operations that have no kernel here."""
        if getattr(type(self), op) is getattr(Backend, op):
            return []
        return candidates(op, self.target)

    def with_choices(self, choices: Mapping[str, Choice]) -> "TritonBackend":
        """As `Backend.with_choices`."""
        return self._with(self.target, Selection(choices))

    def _with(self, target: Target, selection: Selection) -> "TritonBackend":
        return type(self)(self.device, self.dtype, target, selection, self.kv_name)

    def describe_choice(self, op: str, choice: Choice) -> str:
        """As `Backend.describe_choice`."""
        return describe(op, choice)

    def _target(self, op: str) -> Target:
        """The device with the tiles of an operation."""
        return self._targets.get(op, self.target)

    def kernels(self, processor: str) -> str:
        """As `Backend.kernels`; tiles and splits depend on the architecture and the processors."""
        target = f"{self.target.architecture}, {self.target.processors} processors"
        return f"Triton {triton.__version__} on {processor} ({target})"

    def without_programmatic_launch(self) -> Backend:
        """As `Backend.without_programmatic_launch`."""
        if not self.target.tiles.programmatic_launch:
            return self
        tiles = replace(self.target.tiles, programmatic_launch=False)
        selection = self.selection.without("programmatic_launch")
        return self._with(replace(self.target, tiles=tiles), selection)

    def pack_experts(self, weights: Any) -> Any:
        """As `Backend.pack_experts`: weights stay as they are."""
        return dense_weights(weights) if isinstance(weights, torch.Tensor) else self.pack(weights)

    def pack(self, weight: Any) -> Any:
        """As `Backend.pack`."""
        return weight.finished() if isinstance(weight, QuantizedWeight) else weight

    def empty_integers(self, shape: tuple[int, ...], form: IntegerFormat, parts: int = 1) -> Any:
        """As `Backend.empty_integers`: for kernels that unpack them."""
        if not _fits(shape, form.group_of(shape[-1])):
            return self.empty_weight(shape, parts)
        return QuantizedWeight.integers(shape, form, self.device, self.target.mxfp4_run)

    def empty_float8(self, shape: tuple[int, ...], form: Float8Format, parts: int = 1) -> Any:
        """As `Backend.empty_float8`: in the form of the hardware, or for kernels that convert."""
        if not _fits(shape, form.group):
            return self.empty_weight(shape, parts)
        return QuantizedWeight.float8(shape, form, self.device, self.target)

    def keeps_mxfp4(self, stacked: bool) -> bool:
        """As `Backend.keeps_mxfp4`: only experts, of whose kernels there are such."""
        return stacked

    def pack_mxfp4(self, weights: Any) -> Any:
        """As `Backend.pack_mxfp4`: packed in words, or dense if a scale is out of range."""
        return pack(weights, self.dtype, self.target.mxfp4_run, self.target.mxfp4_rows)

    def embed(
        self, table: torch.Tensor, ids: torch.Tensor, scale: float, first: int = 0
    ) -> torch.Tensor:
        """As `Backend.embed`."""
        return embed(table, ids, scale, first, self._target("embed"))

    def linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """As `Backend.linear`."""
        if isinstance(linear.weight, QuantizedWeight):
            return quantized_linear(x, linear.weight, linear.bias, self._target("linear"))
        return few_rows_linear(x, linear, self._target("linear"))

    def logits(
        self, x: torch.Tensor, head: Linear, scale: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Backend.logits`, but rounded if there is a bias and more than one row.

        Only gpt-oss's router has one, which is trained with rounded logits; this saves a launch.
        """
        target = self._target("logits")
        is_packed = isinstance(head.weight, QuantizedWeight)
        if head.bias is not None and not is_packed and not is_one_row(x, target):
            return few_rows_linear(x, head, target)
        if out is None:
            out = x.new_empty(len(x), head.outputs, dtype=torch.float32)
        if is_packed:
            quantized_linear(x, head.weight, head.bias, target, out)
        elif is_one_row(x, target):
            norm_linear(x, None, None, head, target, out=out)
        else:
            float32_product(x, head.weight, out)
        return out if scale == 1 else out.mul_(scale)

    def add_rms_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Backend.add_rms_norm`."""
        return add_rms_norm(x, delta, norm, self.dtype, self._target("add_rms_norm"))

    def scaled_sum(
        self, x: torch.Tensor, delta: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        """As `Backend.scaled_sum`."""
        return scaled_sum(x, delta, factor, self._target("scaled_sum"))

    def _fuses(self, x: torch.Tensor, norm: Norm, most_rows: int, *linears: Linear) -> bool:
        """Whether to fuse; not in float16, whose products may overflow before they are scaled.

        linears: those that would be in the kernel, whose weights must be dense.
        """
        is_fused = 0 < len(x) <= most_rows and not norm.is_identity
        is_fused = is_fused and all(isinstance(each.weight, torch.Tensor) for each in linears)
        return is_fused and self.dtype != torch.float16

    def norm_qkv(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        norm: Norm,
        qkv: Linear,
        rope: RopeArgs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Backend.norm_qkv`, fused for few rows."""
        target = self._target("norm_qkv")
        # A tile of rows does not have the registers to sum parts of a delta.
        is_one_delta = delta_parts(delta) <= 1 or is_one_row(x, target)
        if self._fuses(x, norm, target.tiles.fused_qkv, qkv) and is_one_delta:
            return norm_qkv(x, delta, norm, qkv, rope, target)
        return super().norm_qkv(x, delta, norm, qkv, rope)

    def norm_mlp(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        norm: Norm,
        gate_up: Linear,
        down: Linear,
        activation: Activation,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Backend.norm_mlp`, fused for few rows."""
        target = self._target("norm_mlp")
        tiles = target.tiles
        has_bias = gate_up.has_bias or down.has_bias
        most_rows = max(tiles.fused_gate_up, 0 if has_bias else tiles.fused_mlp)
        is_plain = activation == Activation()
        if is_plain and self._fuses(x, norm, most_rows, gate_up, down):
            return norm_mlp(x, delta, norm, gate_up, down, target)
        return super().norm_mlp(x, delta, norm, gate_up, down, activation)

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
        """As `Backend.norm_experts`, fused for few rows; then the sum is left to the next norm."""
        arguments = x, delta, norm, router, experts, activation, shard
        most_rows = MAX_PAIRS // triton.next_power_of_2(router.spec.top_k)
        # A row is multiplied in float32, so unlike in other fusions float16 does not overflow.
        most_rows = min(self._target("norm_experts").tiles.fused_router, most_rows)
        is_kernel = not any(map(self.selection.is_torch, _IN_EXPERTS))
        if 0 < len(x) <= most_rows and is_kernel and not norm.is_identity:
            summed, normed, out = norm_experts(*arguments, self._target("experts"))
            if experts.shared is not None:
                out = self.shared_expert(normed, out, experts.shared, activation)
            return summed, out
        return super().norm_experts(*arguments)

    def rotate_and_write(self, qkv: torch.Tensor, rope: RopeArgs) -> torch.Tensor:
        """As `Backend.rotate_and_write`."""
        return rotate_and_write(qkv, rope, self._target("rotate_and_write"))

    def head_linear(self, x: torch.Tensor, linear: HeadLinear) -> torch.Tensor:
        """As `Backend.head_linear`."""
        return head_linear(x, linear)

    def latent_query(
        self,
        query: torch.Tensor,
        latent: torch.Tensor,
        norm: Norm,
        absorb: HeadLinear,
        rope: RopeArgs,
    ) -> torch.Tensor:
        """As `Backend.latent_query`."""
        return latent_query(query, latent, norm, absorb, rope, self._target("latent_query"))

    def attention(
        self,
        query: torch.Tensor,
        kv: torch.Tensor,
        batch: ForwardBatch,
        group: GroupTables,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Backend.attention`."""
        target = self._target("attention")
        return attention(query, kv, batch, group, spec, sinks, target, self._arrivals)

    def activate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """As `Backend.activate`."""
        return activate(gate_up, activation, self._target("activate"))

    def gated(self, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """As `Backend.gated`."""
        return gated(gate, up, activation, self._target("gated"))

    def route(
        self, logits: torch.Tensor, router: RouterSpec, correction: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Backend.route`."""
        return route(logits, router, correction, self._target("route"))

    def add_gated(
        self, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None
    ) -> torch.Tensor:
        """As `Backend.add_gated`."""
        return add_gated(x, y, gate, self._target("add_gated"))

    def experts(
        self,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        experts: Experts,
        activation: Activation,
        shard: ExpertShard = ExpertShard(),  # noqa: B008 - immutable
    ) -> torch.Tensor:
        """As `Backend.experts`."""
        target = self._target("experts")
        return grouped_experts(x, chosen, weights, experts, activation, shard, target)

    def adjust_logits(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        last: torch.Tensor,
        positions: torch.Tensor,
        tables: AdjustmentTables,
    ) -> torch.Tensor:
        """As `Backend.adjust_logits`."""
        target = self._target("adjust_logits")
        return adjust_logits(logits, rows, last, positions, tables, target)

    def sample_rows(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        last: torch.Tensor,
        positions: torch.Tensor | None = None,
        tables: SamplingTables | None = None,
    ) -> torch.Tensor:
        """As `Backend.sample_rows`."""
        target = self._target("sample_rows")
        return sample_rows(logits, rows, last, positions, tables, target)


def _fits(shape: tuple[int, ...], group: int) -> bool:
    """Whether kernels take weights of this shape with a scale for `group` inputs (0: all)."""
    return shape[-1] % (group or UNIT) == 0 and shape[-1] % UNIT == 0
