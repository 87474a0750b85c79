"""Measure the speeds of this processor's kernels, for `model.cost.rates`.

Each kind of kernel runs through the backend as in a replayed step, over more weights or keys and
values than the caches hold. Kinds take turns (products in float32, int8 and int4 have turns of
their own), so that a slow period of the machine affects few of the runs of each, and the median of
its runs counts, because a step is predicted and not the best case. Takes about ten seconds.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from model.cost.rates import Rates, Speeds
from model.formats import DENSE, MXFP4
from model.formats.format import WeightFormat
from model.formats.integers import INT4, INT8
from model.ops.backend import Backend, Compute, choose_backend
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.kv_values import rounded, vector_width
from model.ops.specs import Activation, AttentionSpec, Experts, Linear, Norm, NormSpec

_PASSES = 9
_SIZE, _WIDER = 1024, 4  # values of a row; products with many weights have `_WIDER` times as many
_ROWS = 1, 2, 4, 8, 9, 16, 32, 64, 128, 512
_WEIGHT_BYTES = 1 << 27
_MAX_WEIGHT_ROWS = 1 << 31  # weights times rows: with more rows, fewer weights are used
_EXPERTS, _TOP_K = 32, 4
_EXPERT_ROWS = 1, 2, 4, 8, 16, 32, 64
_TOKENS, _NORMS = 64, 64  # of norms; of activations
_HEADS, _HEAD_DIM, _BLOCK = 16, 64, 16  # of attention
_CONTEXT, _SHORT, _QUERY, _SEQUENCES = 1024, 128, 512, 32
_KV_BYTES = 1 << 26
_KV_SHARED = 1, 4, 8  # query heads that share a KV head
_LOGITS = 64, 1 << 17
# The host's part of a step (scheduling, batch, sampling, bookkeeping) takes 1.1 to 1.2 ms where 100
# small operations from Python take 0.35 ms; both wait for code and data that kernels evicted.
_HOST_OPERATIONS = 300

Times = Sequence[float]
"""The seconds of a computation in each pass."""


@dataclass(frozen=True)
class _Timed:
    """A computation to time, and the number by which its time is divided."""

    compute: Callable[[], object]
    count: int


def measure_rates(target: torch.device) -> Rates:
    """Return the rates of a CPU. Raises MemoryError or RuntimeError for lack of memory."""
    with torch.inference_mode():
        single = choose_backend(target, torch.float32)
        half = choose_backend(target, torch.bfloat16)
        half.allow_copies(2 * _WEIGHT_BYTES)  # as a run has where there is enough memory
        products = {"float32": _speeds(_medians(_times(_linears(single, DENSE))))}
        timed = {**_linears(half, DENSE), **_activations(half), **_host(), **_others(half)}
        caches = {"bfloat16": half}
        if half.recorder() is not None:
            caches |= {name: choose_backend(target, half.dtype, name) for name in ("int8", "fp8")}
        for name, backend in caches.items():
            timed |= _decodes(backend, name)
        if half.keeps_mxfp4(stacked=True):
            timed |= _experts(half)
        times = _times(timed)
        seconds = _medians(times)
        products["bfloat16"] = _speeds(seconds)
        for form in INT8, INT4:
            if half.keeps_integers(quantizes=True):
                products[form.name] = _speeds(_medians(_times(_linears(half, form))))
        copied_rows = max((rows for rows in _ROWS if half.note_step(rows)), default=0)
        activated_s = _difference(times, "gated", "plain")
        if half.keeps_mxfp4(stacked=True):
            # Their kernel includes the activation, which the cost model has as an operation.
            per_row = activated_s / (3 * _SIZE)
            products[MXFP4.name] = [
                (rows, max(0.0, seconds[f"experts {rows}"] - per_row * rows), 0.0)
                for rows in _EXPERT_ROWS
            ]
    rates = _rates(products, times, activated_s, half.dtype.itemsize, tuple(caches))
    return replace(rates, copied_rows=float(copied_rows))


def _rates(
    products: Mapping[str, Speeds],
    times: Mapping[str, Times],
    activated_s: float,
    item: int,
    kv_dtypes: Sequence[str],
) -> Rates:
    seconds = _medians(times)
    most = _KV_SHARED[-1]
    longer, shorter = f"decode {kv_dtypes[0]} {most}", "decode short"
    position_s = _difference(times, longer, shorter) / (_CONTEXT - _SHORT)
    sequence_s = max(0.0, seconds[shorter] - position_s * _SHORT)
    decode = {
        name: [
            (
                shared,
                max(0.0, seconds[f"decode {name} {shared}"] - sequence_s)
                / (_CONTEXT * (_HEADS // shared) * _HEAD_DIM),
            )
            for shared in _KV_SHARED
        ]
        for name in kv_dtypes
    }
    # As the cost model counts them: a norm reads and writes each value once, an activation reads
    # two for each that it writes.
    moved, activated = 2 * item, 3 * item
    moved_byte_s = _difference(times, "norms", "small norms") / (moved * _SIZE)
    return Rates(
        products,
        kernel_s=seconds["small norms"],
        decode=decode,
        sequence_s=sequence_s,
        prefill_s=seconds["prefill"],
        moved_byte_s=moved_byte_s / _TOKENS,
        activated_byte_s=activated_s / activated,
        logit_s=seconds["logits"],
        host_s=seconds["host"],
    )


def _speeds(seconds: Mapping[str, float]) -> Speeds:
    """Return the speeds of products, such that many and few weights take as long for each."""
    speeds = []
    for rows in _ROWS:
        if f"wide {rows}" in seconds:
            each, few = seconds[f"wide {rows}"], seconds[f"narrow {rows}"]
            besides = max(0.0, (_WIDER * few - each) / (_WIDER - 1))
            speeds.append((rows, max(0.0, each - besides) / (_WIDER * _SIZE**2), besides))
    return speeds


def _linears(backend: Backend, form: WeightFormat) -> dict[str, _Timed]:
    """Return products with weights of a form in memory.

    Each takes the result of the one before it, which is then in the caches of other cores, as in a
    step.
    """
    up, down = (_WIDER * _SIZE, _SIZE), (_SIZE, _WIDER * _SIZE)
    pairs = _WEIGHT_BYTES // (2 * form.bytes(up, backend.dtype.itemsize))
    wide = [_linear(backend, form, *sizes) for _ in range(pairs) for sizes in (up, down)]
    narrow = [_linear(backend, form, _SIZE, _SIZE) for _ in range(_WIDER * pairs)]
    backend.compress()
    timed = {}
    for rows in _ROWS:
        used = min(pairs, max(1, _MAX_WEIGHT_ROWS // (2 * _WIDER * _SIZE**2 * rows)))
        x = _random(backend, rows, _SIZE)
        for name, linears in (("wide", wide[: 2 * used]), ("narrow", narrow[: _WIDER * used])):
            compute = _replayed(backend, _chain(backend.linear, x, linears))
            timed[f"{name} {rows}"] = _Timed(compute, len(linears))
    return timed


def _activations(backend: Backend) -> dict[str, _Timed]:
    """Return products with an activation, and without."""
    linears = [_linear(backend, DENSE, _WIDER * _SIZE, _SIZE) for _ in range(4)]
    x = _random(backend, _TOKENS, _SIZE)

    def gated(_: torch.Tensor, linear: Linear) -> torch.Tensor:
        return backend.gated_linear(x, linear, Activation())

    def plain(_: torch.Tensor, linear: Linear) -> torch.Tensor:
        return backend.linear(x, linear)

    count = len(linears) * _TOKENS * _WIDER * _SIZE // 2
    return {
        name: _Timed(_replayed(backend, _chain(product, x, linears)), count)
        for name, product in (("gated", gated), ("plain", plain))
    }


def _linear(backend: Backend, form: WeightFormat, outputs: int, inputs: int) -> Linear:
    storage = form.allocate(backend, (outputs, inputs))
    form.fill_random(storage, torch.Generator().manual_seed(0))
    weight = form.finish(backend, storage)
    return Linear(inputs, outputs, has_bias=False, format=form, weight=weight)


def _random(backend: Backend, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns).to(backend.dtype)


def _chain(
    product: Callable[[torch.Tensor, Linear], torch.Tensor],
    x: torch.Tensor,
    linears: Sequence[Linear],
) -> Compute:
    """Return products one after the other, each of the result of the one before it."""

    def run() -> torch.Tensor:
        out = x
        for linear in linears:
            out = product(out, linear)
        return out

    return run


def _experts(backend: Backend) -> dict[str, _Timed]:
    """Return experts in MXFP4, each weight of which is used for a number of rows."""
    count, size = _EXPERTS, _SIZE
    experts = Experts(count, size, size, has_bias=False, format=MXFP4)
    generator = torch.Generator().manual_seed(0)
    for name, outputs, parts in (("gate_up", 2 * size, 2), ("down", size, 1)):
        storage = MXFP4.allocate(backend, (count, outputs, size), parts)
        MXFP4.fill_random(storage, generator)
        setattr(experts, name, MXFP4.finish(backend, storage))

    def compute(rows: int) -> Compute:
        tokens = rows * count // _TOP_K
        x = _random(backend, tokens, size)
        chosen = (torch.arange(tokens * _TOP_K) % count).view(tokens, _TOP_K)
        weights = torch.full((tokens, _TOP_K), 1 / _TOP_K)
        return _replayed(
            backend, lambda: backend.experts(x, chosen, weights, experts, Activation())
        )

    return {
        f"experts {rows}": _Timed(compute(rows), 3 * count * size * size) for rows in _EXPERT_ROWS
    }


def _others(backend: Backend) -> dict[str, _Timed]:
    """Return norms, attention, and the choice of the most likely token."""
    logits = torch.empty(_LOGITS)
    first = _CONTEXT - _QUERY + 1  # positions that the first query of a prefill sees
    pairs = _QUERY * first + _QUERY * (_QUERY - 1) // 2
    prefill = _attention(backend, _HEADS // 4, 1, _QUERY, _CONTEXT, layers=1)
    return {
        "small norms": _Timed(_replayed(backend, _norms(backend, 1)), _NORMS),
        "norms": _Timed(_replayed(backend, _norms(backend, _TOKENS)), _NORMS),
        "prefill": _Timed(_replayed(backend, prefill), pairs * _HEADS * _HEAD_DIM),
        "logits": _Timed(lambda: backend.argmax(logits.fill_(1.0)), logits.numel()),
    }


def _decodes(backend: Backend, name: str) -> dict[str, _Timed]:
    """Return attention of single queries, some of which share a KV head."""

    def decode(shared: int, context: int) -> _Timed:
        heads = _HEADS // shared
        vector = vector_width(backend.kv_dtype, _HEAD_DIM) * backend.kv_dtype.itemsize
        layers = max(1, _KV_BYTES // (2 * _SEQUENCES * heads * context * vector))
        compute = _attention(backend, heads, _SEQUENCES, 1, context, layers)
        return _Timed(_replayed(backend, compute), layers * _SEQUENCES)

    timed = {f"decode {name} {shared}": decode(shared, _CONTEXT) for shared in _KV_SHARED}
    if backend.kv_dtype == backend.dtype:
        timed["decode short"] = decode(_KV_SHARED[-1], _SHORT)  # next to what it is subtracted from
    return timed


def _host() -> dict[str, _Timed]:
    """Return small operations from Python, after others have taken their place in the caches."""
    values = [torch.zeros(8) for _ in range(_HOST_OPERATIONS)]

    def run() -> None:
        for value in values:
            value.add_(1)

    return {"host": _Timed(run, 1)}


def _norms(backend: Backend, tokens: int) -> Compute:
    norm = Norm(_SIZE, NormSpec(1e-5), weight=torch.ones(_SIZE))
    # Rows that are not in the caches, as after a product that has read its weights.
    xs = torch.randn(_NORMS, tokens, _SIZE)
    deltas = xs.to(backend.dtype)

    def run() -> torch.Tensor:
        for x, delta in zip(xs, deltas, strict=True):
            out = backend.add_rms_norm(x, delta, norm)[1]
        return out

    return run


def _attention(
    backend: Backend, kv_heads: int, sequences: int, query: int, context: int, layers: int
) -> Compute:
    """Return attention in some layers, with the last `query` tokens as queries."""
    blocks, tokens = context // _BLOCK, sequences * query
    # One after the other, as a prompt takes them.
    table = torch.arange(1, 1 + sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    group = GroupTables(table, torch.zeros(tokens, dtype=torch.int64))
    batch = ForwardBatch(
        token_ids=torch.zeros(tokens, dtype=torch.int64),
        positions=torch.arange(context - query, context).repeat(sequences),
        host_query_lens=[query] * sequences,
        host_context_lens=[context] * sequences,
        num_single=sequences if query == 1 else 0,
        groups=(group,),
        logits_rows=torch.arange(query - 1, tokens, query),
        cu_seqlens_q=torch.arange(0, tokens + 1, query, dtype=torch.int32),
        context_lens=torch.full((sequences,), context, dtype=torch.int32),
    )
    shape = 2, 1 + sequences * blocks, _BLOCK, kv_heads, _HEAD_DIM
    kv = backend.empty_cache((layers, *shape))
    kv.copy_(rounded(torch.randn(2, 1, *shape[2:]), kv.dtype))
    x = torch.randn(tokens, _HEADS, _HEAD_DIM).to(backend.dtype)
    spec = AttentionSpec(_HEAD_DIM**-0.5, window=None)

    def run() -> torch.Tensor:
        for layer in kv:
            out = backend.attention(x, layer, batch, group, spec)
        return out

    return run


def _replayed(backend: Backend, compute: Compute) -> Compute:
    """Return a replay of the computation where the backend can record it."""
    recorder = backend.recorder()
    if recorder is None:
        return compute
    try:
        replay = recorder(compute)
    except RuntimeError:  # an operation is left to torch
        return compute
    replay()  # the first call returns the result of the recorded run

    def run(_kept: Compute = compute) -> torch.Tensor:  # the computation owns what it reads
        return replay()

    return run


def _times(timed: Mapping[str, _Timed]) -> dict[str, Times]:
    """Return the seconds of each computation in each pass, divided by its count."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(_PASSES):
        for name, one in timed.items():
            start = time.perf_counter()
            one.compute()
            times[name].append((time.perf_counter() - start) / one.count)
    return dict(times)


def _medians(times: Mapping[str, Times]) -> dict[str, float]:
    return {name: median(taken) for name, taken in times.items()}


def _difference(times: Mapping[str, Times], longer: str, shorter: str) -> float:
    """Return the median of the differences within a pass, 0 at least.

    The passes differ more than the two computations do where other work uses the machine.
    """
    pairs = zip(times[longer], times[shorter], strict=True)
    return max(0.0, median(long - short for long, short in pairs))
