"""Single kernels that gpu.py times, with the shapes of real models."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu_checks import (
    CUDA,
    GPT_OSS,
    experts_of,
    fused,
    kernels,
    linear_of,
    one_row,
    paged_batch,
    rand,
    random_mxfp4,
    sampling_arguments,
)
from model.cost.known_models import named_config
from model.mlp import Mlp
from model.ops.backend import Backend
from model.ops.specs import AttentionSpec, Experts, RopeArgs, RouterSpec
from model.transformer import Layer

if TYPE_CHECKING:
    from model.ops.triton.tiles import Tile

_WARM_UP_S = 0.03  # the GPU was idle during compilation; its clocks rise in this time
_FLUSHES = 5  # about 0.2 ms, in which the host queues the timed operations
# The experts of gpt-oss-20b: their number, hidden and intermediate size, experts per token.
_COUNT, _SIZE, _TOP_K = 32, 2880, 4


@dataclass(frozen=True)
class Limits:
    """This GPU's measured limits: `copy` in bytes/s, `product` (bf16 matrix product) in FLOP/s."""

    copy: float
    product: float


@dataclass(frozen=True)
class Row:
    """A row of a result table. `share` is the share of the limit named by `of`."""

    name: str
    value: float
    unit: str
    share: float | None = None
    of: str = ""


def seconds_of(function: Callable[[], Any], repeats: int = 20) -> float:
    """Return the median time of a call on the GPU in seconds, replayed from a graph.

    It includes the launch of the graph, a few microseconds, but not the launches of its kernels.
    """
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    warm_up_end = time.perf_counter() + _WARM_UP_S
    while time.perf_counter() < warm_up_end:
        graph.replay()
        torch.cuda.synchronize()
    flush = torch.zeros(32 << 20, dtype=torch.int32, device=CUDA)
    times = []
    for _ in range(repeats):
        # Evict the last call's data from the L2 cache. Reading does that; written data would have
        # to be written back during the timed call.
        for _ in range(_FLUSHES):
            flush.sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure_limits() -> Limits:
    """Measure copy bandwidth (bytes read plus written) and the rate of a large bf16 product."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=CUDA).random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds_of(lambda: target.copy_(source))
    a, b = (rand(8192, 8192, dtype=torch.bfloat16) for _ in range(2))
    return Limits(copy, 2 * 8192**3 / seconds_of(lambda: a @ b))


def time_attention(limits: Limits) -> Iterator[Row]:
    """Time attention: decode in TB/s of KV read, prefill in TFLOP/s, gpt-oss's windows in us."""
    ops = kernels()
    for heads, kv_heads, dim in ((64, 8, 64), (16, 8, 128), (32, 8, 128), (14, 2, 64)):
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
        ("MXFP4", _experts(packed=True), 17 / 32),
        ("bf16", _experts(packed=False), 2.0),
    ):
        for tokens in (1, 8, 64, 256, 1024, 8192):
            call, used = _experts_call(kernels(), experts, tokens)
            spent = seconds_of(call)
            moved = used * 3 * _SIZE**2 * width
            title = f"{name} experts, {tokens} tokens"
            yield Row(title, moved / spent / 1e12, "TB/s", moved / spent / limits.copy, "copy")
            rate = 2 * 3 * _SIZE**2 * tokens * _TOP_K / spent
            yield Row(title, rate / 1e12, "TFLOP/s", rate / limits.product, "product")


