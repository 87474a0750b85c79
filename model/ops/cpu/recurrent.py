"""The operations of recurrent layers on a CPU: native kernels, in bfloat16 and in float32."""

from typing import Any

import torch

from model.ops.cpu.bindings import kernels, library
from model.ops.cpu.recorder import empty, leave_to_torch
from model.ops.forward_batch import ForwardBatch
from model.ops.recurrent import RecurrentOps
from model.ops.specs import DeltaRuleGates, Norm

_MAX_CONV = 8  # tokens of a convolution
_UNIT = 16  # values of an AVX-512 vector
_COLUMNS = 32  # of a state, which the kernel takes at once


class CpuRecurrentOps(RecurrentOps):
    """Native kernels for the sizes that they take; torch computes operations of other sizes."""

    def causal_conv(
        self, x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, batch: ForwardBatch
    ) -> torch.Tensor:
        """As RecurrentOps.causal_conv."""
        kernel, channels = weight.shape
        if kernel > _MAX_CONV or not _fits(x, channels):
            leave_to_torch()
            return super().causal_conv(x, weight, state, batch)
        out = empty((len(x), channels), x.dtype)
        kernels.causal_conv(
            x.data_ptr(), x.stride(0), weight.data_ptr(), channels, kernel, state.data_ptr(),
            *_sequences(batch), x.dtype == torch.float32, len(x), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def delta_rule(
        self,
        mixed: torch.Tensor,
        gates: torch.Tensor,
        parameters: DeltaRuleGates,
        state: torch.Tensor,
        batch: ForwardBatch,
    ) -> torch.Tensor:
        """As RecurrentOps.delta_rule."""
        spec = parameters.spec
        decay_log, bias = parameters.decay_log, parameters.bias
        if not _fits(mixed, spec.key_dim) or spec.value_dim % _COLUMNS:
            leave_to_torch()
            return super().delta_rule(mixed, gates, parameters, state, batch)
        assert decay_log is not None
        assert bias is not None
        out = empty((len(mixed), spec.value_heads, spec.value_dim), mixed.dtype)
        kernels.delta_rule(
            mixed.data_ptr(), gates.data_ptr(), decay_log.data_ptr(), bias.data_ptr(),
            state.data_ptr(), spec.key_heads, spec.value_heads, spec.key_dim, spec.value_dim,
            *_sequences(batch), mixed.dtype == torch.float32, out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def gated_norm(self, x: torch.Tensor, gate: torch.Tensor, norm: Norm) -> torch.Tensor:
        """As RecurrentOps.gated_norm."""
        if not _fits(x, norm.size):
            leave_to_torch()
            return super().gated_norm(x, gate, norm)
        tokens, heads, size = x.shape
        out = empty((tokens, heads * size), x.dtype)
        kernels.gated_norm(
            x.data_ptr(), gate.data_ptr(), gate.stride(0), norm.weight.data_ptr(), *x.shape,
            norm.eps, x.dtype == torch.float32, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """As RecurrentOps.output_gate."""
        if x.dtype != torch.bfloat16 or not _fits(x, x.shape[1]):
            leave_to_torch()
            return super().output_gate(x, gate)
        out = empty(tuple(x.shape), x.dtype)
        kernels.output_gate(
            x.data_ptr(), gate.data_ptr(), x.numel(), out.data_ptr(), torch.get_num_threads()
        )
        return out


def _fits(x: torch.Tensor, size: int) -> bool:
    """Whether the kernels take this dtype and this size."""
    has_kernels = x.dtype in (torch.bfloat16, torch.float32) and library() is not None
    return has_kernels and size % _UNIT == 0


def _sequences(batch: ForwardBatch) -> tuple[Any, ...]:
    """The sequences of a batch as the kernels take them."""
    assert batch.state_rows is not None
    rows, starts, lengths = batch.state_rows, batch.cu_seqlens_q, batch.context_lens
    return rows.data_ptr(), starts.data_ptr(), lengths.data_ptr(), len(rows)
