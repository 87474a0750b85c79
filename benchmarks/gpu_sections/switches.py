"""Pairs of timings with a feature on and off: fused norms, programmatic launch, graphs."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_sections.inputs import (
    CUDA,
    fused,
    kernels,
    linear_of,
    one_row,
    paged_batch,
    rand,
    random_layer,
)
from benchmarks.gpu_sections.loads import dummy_engine, equal_load, run_load
from benchmarks.gpu_sections.measure import Limits, Row, seconds_of
from model.attention import Attention
from model.cost.known_models import named_config
from model.mlp import Mlp
from model.ops.backend import Backend
from model.ops.specs import RopeArgs
from model.transformer import Layer


def time_fusions(limits: Limits) -> Iterator[Row]:
    """Time a layer's norms with the following operations, separate and fused, for several rows.

    The rate is that of weights read. Then reports up to how many rows each fusion is faster; copy
    the smallest number over all models to `Tiles`. Also times the layer's other products of
    one row, with torch's kernel and with getp's.
    """
    for name in ("qwen2-0.5b", "llama-3-8b"):
        layer = random_layer(name)
        assert isinstance(layer.mlp, Mlp)
        assert isinstance(layer.attention, Attention)
        mlp = (layer.mlp.gate_up, layer.mlp.down)
        parts = (
            ("QKV", partial(project_of, layer=layer), (layer.attention.qkv,), ("fused_qkv",)),
            ("MLP", partial(partial, layer.mlp), mlp, ("fused_gate_up", "fused_mlp")),
        )
        for title, call_of, linears, fields_of in parts:
            read = sum(2 * math.prod(linear.weight.shape) for linear in linears)
            wins = dict.fromkeys(fields_of, 0)
            losing = set[str]()
            for rows in (1, 2, 4, 8, 16, 32, 64):
                x = rand(rows, layer.mlp.norm.size, dtype=torch.float32)
                delta, steps = x.bfloat16(), math.inf
                for kind in ("in steps", *fields_of):
                    limits_of = {kind: 64, "one_row": one_row()} if kind in wins else {}
                    spent = seconds_of(partial(call_of(fused(**limits_of)), x, delta))
                    full = f"{name} norm + {title}, {rows} rows, {kind}"
                    share = read / spent / limits.copy
                    yield Row(full, read / spent / 1e12, "TB/s", share, "copy")
                    if kind not in wins:
                        steps = spent
                    elif spent > 1.02 * steps:  # a smaller difference may be noise
                        losing.add(kind)
                    elif spent < steps and kind not in losing:
                        wins[kind] = rows
            for kind, max_rows in wins.items():
                yield Row(f"{name}: {kind} is faster up to", max_rows, "rows")
        vocab, hidden = named_config(name).vocab_size, layer.mlp.norm.size
        head = linear_of(rand(vocab, hidden, dtype=torch.bfloat16, scale=0.02))
        products = {"out": layer.attention.out, "down": layer.mlp.down, "head": head}
        for title, linear in products.items():
            x = rand(1, linear.weight.shape[1], dtype=torch.bfloat16)
            for kind, own in (("torch", None), ("getp", one_row())):
                call = partial(fused(one_row=own).linear, x, linear)
                rate = 2 * math.prod(linear.weight.shape) / seconds_of(call)
                full = f"{name} {title}, 1 row, {kind}"
                yield Row(full, rate / 1e12, "TB/s", rate / limits.copy, "copy")


def project_of(ops: Backend, layer: Layer) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    """Return the operations of a layer before attention, starting with the norm; up to 64 rows."""
    attention, heads = layer.attention, layer.attention.heads
    assert isinstance(attention, Attention)
    kv = rand(2, 4, 16, heads.kv_heads, heads.head_dim, dtype=torch.bfloat16)
    cos_sin = rand(64, heads.head_dim, dtype=torch.float32)
    slots = torch.arange(64, device=CUDA)

    def project(x: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rope = RopeArgs(heads, cos_sin[: len(x)], kv, slots[: len(x)])
        return ops.norm_qkv(x, delta, attention.norm, attention.qkv, rope)

    return project


def layer_products(ops: Backend, layer: Layer, x: torch.Tensor) -> Callable[[], Any]:
    """Return a call of the layer's norms with the linear layers that follow them."""
    project, stream = project_of(ops, layer), x.float()
    return lambda: (project(stream, x), layer.mlp(ops, stream, x))


def time_overlap(limits: Limits) -> Iterator[Row]:
    """Time dense layers at decode, with and without programmatic launch of the next kernel."""
    for name in ("qwen2-0.5b", "llama-3-8b"):
        layers = [random_layer(name) for _ in range(4)]
        for rows in (1, 8, 64):
            for is_early in (False, True):
                ops = kernels(programmatic_launch=is_early)
                step = _decode_step(ops, layers, rows, context=1000)
                spent = seconds_of(step) / len(layers)
                kind = "programmatic launch" if is_early else "sequential launch"
                yield Row(f"{name}, one layer, {rows} rows, {kind}", spent * 1e6, "us")


def _decode_step(
    ops: Backend, layers: list[Layer], rows: int, context: int
) -> Callable[[], torch.Tensor]:
    """Return a decode step: one token per row through all layers, each with its own KV cache."""
    heads = layers[0].attention.heads
    batch, group, blocks = paged_batch([(1, context)] * rows)
    shape = 2, blocks, 16, heads.kv_heads, heads.head_dim
    kvs = [rand(*shape, dtype=torch.bfloat16) for _ in layers]
    cos_sin = rand(rows, heads.head_dim, dtype=torch.float32)
    slots = torch.arange(rows, device=CUDA)
    stream = rand(rows, layers[0].mlp.norm.size, dtype=torch.float32)
    output = stream.bfloat16()

    def step() -> torch.Tensor:
        x, delta = stream, output
        for layer, kv in zip(layers, kvs, strict=True):
            rope = RopeArgs(layer.attention.heads, cos_sin, kv, slots)
            x, delta = layer.attention(ops, x, delta, rope, batch, group)
            x, delta = layer.mlp(ops, x, delta)
        return delta

    return step


def time_graphs(limits: Limits) -> Iterator[Row]:
    """Time decoding with steps replayed as graphs and launched kernel by kernel."""
    for name, rows in (("qwen2-0.5b", 1), ("gpt-oss-20b", 1), ("qwen3-0.6b", 256)):
        with dummy_engine(name, rows) as engine:
            load = equal_load(rows, 300, 64)
            for kind in ("replayed as graphs", "launched one by one"):
                run_load(engine, load)
                start, before = time.perf_counter(), engine.stats.steps
                run_load(engine, load)
                spent = (time.perf_counter() - start) / (engine.stats.steps - before)
                yield Row(f"{name}, a step of {rows} rows, {kind}", spent * 1e6, "us")
                engine.runner.uncapture()
