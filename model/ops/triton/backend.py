"""TritonBackend: the operations as Triton kernels, one source for NVIDIA's and AMD's GPUs.

Dense linear layers are computed by torch (cuBLAS, hipBLASLt) except for few rows, so dense weights
keep torch's layout.
"""

from typing import Any

import torch
import triton

from model.ops.backend import Backend
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.specs import (
    Activation,
    AttentionSpec,
    Experts,
    ExpertShard,
    Linear,
    Norm,
    RopeArgs,
    RouterSpec,
)
from model.ops.triton.attention import attention
from model.ops.triton.embedding import embed
from model.ops.triton.experts import experts as grouped_experts
from model.ops.triton.fused import norm_experts, norm_mlp, norm_qkv
from model.ops.triton.linear import float32_product, is_one_row, norm_linear
from model.ops.triton.linear import linear as few_rows_linear
from model.ops.triton.mxfp4 import dense_weights, pack
from model.ops.triton.norm import activate, add_rms_norm, delta_parts
from model.ops.triton.rotary import rotate_and_write
from model.ops.triton.route import MAX_PAIRS, route
from model.ops.triton.sampling import sample
from model.ops.triton.tiles import Target, target_of


class TritonBackend(Backend):
    """Triton kernels; fused ones for up to the number of rows for which they are faster.

    target: the device that kernels are launched for; by default the backend's device.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, target: Target | None = None):
        super().__init__(device, dtype)
        self.target = target_of(device) if target is None else target

    def kernels(self, processor: str) -> str:
        """As `Backend.kernels`; tiles and splits depend on the architecture and the processors."""
        target = f"{self.target.architecture}, {self.target.processors} processors"
        return f"Triton {triton.__version__} on {processor} ({target})"

    def pack_experts(self, weights: Any) -> Any:
        """As `Backend.pack_experts`: dense weights stay as they are."""
        return dense_weights(weights)

    def pack_mxfp4(self, weights: Any) -> Any:
        """As `Backend.pack_mxfp4`: packed in words, or dense if a scale is out of range."""
        return pack(weights, self.dtype, self.target.mxfp4_run)

    def embed(
        self, table: torch.Tensor, ids: torch.Tensor, scale: float, first: int = 0
    ) -> torch.Tensor:
        """As `Backend.embed`."""
        return embed(table, ids, scale, first, self.target)

    def linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """As `Backend.linear`."""
        return few_rows_linear(x, linear, self.target)

    def logits(self, x: torch.Tensor, head: Linear, scale: float) -> torch.Tensor:
        """As `Backend.logits`."""
        if is_one_row(x, self.target):
            product = norm_linear(x, None, None, head, self.target, dtype=torch.float32)[1]
        else:
            product = float32_product(x, head.weight)
        return self.scale(product, scale)

    def add_rms_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Backend.add_rms_norm`."""
        return add_rms_norm(x, delta, norm, self.dtype, self.target)

    def _fuses(self, x: torch.Tensor, most_rows: int) -> bool:
        """Whether to fuse; not in float16, whose products may overflow before they are scaled."""
        return 0 < len(x) <= most_rows and self.dtype != torch.float16

    def norm_qkv(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        norm: Norm,
        qkv: Linear,
        rope: RopeArgs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Backend.norm_qkv`, fused for few rows."""
        # A tile of rows does not have the registers to sum parts of a delta.
        is_one_delta = delta_parts(delta) <= 1 or is_one_row(x, self.target)
        if self._fuses(x, self.target.tiles.fused_qkv) and is_one_delta:
            return norm_qkv(x, delta, norm, qkv, rope, self.target)
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
        tiles = self.target.tiles
        has_bias = gate_up.has_bias or down.has_bias
        most_rows = max(tiles.fused_gate_up, 0 if has_bias else tiles.fused_mlp)
        if self._fuses(x, most_rows) and activation == Activation():
            return norm_mlp(x, delta, norm, gate_up, down, self.target)
        return super().norm_mlp(x, delta, norm, gate_up, down, activation)

    def norm_experts(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        norm: Norm,
        router: Linear,
        router_spec: RouterSpec,
        experts: Experts,
        activation: Activation,
        shard: ExpertShard = ExpertShard(),  # noqa: B008 - immutable
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Backend.norm_experts`, fused for few rows; then the sum is left to the next norm."""
        arguments = x, delta, norm, router, router_spec, experts, activation, shard
        most_rows = MAX_PAIRS // triton.next_power_of_2(router_spec.top_k)
        # A row is multiplied in float32, so unlike in other fusions float16 does not overflow.
        if 0 < len(x) <= min(self.target.tiles.fused_router, most_rows):
            return norm_experts(*arguments, self.target)
        return super().norm_experts(*arguments)

    def rotate_and_write(self, qkv: torch.Tensor, rope: RopeArgs) -> torch.Tensor:
        """As `Backend.rotate_and_write`."""
        return rotate_and_write(qkv, rope, self.target)

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
        return attention(query, kv, batch, group, spec, sinks, self.target)

    def activate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """As `Backend.activate`."""
        return activate(gate_up, activation, self.target)

    def route(self, logits: torch.Tensor, router: RouterSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Backend.route`."""
        return route(logits, router, self.target)

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
        return grouped_experts(x, chosen, weights, experts, activation, shard, self.target)

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor | None,
        top_p: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        """As `Backend.sample`."""
        return sample(logits, temperature, top_k, top_p, uniform, self.target)
