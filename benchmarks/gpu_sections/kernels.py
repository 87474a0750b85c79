"""Single kernels that gpu.py times, with the shapes of real models."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_sections.inputs import (
    CUDA,
    GPT_OSS,
    experts_of,
    kernels,
    paged_batch,
    rand,
    random_mxfp4,
)
from benchmarks.gpu_sections.measure import Limits, Row, seconds_of
from model.checks import cases
from model.cost.known_models import named_config
from model.ops.backend import Backend
from model.ops.specs import AttentionSpec, Experts, RouterSpec

# The experts of gpt-oss-20b: their number, hidden and intermediate size, experts per token.
COUNT, SIZE, TOP_K = 32, 2880, 4
# (Heads, KV heads, head size) of gpt-oss, Qwen3-0.6B, Llama-3-8B and Qwen2-0.5B.
ATTENTION_SHAPES = (64, 8, 64), (16, 8, 128), (32, 8, 128), (14, 2, 64)


def time_attention(limits: Limits) -> Iterator[Row]:
    """Time attention: decode in TB/s of KV read, prefill in TFLOP/s, gpt-oss's windows in us."""
    ops = kernels()
    for heads, kv_heads, dim in ATTENTION_SHAPES:
        spec = AttentionSpec(dim**-0.5, None)
        for rows, context in ((1, 1000), (1, 32_000), (64, 2000), (256, 1000)):
            batch, group, blocks = paged_batch([(1, context)] * rows)
            kv = rand(2, blocks, 16, kv_heads, dim, dtype=torch.bfloat16)
            query = rand(rows, heads, dim, dtype=torch.bfloat16)
            spent = seconds_of(partial(ops.attention, query, kv, batch, group, spec))
            rate = rows * context * 2 * kv_heads * dim * 2 / spent
            name = f"decode attention {heads}/{kv_heads} heads of {dim}, {rows} x {context}"
            yield Row(name, rate / 1e12, "TB/s", rate / limits.copy, "copy")
        count = 8192
        batch, group, blocks = paged_batch([(count, count)])
        kv = rand(2, blocks, 16, kv_heads, dim, dtype=torch.bfloat16)
        query = rand(count, heads, dim, dtype=torch.bfloat16)
        spent = seconds_of(partial(ops.attention, query, kv, batch, group, spec))
        rate = 4 * heads * dim * count * (count + 1) / 2 / spent
        name = f"prefill attention {heads}/{kv_heads} heads of {dim}, {count} tokens"
        yield Row(name, rate / 1e12, "TFLOP/s", rate / limits.product, "product")
    fp8 = kernels().target.fp8
    if fp8 is not None:
        heads, kv_heads, dim, rows, context = 32, 8, 128, 256, 1000
        batch, group, blocks = paged_batch([(1, context)] * rows)
        kv = rand(2, blocks, 16, kv_heads, dim, dtype=torch.bfloat16).to(fp8)
        query, spec = rand(rows, heads, dim, dtype=torch.bfloat16), AttentionSpec(dim**-0.5, None)
        call = partial(kernels(kv_dtype="fp8").attention, query, kv, batch, group, spec)
        spent = seconds_of(call)
        rate = rows * context * 2 * kv_heads * dim / spent
        name = f"decode attention {heads}/{kv_heads} heads of {dim}, {rows} x {context}, KV in fp8"
        yield Row(name, rate / 1e12, "TB/s", rate / limits.copy, "copy")
    sinks, spec = rand(64, dtype=torch.bfloat16), AttentionSpec(64**-0.5, 128)
    for rows in (1, 256):
        batch, group, blocks = paged_batch([(1, 1000)] * rows)
        kv = rand(2, blocks, 16, 8, 64, dtype=torch.bfloat16)
        query = rand(rows, 64, 64, dtype=torch.bfloat16)
        spent = seconds_of(partial(ops.attention, query, kv, batch, group, spec, sinks))
        yield Row(f"decode attention in a window of 128, {rows} rows", spent * 1e6, "us")


def time_experts(limits: Limits) -> Iterator[Row]:
    """Time gpt-oss-20b's experts: bytes of the selected experts per second, and FLOP/s."""
    for name, experts, width in (
        ("MXFP4", random_experts(packed=True), 17 / 32),
        ("bf16", random_experts(packed=False), 2.0),
    ):
        for tokens in (1, 8, 64, 256, 1024, 8192):
            call, used = experts_call(kernels(), experts, tokens)
            spent = seconds_of(call)
            moved = used * 3 * SIZE**2 * width
            title = f"{name} experts, {tokens} tokens"
            yield Row(title, moved / spent / 1e12, "TB/s", moved / spent / limits.copy, "copy")
            rate = 2 * 3 * SIZE**2 * tokens * TOP_K / spent
            yield Row(title, rate / 1e12, "TFLOP/s", rate / limits.product, "product")


def random_experts(packed: bool) -> Experts:
    """Return random experts of gpt-oss-20b: MXFP4 in the kernels' form, or dense bf16."""
    gate_up, down = random_mxfp4(COUNT, 2 * SIZE, SIZE), random_mxfp4(COUNT, SIZE, SIZE)
    if packed:
        return experts_of(kernels(), (gate_up, down))
    return experts_of(kernels(), (gate_up.dense(torch.bfloat16), down.dense(torch.bfloat16)))


def experts_call(ops: Backend, experts: Experts, tokens: int) -> tuple[Callable[[], Any], int]:
    """Return a call of gpt-oss-20b's experts on random tokens, and the number of experts used."""
    x, logits = (rand(tokens, n, dtype=torch.bfloat16) for n in (SIZE, COUNT))
    chosen, weights = ops.route(logits, RouterSpec(TOP_K, True, False))
    return partial(ops.experts, x, chosen, weights, experts, GPT_OSS), len(chosen.unique())


def time_sampling(limits: Limits) -> Iterator[Row]:
    """Time sampling over gpt-oss's vocabulary, compared with a sort, which it avoids."""
    config, ops = named_config("gpt-oss-20b"), kernels()
    for case in cases(config, CUDA, ops.dtype, operations=("sample_rows", "argmax")):
        if case.is_timed or case.op == "argmax":
            spent = seconds_of(case.prepare(ops))
            share = case.bytes / spent / limits.copy
            yield Row(str(case), spent * 1e6, "us", share, "copy")
    logits = rand(64, config.vocab_size, dtype=torch.float32)
    spent = seconds_of(partial(torch.sort, logits, descending=True, stable=True))
    yield Row("torch.sort, 64 rows", spent * 1e6, "us", logits.nbytes / spent / limits.copy, "copy")
