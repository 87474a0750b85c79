"""What gpu.py times: kernels alone and loads on dummy weights at true shapes."""

import json
import math
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_checks import (
    CUDA,
    draw_arguments,
    fused_limits,
    paged_batch,
    rand,
    random_mxfp4,
)
from engine import Engine, EngineStats, Request, SamplingParams
from engine.probe import Probe
from getp.explain import run_cost
from model.layers import Mlp
from model.ops import reference
from model.shapes import SHAPES, named_config
from model.transformer import Layer


@dataclass(frozen=True)
class Limits:
    """What this GPU was measured to do: bytes a second copied, bf16 FLOPs a second multiplied."""

    copy: float
    product: float


@dataclass(frozen=True)
class Row:
    """A line of the table; share is of the limit named by `of`."""

    name: str
    value: float
    unit: str
    share: float | None = None
    of: str = ""


def seconds_of(function: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of a call on the GPU, replayed from a graph so that launching costs nothing."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    flush = torch.empty(128 << 20, dtype=torch.uint8, device=CUDA)
    times = []
    for _ in range(repeats):
        flush.zero_()  # what the last call left in the L2 cache
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure_limits() -> Limits:
    """Copy bandwidth (bytes read and written) and the rate of a large bf16 product."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=CUDA).random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds_of(lambda: target.copy_(source))
    a, b = (rand(8192, 8192, dtype=torch.bfloat16) for _ in range(2))
    return Limits(copy, 2 * 8192**3 / seconds_of(lambda: a @ b))


def time_attention(limits: Limits) -> Iterator[Row]:
    """Decode in TB/s of KV read, prefill in TFLOP/s."""
    from model.ops import triton

    for heads, kv_heads, dim in ((64, 8, 64), (16, 8, 128), (32, 8, 128), (14, 2, 64)):
        for rows, context in ((1, 1000), (1, 32_000), (64, 2000), (256, 1000)):
            batch, group, blocks = paged_batch([(1, context)] * rows, None)
            kv = rand(2, blocks, 16, kv_heads, dim, dtype=torch.bfloat16)
            query = rand(rows, heads, dim, dtype=torch.bfloat16)
            spent = seconds_of(partial(triton.attention, query, kv, batch, group, None))
            rate = rows * context * 2 * kv_heads * dim * 2 / spent
            name = f"decode attention {heads}/{kv_heads} heads of {dim}, {rows} x {context}"
            yield Row(name, rate / 1e12, "TB/s", rate / limits.copy, "copy")
        count = 8192
        batch, group, blocks = paged_batch([(count, count)], None)
        kv = rand(2, blocks, 16, kv_heads, dim, dtype=torch.bfloat16)
        query = rand(count, heads, dim, dtype=torch.bfloat16)
        spent = seconds_of(partial(triton.attention, query, kv, batch, group, None))
        rate = 4 * heads * dim * count * (count + 1) / 2 / spent
        name = f"prefill attention {heads}/{kv_heads} heads of {dim}, {count} tokens"
        yield Row(name, rate / 1e12, "TFLOP/s", rate / limits.product, "product")


def time_experts(limits: Limits) -> Iterator[Row]:
    """gpt-oss-20b's experts: bytes of the experts used a second, and FLOPs."""
    from model.ops import triton

    count, size, top_k = 32, 2880, 4
    packed = random_mxfp4(count, 2 * size, size), random_mxfp4(count, size, size)
    dense = tuple(weight.dense(torch.bfloat16) for weight in packed)
    for name, (up, down), width in (("MXFP4", packed, 17 / 32), ("bf16", dense, 2.0)):
        for tokens in (1, 8, 64, 256, 1024, 8192):
            x = rand(tokens, size, dtype=torch.bfloat16)
            logits = rand(tokens, count, dtype=torch.bfloat16)
            chosen, shares = reference.route(logits, top_k, True, False)
            call = partial(triton.experts, x, chosen, shares, up, None, down, None, 7.0, 1.702)
            spent = seconds_of(call)
            moved = len(chosen.unique()) * 3 * size * size * width
            title = f"{name} experts, {tokens} tokens"
            yield Row(title, moved / spent / 1e12, "TB/s", moved / spent / limits.copy, "copy")
            rate = 2 * 3 * size * size * tokens * top_k / spent
            yield Row(title, rate / 1e12, "TFLOP/s", rate / limits.product, "product")


def time_fusions(limits: Limits) -> Iterator[Row]:
    """A layer's norms with what follows, in steps and fused, by rows; weights read a second.

    Then up to how many rows each fusion is faster: of all models the least belongs in `Tiles`.
    """
    for name in ("qwen2-0.5b", "llama-3-8b"):
        layer = _random_layer(name)
        assert isinstance(layer.mlp, Mlp)
        mlp = (layer.mlp.gate_up, layer.mlp.down)
        parts = (
            ("QKV", layer.project, (layer.attention.qkv,), ("fused_qkv",)),
            ("MLP", layer.feed_forward, mlp, ("fused_gate_up", "fused_mlp")),
        )
        for title, call, linears, fields_of in parts:
            read = sum(2 * math.prod(linear.weight.shape) for linear in linears)
            wins = dict.fromkeys(fields_of, 0)
            losing = set[str]()
            for rows in (1, 2, 4, 8, 16, 32, 64):
                x = rand(rows, layer.mlp_norm.weight.numel(), dtype=torch.bfloat16)
                steps = math.inf
                for kind in ("in steps", *fields_of):
                    with fused_limits(**({kind: 64} if kind in wins else {})):
                        spent = seconds_of(partial(call, x, x))
                    full = f"{name} norm + {title}, {rows} rows, {kind}"
                    share = read / spent / limits.copy
                    yield Row(full, read / spent / 1e12, "TB/s", share, "copy")
                    if kind not in wins:
                        steps = spent
                    elif spent >= steps:
                        losing.add(kind)
                    elif kind not in losing:
                        wins[kind] = rows
            for kind, most in wins.items():
                yield Row(f"{name}: {kind} is faster up to", most, "rows")


def _random_layer(name: str) -> Layer:
    """The first layer of a well-known dense model on the GPU, in bf16."""
    config = named_config(name)
    layer = Layer(config, config.layers[0])
    assert isinstance(layer.mlp, Mlp)
    for norm in (layer.attention_norm, layer.mlp_norm):
        norm.weight = rand(*norm.weight.shape, dtype=torch.bfloat16)
    for linear in (layer.attention.qkv, layer.mlp.gate_up, layer.mlp.down):
        linear.weight = rand(*linear.weight.shape, dtype=torch.bfloat16, scale=0.02)
        if linear.bias is not None:
            linear.bias = rand(*linear.bias.shape, dtype=torch.bfloat16)
    return layer


def time_draws(limits: Limits) -> Iterator[Row]:
    """Top-k and top-p over gpt-oss's vocabulary, beside the sort that they do without."""
    from model.ops import triton

    for rows in (1, 32, 256):
        logits, heat, top_k, top_p, uniform = draw_arguments(rows, 201_088, torch.bfloat16)
        calls: dict[str, Callable[[], Any]] = {
            "top-p": partial(triton.draw, logits, heat, None, top_p, uniform),
            "top-k and top-p": partial(triton.draw, logits, heat, top_k, top_p, uniform),
            "torch.sort alone": partial(torch.sort, logits, descending=True, stable=True),
        }
        for title, call in calls.items():
            spent = seconds_of(call)
            once = logits.nbytes / spent / limits.copy  # as if the logits were read once
            yield Row(f"draw of {rows} rows: {title}", spent * 1e6, "us", once, "copy")


def nano_load() -> tuple[list[list[int]], list[int]]:
    """nano-vllm's bench.py: 256 requests, inputs and outputs of 100 to 1024 tokens, seed 0."""
    draw, count = random.Random(0), 256
    prompts = [
        [draw.randint(0, 10_000) for _ in range(draw.randint(100, 1024))] for _ in range(count)
    ]
    return prompts, [draw.randint(100, 1024) for _ in range(count)]


def short_load(count: int, positions: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of 8 to 32 tokens, each continued to `positions`."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, 10_000) for _ in range(draw.randint(8, 32))] for _ in range(count)]
    return prompts, [positions - len(prompt) for prompt in prompts]


def context_load(count: int, context: int, outputs: int) -> tuple[list[list[int]], list[int]]:
    """Prompts that have `context` tokens when half of the outputs are made."""
    draw, size = random.Random(0), context - outputs // 2
    return [[draw.randint(0, 10_000) for _ in range(size)] for _ in range(count)], [outputs] * count


@contextmanager
def dummy_checkpoint(name: str) -> Iterator[Path]:
    """A directory with the config.json of a well-known model and no weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[name]))
        yield Path(folder)


def time_load(
    name: str,
    load: tuple[list[list[int]], list[int]],
    limits: Limits,
    most_s: float,
    batch_size: int = 256,
) -> Iterator[Row]:
    """Output tokens a second of a load on dummy weights; stopped after most_s seconds.

    The share is what the step's FLOPs and bytes take at the measured limits, whichever is longer,
    over the time taken.
    """
    prompts, outputs = load
    with (
        dummy_checkpoint(name) as folder,
        Engine(
            folder,
            device="cuda",
            dummy_weights=True,
            prefix_cache=False,
            max_batch_size=min(batch_size, len(prompts)),
        ) as engine,
    ):
        warm = SamplingParams(max_new_tokens=4, ignore_eos=True)
        list(engine.generate([Request(prompts[0], warm)] * min(4, len(prompts))))
        before = asdict(engine.stats)
        requests = [
            Request(prompt, SamplingParams(max_new_tokens=count, ignore_eos=True), i)
            for i, (prompt, count) in enumerate(zip(prompts, outputs, strict=True))
        ]
        start, done = time.perf_counter(), 0
        for _ in engine.generate(requests):
            done += 1
            if time.perf_counter() - start > most_s:
                break
        torch.cuda.synchronize()
        spent = time.perf_counter() - start
        grown = {
            f.name: getattr(engine.stats, f.name) - before[f.name] for f in fields(EngineStats)
        }
        stats = EngineStats(**grown)
        cost, moved = run_cost(engine.config, "bfloat16", stats)
        # Each request's first token comes from its last chunk, the others from decodes.
        tokens = stats.decode_tokens + stats.prefill_chunks
        all_of = "" if done == len(prompts) else f" ({done} done)"
        title = f"{name}, {len(prompts)} requests{all_of}"
        least, of = max(
            (moved.total / limits.copy, "copy"), (cost.matrix / limits.product, "product")
        )
        yield Row(title, tokens / spent, "tok/s", least / spent, of)
        yield Row(f"{title}: time outside the model", 1 - stats.model_s / spent, "of it")
        yield Row(f"{title}: compiling", engine.stats.compile_s, "s")
        yield Row(f"{title}: capturing", engine.stats.capture_s, "s")
        middle = sorted(len(p) + n // 2 for p, n in zip(prompts, outputs, strict=True))
        yield from profile_step(engine, middle[len(middle) // 2])


def profile_step(engine: Engine, context: int) -> Iterator[Row]:
    """The kernels that take most of a decode step of the largest batch, not replayed."""
    from torch.profiler import ProfilerActivity, profile

    probe = Probe(engine, engine.max_batch_size, 1, context)
    probe.step()
    count, spent = 4, Counter[str]()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(count):
            probe.step()
        torch.cuda.synchronize()
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] += event.time_range.elapsed_us()
    for name, us in spent.most_common(8):
        yield Row(f"a step's {name[:60]}", us / count, "us", us / spent.total(), "its kernels")


def count_launches(name: str) -> Iterator[Row]:
    """Kernels a layer and launches a token of decoding at batch 1, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with (
        dummy_checkpoint(name) as folder,
        Engine(folder, device="cuda", dummy_weights=True, max_batch_size=1) as engine,
    ):
        for tokens in (4, 4 + 16):  # the same prefill twice; the difference is 16 decodes
            params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
            list(engine.generate([Request([1] * 100, params)]))
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
                list(engine.generate([Request([2] * 100, params)]))
            kernels = launches = 0
            for event in found.events():
                on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
                kernels += on_gpu and not event.name.startswith(("Mem", "mem"))
                launches += "Launch" in event.name and not on_gpu
            if tokens == 4:
                first = kernels, launches
        layers = len(engine.config.layers)
    a_token = (kernels - first[0]) / 16
    yield Row(f"{name}: kernels a token", a_token, "kernels")
    yield Row(f"{name}: kernels a layer", a_token / layers, "kernels")
    yield Row(f"{name}: launches a token", (launches - first[1]) / 16, "launches")


def time_transformers(requests: int, outputs: int) -> Iterator[Row]:
    """Continuous batching of transformers, on the first prompts of the nano-vllm load."""
    import transformers

    config = transformers.AutoConfig.for_model(**SHAPES["qwen3-0.6b"])
    with torch.device(CUDA):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    prompts = nano_load()[0][:requests]
    settings = transformers.GenerationConfig(
        max_new_tokens=outputs, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    model.generate_batch(inputs=prompts[:4], generation_config=settings)
    start = time.perf_counter()
    done = model.generate_batch(inputs=prompts, generation_config=settings)
    spent = time.perf_counter() - start
    rate = sum(len(output.generated_tokens) for output in done.values()) / spent
    title = f"transformers {transformers.__version__}, {requests} requests, {outputs} out each"
    yield Row(title, rate, "tok/s")


def time_vllm() -> Iterator[Row]:
    """vLLM on the nano-vllm load, where it is installed."""
    if find_spec("vllm") is None:
        yield Row("vLLM: not installed", float("nan"), "")
        return
    import vllm

    prompts, outputs = nano_load()
    with dummy_checkpoint("qwen3-0.6b") as folder:
        model = vllm.LLM(str(folder), load_format="dummy", skip_tokenizer_init=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [
            vllm.SamplingParams(temperature=0, ignore_eos=True, max_tokens=count, detokenize=False)
            for count in outputs
        ]
        model.generate(inputs[:4], params[:4])
        start = time.perf_counter()
        model.generate(inputs, params)
        yield Row(f"vLLM {vllm.__version__}", sum(outputs) / (time.perf_counter() - start), "tok/s")
