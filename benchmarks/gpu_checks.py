"""Correctness checks on a GPU; gpu.py runs them before it times anything."""

import gc
import itertools
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine import Engine, EngineConfig, Request, SamplingParams
from model.formats import DENSE, MXFP4
from model.ops.backend import Backend
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.mxfp4 import Mxfp4
from model.ops.specs import (
    Activation,
    AttentionSpec,
    Experts,
    Heads,
    Linear,
    Norm,
    NormSpec,
    RopeArgs,
    RouterSpec,
    SamplingTables,
)

if TYPE_CHECKING:
    from model.ops.triton.backend import TritonBackend

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
GPT_OSS = Activation(7.0, 1.702)
_REFERENCE = Backend(CUDA, torch.float32)
# Largest error relative to the largest expected value; bfloat16 products round inputs to 8 bits.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class CheckError(Exception):
    """A result is wrong. The message says which one and how large the error is."""


def rand(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Return normally distributed values on the GPU, from the default generator."""
    return (torch.randn(shape, device=CUDA) * scale).to(dtype)


def paged_batch(
    lengths: list[tuple[int, int]], block_size: int = 16
) -> tuple[ForwardBatch, GroupTables, int]:
    """Return a batch of sequences of (new tokens, context) in scattered blocks; its block count."""
    counts = [-(-context // block_size) for _, context in lengths]
    blocks = torch.randperm(sum(counts)) + 1
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, ids in enumerate(blocks.split(counts)):
        table[row, : len(ids)] = ids
    queries = [query for query, _ in lengths]
    contexts = [context for _, context in lengths]
    cu_seqlens_q = torch.tensor([0, *queries]).cumsum(0).int().to(CUDA)
    none = torch.zeros(0, dtype=torch.int64, device=CUDA)
    context_lens = torch.tensor(contexts, dtype=torch.int32, device=CUDA)
    singles = sum(query == 1 for query in queries)
    batch = ForwardBatch(
        none, none, queries, contexts, singles, (), none, cu_seqlens_q, context_lens
    )
    return batch, GroupTables(table.to(CUDA), none), sum(counts) + 1


def random_mxfp4(experts: int, outputs: int, inputs: int) -> Mxfp4:
    """Return random codes with scales that keep products close to one."""
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), device=CUDA)
    scales = torch.randint(119, 123, (experts, outputs, inputs // 32), device=CUDA)
    return Mxfp4(blocks.to(torch.uint8), scales.to(torch.uint8))


Comparison = tuple[str, torch.Tensor, torch.Tensor]
"""A name, the kernel's result, and the reference's result."""


def compare(comparisons: Callable[[torch.dtype], Iterator[Comparison]]) -> Iterator[str | None]:
    """Yield the problem of each comparison, or None; an exception ends only its own run."""
    # Once with uninitialized memory, as in jobs, and once with new memory filled with NaN.
    runs = iter, _with_nan_in_new_memory
    for dtype, run in itertools.product((torch.bfloat16, torch.float32), runs):
        torch.manual_seed(0)
        name = "none"
        try:
            for name, found, expected in run(comparisons(dtype)):
                print(f"{name}, {dtype}", file=sys.stderr, flush=True)  # shows where a check hangs
                largest = float(expected.float().abs().max())
                if not largest:
                    yield f"{name}, {dtype}: all expected values are zero"
                    continue
                error = float((found.float() - expected.float()).abs().max()) / largest
                correct = error <= _TOLERANCE[dtype]  # False for NaN
                yield (
                    None if correct else f"{name}, {dtype}: error {error:.1e} of the largest value"
                )
        except Exception as error:
            yield f"{dtype}, after {name}: {type(error).__name__}: {str(error)[:300]}"


def _with_nan_in_new_memory(comparisons: Iterator[Comparison]) -> Iterator[Comparison]:
    """Fill new memory with NaN; otherwise it could hold the correct result of an earlier call."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield from comparisons
    finally:
        torch.use_deterministic_algorithms(False)


def check_norms() -> Iterator[str | None]:
    """Check sums, norms and SwiGLU."""
    return compare(_norms)


def check_fusions() -> Iterator[str | None]:
    """Check kernels that fuse a norm with the following operations."""
    return compare(_fusions)


def check_attention() -> Iterator[str | None]:
    """Check rotary embedding, the KV cache write and attention."""
    return compare(_attention)


def check_experts() -> Iterator[str | None]:
    """Check router and experts, dense and MXFP4, and that repeated calls give the same bits."""
    yield from compare(_experts)
    yield from _repeated_experts()


def check_sampling() -> Iterator[str | None]:
    """Check sampling with top-k and top-p."""
    return compare(_sampling)


def kernels(dtype: torch.dtype = torch.bfloat16, **tiles: Any) -> "TritonBackend":
    """Return the backend of this GPU, with some fields of its `Tiles` changed."""
    from model.ops.triton.backend import TritonBackend
    from model.ops.triton.tiles import target_of

    target = target_of(CUDA)
    return TritonBackend(CUDA, dtype, replace(target, tiles=replace(target.tiles, **tiles)))


def fused(dtype: torch.dtype = torch.bfloat16, **limits: Any) -> "TritonBackend":
    """Return the backend that fuses each norm only up to the number of rows given here.

    Without `one_row`, torch multiplies a single row.
    """
    none: dict[str, Any] = {"fused_qkv": 0, "fused_gate_up": 0, "fused_mlp": 0, "one_row": None}
    return kernels(dtype, **(none | limits))


def one_row() -> Any:
    """Return the tile that this GPU uses to multiply a single row."""
    return kernels().target.tiles.one_row


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """Return a linear layer with this weight [out, in]."""
    outputs, inputs = weight.shape
    return Linear(inputs, outputs, bias is not None, DENSE, weight=weight, bias=bias)


def _float32(linear: Linear) -> Linear:
    bias = None if linear.bias is None else linear.bias.float()
    return linear_of(linear.weight.float(), bias)


def experts_of(
    ops: Backend,
    weights: tuple[Any, Any],
    biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> Experts:
    """Return experts in a backend's form: gate_up and down (dense or Mxfp4) and their biases."""
    gate_up, down = weights
    count, hidden, size = down.shape
    is_mxfp4 = isinstance(down, Mxfp4)
    pack = ops.pack_mxfp4 if is_mxfp4 else ops.pack_experts
    return Experts(
        count,
        hidden,
        size,
        biases[0] is not None,
        MXFP4 if is_mxfp4 else DENSE,
        pack(gate_up),
        biases[0],
        pack(down),
        biases[1],
    )


def norm_of(weight: torch.Tensor) -> Norm:
    """A norm with this weight [size]."""
    return Norm(len(weight), NormSpec(1e-5), weight.float())


def _norms(dtype: torch.dtype) -> Iterator[Comparison]:
    ops = kernels(dtype)
    for tokens, size in ((1, 896), (7, 2880), (300, 4096)):
        x, weight = (rand(n, size, dtype=torch.float32) for n in (tokens, 1))
        delta = rand(tokens, size, dtype=dtype)
        norm = norm_of(weight[0])
        found = ops.add_rms_norm(x, delta, norm)
        expected = _REFERENCE.add_rms_norm(x, delta, norm)
        yield f"sum {size}", found[0], expected[0]
        yield f"norm {size}", found[1], expected[1]
        table, ids = rand(1000, size, dtype=dtype), torch.randint(1000, (tokens,), device=CUDA)
        part = (table[100:], ids, 12.0, 100)  # as a rank holds it that has not the first tokens
        yield f"embedding {size}", ops.embed(*part), _REFERENCE.embed(*part)
        head, rows = linear_of(table), rand(tokens, size, dtype=dtype)
        for own in (None, one_row()):
            logits = fused(dtype, one_row=own).logits(rows, head, 0.5)
            yield f"logits {size}", logits, _REFERENCE.logits(rows, head, 0.5)
        for limit in (None, 7.0):
            gates = rand(tokens, 2 * size, dtype=dtype, scale=3)
            activation = Activation(limit, 1.702)
            yield (
                f"swiglu {limit}",
                ops.activate(gates, activation),
                _REFERENCE.activate(gates.float(), activation),
            )


def _fusions(dtype: torch.dtype) -> Iterator[Comparison]:
    size, inner, heads, kv_heads, dim = 896, 4864, 14, 2, 64
    up = linear_of(rand(2 * inner, size, dtype=dtype, scale=0.03))
    down = linear_of(rand(size, inner, dtype=dtype))
    norm, width = norm_of(rand(size, dtype=dtype)), (heads + 2 * kv_heads) * dim
    projection = linear_of(rand(width, size, dtype=dtype, scale=0.03), rand(width, dtype=dtype))
    of_heads = [norm_of(rand(dim, dtype=dtype)) for _ in "qk"]
    angles = torch.rand(64, dim, device=CUDA)
    row = rand(1, size, dtype=dtype)
    for out in (width, 17, 5001):  # 17 and 5001 are not multiples of a program's outputs
        some = linear_of(rand(out, size, dtype=dtype, scale=0.03), rand(out, dtype=dtype))
        expected = _REFERENCE.linear(row.float(), _float32(some))
        yield f"one row, {out} out", fused(dtype, one_row=one_row()).linear(row, some), expected
    for rows in (1, 9, 17, 64):
        x = rand(rows, size, dtype=torch.float32)
        delta = rand(rows, size, dtype=dtype)
        summed, normed = _REFERENCE.add_rms_norm(x, delta, norm)
        gates = _REFERENCE.linear(normed.float(), _float32(up))
        qkv = _REFERENCE.linear(normed.float(), _float32(projection)).unflatten(1, (-1, dim))
        stores = [torch.zeros(2, 10, 16, kv_heads, dim, device=CUDA) for _ in "ab"]
        stores[0] = stores[0].to(dtype)
        for norms in ((), of_heads):
            slots = torch.randperm(160, device=CUDA)[:rows]
            layer = Heads(heads, kv_heads, dim, *norms)
            ropes = [RopeArgs(layer, angles[:rows], store, slots) for store in stores]
            ops = fused(dtype, fused_qkv=64, one_row=one_row())
            found = ops.norm_qkv(x, delta, norm, projection, ropes[0])
            query = _REFERENCE.rotate_and_write(qkv, ropes[1])
            kind = "norm + QKV with norms of heads" if norms else "norm + QKV"
            yield f"{kind}, {rows} rows: sum", found[0], summed
            yield f"{kind}, {rows} rows: query", found[1], query
            yield f"{kind}, {rows} rows: KV", stores[0], stores[1]
        expected = _REFERENCE.linear(_REFERENCE.activate(gates, Activation()), _float32(down))
        for limit in ("fused_gate_up", "fused_mlp"):
            ops = fused(dtype, one_row=one_row(), **{limit: 64})
            _, mlp = ops.norm_mlp(x, delta, norm, up, down, Activation())
            yield f"norm + MLP, {limit}, {rows} rows", mlp, expected


def _attention(dtype: torch.dtype) -> Iterator[Comparison]:
    ops = kernels(dtype)
    lengths = [(1, 1), (1, 1000), (1, 129), (1, 1), (300, 300), (77, 500)]
    shapes = ((6, 2, 32), (64, 8, 64), (16, 8, 128), (14, 2, 64))
    # Float32 kernels take the longest to compile, and only these checks and parity use them.
    for heads, kv_heads, dim in shapes[: 2 if dtype == torch.float32 else None]:
        of_heads = [norm_of(rand(dim, dtype=dtype)) for _ in "qk"]
        qkv, angles = rand(50, heads + 2 * kv_heads, dim, dtype=dtype), torch.rand(50, dim).to(CUDA)
        slots = torch.randperm(160, device=CUDA)[:50]
        stores = [torch.zeros(2, 10, 16, kv_heads, dim, dtype=dtype, device=CUDA) for _ in "ab"]
        for norms in ((), of_heads):
            layer = Heads(heads, kv_heads, dim, *norms)
            ropes = [RopeArgs(layer, angles, store, slots) for store in stores]
            found = ops.rotate_and_write(qkv, ropes[0])
            want = _REFERENCE.rotate_and_write(qkv, ropes[1])
            yield f"rotary {dim}", found, want
            yield f"KV write {dim}", stores[0], stores[1]
        for window, sinks in ((None, None), (128, rand(heads, dtype=dtype))):
            batch, group, blocks = paged_batch(lengths)
            kv = rand(2, blocks, 16, kv_heads, dim, dtype=dtype)
            query = rand(sum(q for q, _ in lengths), heads, dim, dtype=dtype)
            spec = AttentionSpec(dim**-0.5, window)
            found = ops.attention(query, kv, batch, group, spec, sinks)
            want = _REFERENCE.attention(query, kv, batch, group, spec, sinks)
            yield f"attention {heads}/{kv_heads} {dim} window {window}", found, want


def _experts(dtype: torch.dtype) -> Iterator[Comparison]:
    for tokens in (1, 20, 500):
        yield from _experts_of(tokens, dtype)


def _experts_of(tokens: int, dtype: torch.dtype) -> Iterator[Comparison]:
    ops = kernels(dtype)
    count, hidden, size, top_k = 16, 736, 480, 4
    x, logits = rand(tokens, hidden, dtype=dtype), rand(tokens, count, dtype=dtype)
    logits[:, 5:9] += 2  # some experts get more
    for after in (True, False):
        router = RouterSpec(top_k, after, True)
        routed = [backend.route(logits, router)[1] for backend in (ops, _REFERENCE)]
        yield f"router {after}", routed[0], routed[1]
    chosen, weights = _REFERENCE.route(logits, RouterSpec(top_k, True, False))
    packed = random_mxfp4(count, 2 * size, hidden), random_mxfp4(count, hidden, size)
    dense = packed[0].dense(dtype), packed[1].dense(dtype)
    biases = rand(count, 2 * size, dtype=dtype), rand(count, hidden, dtype=dtype)
    # The kernels accumulate in float32, so they are compared with a float32 reference.
    wide = experts_of(
        _REFERENCE, (dense[0].float(), dense[1].float()), (biases[0].float(), biases[1].float())
    )
    expected = _REFERENCE.experts(x.float(), chosen, weights, wide, GPT_OSS)
    for name, stored in (("dense", dense), ("MXFP4", packed)):
        experts = experts_of(ops, stored, biases)
        found = ops.experts(x, chosen, weights, experts, GPT_OSS)
        yield f"{name} experts, {tokens} tokens", found, expected


def _repeated_experts() -> Iterator[str | None]:
    """Yield a problem if the order of execution in a kernel, which varies, changes its result."""
    ops, count, size, top_k = kernels(), 32, 2880, 4
    stored = random_mxfp4(count, 2 * size, size), random_mxfp4(count, size, size)
    experts = experts_of(ops, stored)
    for tokens in (1, 64, 1024):
        x = rand(tokens, size, dtype=torch.bfloat16)
        logits = rand(tokens, count, dtype=torch.bfloat16)
        chosen, weights = _REFERENCE.route(logits, RouterSpec(top_k, True, False))
        runs = [ops.experts(x, chosen, weights, experts, GPT_OSS) for _ in range(30)]
        others = sum(not torch.equal(run, runs[0]) for run in runs)
        yield f"MXFP4 experts, {tokens} tokens: {others} of 30 differ" if others else None


def sampling_arguments(rows: int, vocab: int) -> list[Any]:
    """Return arguments of `Backend.sample_rows`: greedy, whole-vocabulary and truncated rows."""
    logits = rand(rows, vocab, dtype=torch.float32) * torch.linspace(0.5, 4, rows).to(CUDA)[:, None]
    row = torch.arange(rows, device=CUDA)
    top_p = torch.where(row % 5 == 4, 1.0, 0.5 + 0.09 * (row % 5))
    temperature = torch.where(row % 7 == 6, 0.0, 0.8).to(top_p)
    tables = SamplingTables(
        torch.stack((temperature, top_p), 1), torch.stack((row % 3 * 40, row + 1), 1)
    )
    return [logits, row, torch.zeros_like(row), row + 100, tables]


def _sampling(dtype: torch.dtype) -> Iterator[Comparison]:
    """Compare the sampled tokens' logits: rounding can select a token with a nearly equal logit."""
    ops = kernels(dtype)
    for rows, vocab in ((1, 201_088), (200, 151_936), (64, 1000)):
        arguments = sampling_arguments(rows, vocab)
        at = torch.stack([each.sample_rows(*arguments) for each in (ops, _REFERENCE)], 1)
        found, want = arguments[0].gather(1, at).unbind(1)
        yield f"sampling, {rows} rows of {vocab}", found, want


def check_parity_dense() -> Iterator[str | None]:
    """Check tiny models of the dense families."""
    return _parity(sparse=False)


def check_parity_experts() -> Iterator[str | None]:
    """Check tiny models of the families with experts."""
    return _parity(sparse=True)


def _parity(sparse: bool) -> Iterator[str | None]:
    """Compare greedy tokens with the CPU's, in float32 with captured decode steps.

    Also checks that an engine frees all of its GPU memory.
    """
    from tests.checkpoints import FAMILIES, write_checkpoint, write_mxfp4_pair

    rng = random.Random(0)
    prompts = [rng.choices(range(1, 512), k=size) for size in (100, 3, 40)]
    params = SamplingParams(max_new_tokens=32, ignore_eos=True)
    requests = [Request(prompt, params, i) for i, prompt in enumerate(prompts)]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("mxfp4", *FAMILIES):
            if name.startswith(("mxfp4", "gpt_oss", "qwen3_moe", "mixtral")) != sparse:
                continue
            print(name, file=sys.stderr, flush=True)
            path, tokens = Path(folder) / name, list[Any]()
            try:
                if name == "mxfp4":
                    write_mxfp4_pair(path, Path(folder) / "dense")
                else:
                    write_checkpoint(path, name)
                for device in ("cpu", "cuda"):
                    with Engine(
                        path,
                        EngineConfig(
                            device=device, dtype="float32", kv_memory=16 << 20, max_batch_size=4
                        ),
                        notice=_refuse,
                    ) as engine:
                        tokens.append(
                            {c.request_id: c.token_ids for c in engine.generate(requests)}
                        )
                equal = tokens[0] == tokens[1]
                yield None if equal else f"{name}: the tokens differ from the CPU's"
                gc.collect()  # tracebacks of earlier failures can hold tensors
                left = torch.cuda.memory_allocated()
                yield f"{name}: {left} bytes were not freed" if left else None
            except Exception as error:
                yield f"{name}: {type(error).__name__}: {str(error)[:300]}"


def _refuse(notice: str) -> None:
    """Raise an engine's notices: with a fallback the check would not test the GPU's path."""
    raise CheckError(notice)


def check_score() -> float:
    """Return the share of questions that the embedded model answers correctly, run as a job."""
    with tempfile.TemporaryDirectory() as folder:
        output, report = Path(folder) / "output.txt", Path(folder) / "eval.json"
        data = ROOT / "data"
        _getp("-m", "getp", "-i", data / "input.txt", "-o", output, "--device", "cuda")
        _getp("-m", "eval", "-i", output, "--expected", data / "answers.txt", "--report", report)
        share = float(json.loads(report.read_text())["expected"]["share_right"])
    if share < 0.95:
        raise CheckError(f"the embedded model answers {share:.1%} correctly, expected 95%")
    return share


def _getp(*arguments: Any) -> None:
    result = subprocess.run(
        [sys.executable, "run.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    if result.returncode:
        raise CheckError(result.stderr.strip()[-500:])
