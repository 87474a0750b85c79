"""Keys and values as the KV cache stores them."""

import pytest
import torch

from model.config import KV_DTYPES
from model.cost.known_models import named_config
from model.cost.operations import kv_bytes_per_sequence
from model.ops.backend import Backend
from model.ops.cpu.backend import CpuBackend
from model.ops.kv_values import read_kv, rounded
from model.ops.specs import AttentionSpec
from tests.model.ops_helpers import CPU, cpu_backend, rand, reference, rope_args
from tests.model.test_ops import paged

FP8 = torch.float8_e4m3fn


def test_float_dtypes_round_to_nearest() -> None:
    values = rand(50, 3, 32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(read_kv(rounded(values, dtype), torch.float32), values.to(dtype).float())


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e4m3fnuz])
def test_fp8_saturates_and_is_off_by_at_most_half_a_step(dtype: torch.dtype) -> None:
    values = rand(2000, 32)
    found = read_kv(rounded(values, dtype), torch.float32)
    # Three bits of mantissa; below 2^-6 (fnuz: 2^-7) steps of 2^-9 (fnuz: 2^-10).
    assert ((found - values).abs() <= values.abs() * 2**-4 + 2**-10).all()
    largest = torch.finfo(dtype).max
    extremes = torch.tensor([1e9, -1e9, float("inf"), largest, float("nan"), 0.0])
    found = read_kv(rounded(extremes, dtype), torch.float32)
    expected = torch.tensor([largest, -largest, largest, largest, float("nan"), 0.0])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_int8_is_off_by_at_most_half_of_the_vectors_own_step() -> None:
    values = rand(40, 3, 32) * torch.logspace(-6, 6, 40)[:, None, None]
    stored = rounded(values, torch.int8)
    assert stored.shape == (40, 3, 36)
    found = read_kv(stored, torch.float32)
    step = values.abs().amax(-1, keepdim=True) / 127
    assert ((found - values).abs() <= step * 0.5001).all()
    assert torch.equal(
        read_kv(rounded(torch.zeros(2, 8), torch.int8), torch.float32).any(), torch.tensor(False)
    )
    assert (
        read_kv(rounded(torch.full((1, 8), float("nan")), torch.int8), torch.float32).isnan().any()
    )


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_all_kernels_write_the_same_bytes(name: str, dtype: torch.dtype) -> None:
    """Ties, values beyond the range, subnormal ones, vectors of zeros, NaN and infinity."""
    ops, tokens, dim = cpu_backend(dtype, name), 64, 64
    qkv = rand(tokens, 3, dim) * torch.logspace(-9, 9, tokens, base=2)[:, None, None]
    qkv[0], qkv[1], qkv[2, :, ::2] = 0, torch.arange(dim) / 32 + 1, 127
    qkv[3, :, 45], qkv[4, :, 46] = float("nan"), float("inf")  # not rotated
    qkv[5] = (torch.arange(dim) - 32) * 2.0**-10
    kv = ops.empty_cache((2, 8, 8, 1, dim))
    kv.view(torch.uint8).zero_()
    cos_sin = torch.tensor([1.0] * 16 + [0.0] * 16).expand(tokens, 32).contiguous()
    args = rope_args(kv, cos_sin, torch.arange(tokens), 1)
    args.heads.head_dim = dim
    ops.rotate_and_write(qkv.to(dtype), args)
    expected = rounded(qkv.to(dtype)[:, 1:].transpose(0, 1), kv.dtype).view(2, 8, 8, 1, -1)
    found, wanted = read_kv(kv, torch.float32), read_kv(expected, torch.float32)
    finite = torch.arange(64) != (4 if name == "int8" else -1)  # infinity has no steps
    found, wanted = found.flatten(1, 2)[:, finite], wanted.flatten(1, 2)[:, finite]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    if name == "int8":
        assert not read_kv(kv, torch.float32).flatten(1, 2)[:, 4].isfinite().all()


@pytest.mark.parametrize("name", KV_DTYPES)
@pytest.mark.parametrize("kind", [Backend, CpuBackend])
def test_what_is_written_is_what_attention_reads(
    kind: type[Backend], name: str, dtype: torch.dtype
) -> None:
    ops, kv_heads, dim = kind(CPU, dtype, name), 2, 32
    batch, group, blocks = paged([(1, 30), (1, 9), (12, 12), (5, 20)], None, 8)
    kv = ops.empty_cache((2, blocks, 8, kv_heads, dim)).zero_()
    tokens = blocks * 8
    qkv = rand(tokens, 4 + 2 * kv_heads, dim, dtype=dtype)
    angles = rand(tokens, dim // 2, seed=1)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    exact = torch.zeros(2, blocks, 8, kv_heads, dim)
    for cache, backend in ((kv, ops), (exact, reference(dtype))):
        args = rope_args(cache, cos_sin, torch.arange(tokens), 4)
        args.heads.head_dim = dim
        backend.rotate_and_write(qkv, args)
    seen = read_kv(kv, torch.float32)
    torch.testing.assert_close(
        seen, read_kv(rounded(exact, kv.dtype), torch.float32), rtol=1e-2, atol=1e-2
    )
    query, spec = (
        rand(sum(batch.host_query_lens), 4, dim, seed=2, dtype=dtype),
        AttentionSpec(dim**-0.5, None),
    )
    found = ops.attention(query, kv, batch, group, spec)
    group.plan = None
    expected = reference(dtype).attention(query, seen, batch, group, spec)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_planned_bytes_are_those_of_the_cache() -> None:
    from dataclasses import replace

    from engine.execution.model_runner import ModelRunner

    config = named_config("qwen2-0.5b")
    for name in KV_DTYPES:
        small = replace(config, kv_dtype=name, layers=config.layers[:2])
        runner = ModelRunner(small, CPU, torch.bfloat16)
        shape = (2, 3, 16, config.num_kv_heads, config.head_dim)
        assert runner.block_bytes(16) == kv_bytes_per_sequence(small, 16, "bfloat16")
        assert 2 * runner.backend.empty_cache(shape).nbytes == 3 * runner.block_bytes(16)
