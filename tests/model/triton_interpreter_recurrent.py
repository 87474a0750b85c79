"""Compare the kernels of recurrent layers with one token after the other, in the interpreter.

Run by test_triton.py as triton_interpreter.py is.
"""

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from model.ops.backend import Backend
from model.ops.specs import DeltaRuleSpec, Norm, NormSpec
from model.ops.triton.backend import TritonBackend
from model.ops.triton.tiles import target_of
from tests.model.test_recurrent import CPU, Layer, check_sequences

# Sizes that are not those of a tile, several columns of a state, and fewer keys than values.
SPEC = DeltaRuleSpec(key_heads=1, value_heads=2, key_dim=24, value_dim=40, kernel=4)
NARROW = DeltaRuleSpec(key_heads=1, value_heads=1, key_dim=128, value_dim=32, kernel=4)


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply bfloat16, of which it would multiply the bits."""
    create_dot = InterpreterBuilder.create_dot

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def multiply(builder: Any, a: Any, b: Any, *more: Any) -> Any:
        return create_dot(builder, wide(a), wide(b), *more)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", multiply)


def kernels(dtype: torch.dtype) -> TritonBackend:
    return TritonBackend(CPU, dtype, target_of(CPU))


@pytest.mark.parametrize("cuts", [[], [1, 2, 5, 21, 22]])
def test_chunks_and_single_tokens(cuts: list[int]) -> None:
    layer = Layer(SPEC, 40)
    out, state = layer.run(kernels(torch.float32), cuts)
    expected, last = layer.expected()
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last.float(), rtol=1e-4, atol=1e-5)


def test_sequences_of_a_step() -> None:
    check_sequences(kernels(torch.float32))


@pytest.mark.usefixtures("bfloat16_products")
def test_many_tokens_in_bfloat16() -> None:
    layer = Layer(NARROW, 500, torch.bfloat16)
    out, state = layer.run(kernels(torch.bfloat16), [200])
    expected, last = layer.expected()
    # The interpreter truncates to bfloat16, also the results of the convolution.
    assert (out.double() - expected).norm() < 1.5e-2 * expected.norm()
    assert (state.double() - last).norm() < 1.5e-2 * last.norm()


def test_a_sequence_without_tokens_changes_nothing() -> None:
    """Captured steps have such sequences among their chunks."""
    ops, layer = kernels(torch.float32), Layer(SPEC, 5)
    conv_state, state = layer.empty_state(3)
    batch = layer.batch([5, 0], [5, 0], [1, 2])
    mixed = ops.causal_conv(layer.projected, layer.conv, conv_state, batch)
    ops.delta_rule(mixed, layer.gates_in, layer.gates, state, batch)
    assert conv_state[[0, 2]].isnan().all()
    assert state[[0, 2]].isnan().all()
    torch.testing.assert_close(state[1], layer.expected()[1].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 40, generator=random).to(dtype)
    gate = torch.randn(5, 200, generator=random).to(dtype)
    norm = Norm(40, NormSpec(1e-6), weight=torch.rand(40, generator=random))
    slack = 1e-5 if dtype == torch.float32 else 2e-2
    plain, ops = Backend(CPU, dtype), kernels(dtype)
    found = ops.gated_norm(x, gate[:, 8:128], norm)
    torch.testing.assert_close(
        found, plain.gated_norm(x, gate[:, 8:128], norm), rtol=slack, atol=slack
    )
    flat, own = x.flatten(1), gate[:, :120].contiguous()
    found = ops.output_gate(flat, own)
    torch.testing.assert_close(found, plain.output_gate(flat, own), rtol=slack, atol=slack)
