"""Correctness checks on a GPU; gpu.py runs them before it times anything."""

import gc
import itertools
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from engine import Engine, EngineConfig, Request, SamplingParams
from model.ops import reference
from model.ops.forward_batch import ForwardBatch, GroupTables

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
# Largest error relative to the largest expected value; bfloat16 products round inputs to 8 bits.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class CheckError(Exception):
    """A result is wrong. The message says which one and how large the error is."""


def rand(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Return normally distributed values on the GPU, from the default generator."""
    return (torch.randn(shape, device=CUDA) * scale).to(dtype)


def paged_batch(
    lengths: list[tuple[int, int]], window: int | None, block_size: int = 16
) -> tuple[ForwardBatch, GroupTables, int]:
    """Return a batch of sequences of (new tokens, context) in scattered blocks; its block count."""
    counts = [-(-context // block_size) for _, context in lengths]
    blocks = torch.randperm(sum(counts)) + 1
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, ids in enumerate(blocks.split(counts)):
        table[row, : len(ids)] = ids
    queries = [query for query, _ in lengths]
    contexts = [context for _, context in lengths]
    starts = torch.tensor([0, *queries]).cumsum(0).int().to(CUDA)
    none = torch.zeros(0, dtype=torch.int64, device=CUDA)
    seen = torch.tensor(contexts, dtype=torch.int32, device=CUDA)
    singles = sum(query == 1 for query in queries)
    batch = ForwardBatch(none, none, queries, contexts, singles, (), none, starts, seen)
    return batch, GroupTables(window, table.to(CUDA), none), sum(counts) + 1


def random_mxfp4(experts: int, outputs: int, inputs: int) -> reference.Mxfp4:
    """Return random codes with scales that keep products close to one."""
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), device=CUDA)
    scales = torch.randint(119, 123, (experts, outputs, inputs // 32), device=CUDA)
    return reference.Mxfp4(blocks.to(torch.uint8), scales.to(torch.uint8))


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


def _norms(dtype: torch.dtype) -> Iterator[Comparison]:
    from model.ops import triton
    from model.ops.triton.norm import swiglu

    for tokens, size in ((1, 896), (7, 2880), (300, 4096)):
        x, delta, weight = (rand(n, size, dtype=dtype) for n in (tokens, tokens, 1))
        found = triton.add_rms_norm(x, delta, weight[0], 1e-5)
        expected = reference.add_rms_norm(x, delta, weight[0], 1e-5)
        yield f"sum {size}", found[0], expected[0]
        yield f"norm {size}", found[1], expected[1]
        for limit in (None, 7.0):
            gates = rand(tokens, 2 * size, dtype=dtype, scale=3)
            yield (
                f"swiglu {limit}",
                swiglu(gates, limit, 1.702),
                reference.swiglu(gates.float(), limit, 1.702),
            )


@contextmanager
def fused_limits(**limits: Any) -> Iterator[None]:
    """Set the number of rows up to which each norm is fused; a norm that is not named is not fused.

    Without `one_row`, the product of a single row uses torch.
    """
    from model.ops import triton
    from model.ops.triton import tiles

    none: dict[str, Any] = {"fused_qkv": 0, "fused_gate_up": 0, "fused_mlp": 0, "one_row": None}
    own = replace(tiles.tiles(CUDA), **(none | limits))
    with ExitStack() as patches:
        for op in (triton.norm_qkv, triton.linear):
            module = sys.modules[op.__module__]
            patches.enter_context(patch.object(module, "tiles", lambda device: own))
        yield


def one_row() -> Any:
    """Return the tile that this GPU uses to multiply a single row."""
    from model.ops.triton import tiles

    return tiles.tiles(CUDA).one_row


def _fusions(dtype: torch.dtype) -> Iterator[Comparison]:
    from model.ops import triton

    size, inner, heads, kv_heads, dim = 896, 4864, 14, 2, 64
    up, down = rand(2 * inner, size, dtype=dtype, scale=0.03), rand(size, inner, dtype=dtype)
    norm, width = rand(size, dtype=dtype), (heads + 2 * kv_heads) * dim
    weight, bias = rand(width, size, dtype=dtype, scale=0.03), rand(width, dtype=dtype)
    of_heads = rand(dim, dtype=dtype), rand(dim, dtype=dtype)
    angles = torch.rand(64, dim, device=CUDA)
    with fused_limits(one_row=one_row()):
        row = rand(1, size, dtype=dtype)
        for out in (width, 17, 5001):  # 17 and 5001 are not multiples of a program's outputs
            some, column = rand(out, size, dtype=dtype, scale=0.03), rand(out, dtype=dtype)
            expected = reference.linear(row.float(), some.float(), column.float())
            yield f"one row, {out} out", triton.linear(row, some, column), expected
    for rows in (1, 9, 17, 64):
        x, delta = rand(rows, size, dtype=dtype), rand(rows, size, dtype=dtype)
        summed, normed = reference.add_rms_norm(x, delta, norm, 1e-6)
        gates = reference.linear(normed.float(), up.float(), None)
        qkv = reference.linear(normed.float(), weight.float(), bias.float())
        stores = [torch.zeros(2, 10, 16, kv_heads, dim, device=CUDA) for _ in "ab"]
        stores[0] = stores[0].to(dtype)
        for norms in (None, of_heads):
            turn = torch.randperm(160, device=CUDA)[:rows], heads, norms
            with fused_limits(fused_qkv=64, one_row=one_row()):
                found = triton.norm_qkv(
                    x, delta, norm, 1e-6, weight, bias, angles[:rows], stores[0], *turn
                )
            assert found is not None
            query = reference.rotate_and_write(
                qkv.unflatten(1, (-1, dim)), angles[:rows], stores[1], *turn, 1e-6
            )
            kind = "norm + QKV" if norms is None else "norm + QKV with norms of heads"
            yield f"{kind}, {rows} rows: sum", found[0], summed
            yield f"{kind}, {rows} rows: query", found[1], query
            yield f"{kind}, {rows} rows: KV", stores[0], stores[1]
        expected = reference.linear(reference.swiglu(gates, None, 1.0), down.float(), None)
        for limit in ("fused_gate_up", "fused_mlp"):
            with fused_limits(**{limit: 64, "one_row": one_row()}):
                found = triton.norm_mlp(x, delta, norm, 1e-6, up, None, down, None)
            assert found is not None
            yield f"norm + MLP, {limit}, {rows} rows", found[1], expected


def _attention(dtype: torch.dtype) -> Iterator[Comparison]:
    from model.ops import triton

    lengths = [(1, 1), (1, 1000), (1, 129), (1, 1), (300, 300), (77, 500)]
    shapes = ((6, 2, 32), (64, 8, 64), (16, 8, 128), (14, 2, 64))
    # Float32 kernels take the longest to compile, and only these checks and parity use them.
    for heads, kv_heads, dim in shapes[: 2 if dtype == torch.float32 else None]:
        norms = (rand(dim, dtype=dtype), rand(dim, dtype=dtype))
        qkv, angles = rand(50, heads + 2 * kv_heads, dim, dtype=dtype), torch.rand(50, dim).to(CUDA)
        slots = torch.randperm(160, device=CUDA)[:50]
        stores = [torch.zeros(2, 10, 16, kv_heads, dim, dtype=dtype, device=CUDA) for _ in "ab"]
        for norm in (None, norms):
            found = triton.rotate_and_write(qkv, angles, stores[0], slots, heads, norm, 1e-5)
            want = reference.rotate_and_write(qkv, angles, stores[1], slots, heads, norm, 1e-5)
            yield f"rotary {dim}", found, want
            yield f"KV write {dim}", stores[0], stores[1]
        for window, sinks in ((None, None), (128, rand(heads, dtype=dtype))):
            batch, group, blocks = paged_batch(lengths, window)
            kv = rand(2, blocks, 16, kv_heads, dim, dtype=dtype)
            query = rand(sum(q for q, _ in lengths), heads, dim, dtype=dtype)
            found = triton.attention(query, kv, batch, group, sinks)
            want = reference.attention(query, kv, batch, group, sinks)
            yield f"attention {heads}/{kv_heads} {dim} window {window}", found, want


def _experts(dtype: torch.dtype) -> Iterator[Comparison]:
    for tokens in (1, 20, 500):
        yield from _experts_of(tokens, dtype)


def _experts_of(tokens: int, dtype: torch.dtype) -> Iterator[Comparison]:
    from model.ops import triton

    count, hidden, size, top_k = 16, 736, 480, 4
    x, logits = rand(tokens, hidden, dtype=dtype), rand(tokens, count, dtype=dtype)
    logits[:, 5:9] += 2  # some experts get more
    for after in (True, False):
        found, want = (m.route(logits, top_k, after, True) for m in (triton, reference))
        yield f"router {after}", found[1], want[1]
    chosen, shares = reference.route(logits, top_k, True, False)
    packed = random_mxfp4(count, 2 * size, hidden), random_mxfp4(count, hidden, size)
    dense = tuple(weight.dense(dtype) for weight in packed)
    biases = rand(count, 2 * size, dtype=dtype), rand(count, hidden, dtype=dtype)
    # The kernels accumulate in float32, so they are compared with a float32 reference.
    up, up_bias, down, down_bias = (t.float() for t in (dense[0], biases[0], dense[1], biases[1]))
    expected = reference.experts(
        x.float(), chosen, shares, up, up_bias, down, down_bias, 7.0, 1.702
    )
    words = tuple(triton.pack_experts(weight, dtype) for weight in packed)
    for name, weights in (("dense", dense), ("MXFP4", words)):
        found = triton.experts(
            x, chosen, shares, weights[0], biases[0], weights[1], biases[1], 7.0, 1.702
        )
        yield f"{name} experts, {tokens} tokens", found, expected


def _repeated_experts() -> Iterator[str | None]:
    """Yield a problem if the order of execution in a kernel, which varies, changes its result."""
    from model.ops import triton

    count, size, top_k = 32, 2880, 4
    shapes = (2 * size, size), (size, size)
    up, down = (
        triton.pack_experts(random_mxfp4(count, *shape), torch.bfloat16) for shape in shapes
    )
    for tokens in (1, 64, 1024):
        x = rand(tokens, size, dtype=torch.bfloat16)
        logits = rand(tokens, count, dtype=torch.bfloat16)
        chosen, shares = reference.route(logits, top_k, True, False)
        runs = [
            triton.experts(x, chosen, shares, up, None, down, None, 7.0, 1.702) for _ in range(30)
        ]
        others = sum(not torch.equal(run, runs[0]) for run in runs)
        yield f"MXFP4 experts, {tokens} tokens: {others} of 30 differ" if others else None


def sampling_arguments(rows: int, vocab: int, dtype: torch.dtype) -> list[Any]:
    """Return logits and sampling arguments, with various top-k and small and large top-p."""
    logits = rand(rows, vocab, dtype=torch.float32) * torch.linspace(0.5, 4, rows).to(CUDA)[:, None]
    row = torch.arange(rows, device=CUDA)
    uniform = torch.rand(rows, dtype=torch.float64, device=CUDA)
    top_p = torch.where(row % 5 == 4, 1.0, 0.5 + 0.09 * (row % 5))
    return [logits.to(dtype), torch.full((rows,), 0.8, device=CUDA), row % 3 * 40, top_p, uniform]


def _sampling(dtype: torch.dtype) -> Iterator[Comparison]:
    """Compare the sampled tokens' logits: rounding can select a token with a nearly equal logit."""
    from model.ops import triton

    for rows, vocab in ((1, 201_088), (200, 151_936), (64, 1000)):
        logits, temperature, top_k, top_p, uniform = sampling_arguments(rows, vocab, dtype)
        for limit in (None, top_k):
            found = triton.draw(logits, temperature, limit, top_p, uniform)
            want = reference.draw(logits, temperature, limit, top_p, uniform)
            at = torch.stack((found, want), 1)
            found, want = logits.float().gather(1, at).unbind(1)
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