def time_tiles(limits: Limits) -> Iterator[Row]:
    """Time MXFP4 experts and products of one row with the tiles in use (first) and with others.

    The fastest ones belong in TILES of model/ops/triton/tiles.py. A tile that is too large for this
    GPU has no row.
    """
    from model.ops.triton.tiles import Tile

    experts, own = _experts(packed=True), kernels().target.tiles
    few = [
        Tile(16, 32, 128, 2, 6),
        Tile(16, 32, 128, 4, 4),
        Tile(16, 64, 128, 4, 3),
        Tile(16, 64, 64, 4, 5),
        Tile(16, 128, 128, 8, 3),
        Tile(16, 64, 128, 8, 4),
    ]
    many = [
        Tile(64, 128, 64, 8, 3),
        Tile(128, 64, 64, 4, 3),
        Tile(128, 128, 128, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(256, 64, 64, 8, 3),
    ]
    for kernel in ("mxfp4_gate_up", "mxfp4_down"):
        for tokens, at, others in ((1, 0, few), (1024, -1, many)):
            table = getattr(own, kernel)[at]
            for tile in (table, *others):
                changed: dict[str, Any] = {kernel: (tile,)}
                call, _ = _experts_call(kernels(**changed), experts, tokens)
                with _allow_failure(table, tile):
                    spent = seconds_of(call)
                    yield Row(f"{kernel}, {tokens} tokens, {tile}", spent * 1e6, "us")
    if own.one_row is None:
        return
    single = [
        Tile(1, 8, 256, 4, 4),
        Tile(1, 32, 256, 4, 4),
        Tile(1, 16, 512, 8, 4),
    ]
    for name in ("qwen2-0.5b", "llama-3-8b"):
        layer = _random_layer(name)
        x = rand(1, layer.mlp.norm.size, dtype=torch.bfloat16)
        for tile in (own.one_row, *single):
            ops = fused(fused_qkv=1, fused_gate_up=1, one_row=tile)
            with _allow_failure(own.one_row, tile):
                spent = seconds_of(_linears(ops, layer, x))
                yield Row(f"{name}, one row, {tile}", spent * 1e6, "us")


def _linears(ops: Backend, layer: Layer, x: torch.Tensor) -> Callable[[], Any]:
    """Return a call of the layer's norms with the linear layers that follow them."""
    project, stream = _project(ops, layer), x.float()
    return lambda: (project(stream, x), layer.mlp(ops, stream, x))


def _allow_failure(shipped: "Tile", tile: "Tile") -> AbstractContextManager[None]:
    """Suppress errors of tiles that jobs do not use; they may be too large for GPU or compiler."""
    return nullcontext() if tile == shipped else suppress(Exception)


def _experts(packed: bool) -> Experts:
    """Return random experts of gpt-oss-20b: MXFP4 in the kernels' form, or dense bf16."""
    gate_up, down = random_mxfp4(_COUNT, 2 * _SIZE, _SIZE), random_mxfp4(_COUNT, _SIZE, _SIZE)
    if packed:
        return experts_of(kernels(), (gate_up, down))
    return experts_of(kernels(), (gate_up.dense(torch.bfloat16), down.dense(torch.bfloat16)))


def _experts_call(ops: Backend, experts: Experts, tokens: int) -> tuple[Callable[[], Any], int]:
    """Return a call of gpt-oss-20b's experts on random tokens, and the number of experts used."""
    x, logits = (rand(tokens, n, dtype=torch.bfloat16) for n in (_SIZE, _COUNT))
    chosen, weights = ops.route(logits, RouterSpec(_TOP_K, True, False))
    return partial(ops.experts, x, chosen, weights, experts, GPT_OSS), len(chosen.unique())


def time_fusions(limits: Limits) -> Iterator[Row]:
    """Time a layer's norms with the following operations, separate and fused, for several rows.

    The rate is that of weights read. Then reports up to how many rows each fusion is faster; copy
    the smallest number over all models to `Tiles`. Also times the layer's other products of
    one row, with torch's kernel and with getp's.
    """
    for name in ("qwen2-0.5b", "llama-3-8b"):
        layer = _random_layer(name)
        assert isinstance(layer.mlp, Mlp)
        mlp = (layer.mlp.gate_up, layer.mlp.down)
        parts = (
            ("QKV", partial(_project, layer=layer), (layer.attention.qkv,), ("fused_qkv",)),
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


def _project(ops: Backend, layer: Layer) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    """Return the operations of a layer before attention, starting with the norm; up to 64 rows."""
    attention, heads = layer.attention, layer.attention.heads
    kv = rand(2, 4, 16, heads.kv_heads, heads.head_dim, dtype=torch.bfloat16)
    cos_sin = rand(64, heads.head_dim, dtype=torch.float32)
    slots = torch.arange(64, device=CUDA)

    def project(x: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rope = RopeArgs(heads, cos_sin[: len(x)], kv, slots[: len(x)])
        return ops.norm_qkv(x, delta, attention.norm, attention.qkv, rope)

    return project


def time_overlap(limits: Limits) -> Iterator[Row]:
    """Time dense layers at decode, with and without programmatic launch of the next kernel."""
    for name in ("qwen2-0.5b", "llama-3-8b"):
        layers = [_random_layer(name) for _ in range(4)]
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


def _random_layer(name: str) -> Layer:
    """Return the first layer of a well-known dense model with random bf16 weights on the GPU."""
    config = named_config(name)
    layer = Layer(config, config.layers[0])
    assert isinstance(layer.mlp, Mlp)
    for parameter in layer.parameters():
        scale = 0.02 if parameter.attribute == "weight" and parameter.format else 1.0
        dtype = torch.float32 if parameter.is_float32 else torch.bfloat16
        values = rand(*parameter.shape, dtype=dtype, scale=scale)
        setattr(parameter.holder, parameter.attribute, values)
    return layer


def time_sampling(limits: Limits) -> Iterator[Row]:
    """Time sampling over gpt-oss's vocabulary, compared with a sort, which it avoids."""
    ops = kernels()
    for rows in (1, 32, 256):
        arguments = sampling_arguments(rows, 201_088)
        logits = arguments[0]
        calls: dict[str, Callable[[], Any]] = {
            "greedy": partial(ops.sample_rows, *arguments[:3]),
            "of all kinds": partial(ops.sample_rows, *arguments),
            "torch.sort alone": partial(torch.sort, logits, descending=True, stable=True),
        }
        for title, call in calls.items():
            spent = seconds_of(call)
            share = logits.nbytes / spent / limits.copy  # of the time to read the logits once
            yield Row(f"sampling {rows} rows: {title}", spent * 1e6, "us", share, "copy")
