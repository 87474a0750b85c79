"""What a section measures: rows, the GPU's limits, and the time of a call."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_sections.inputs import CUDA, rand

_WARM_UP_S = 0.03  # the GPU was idle during compilation; its clocks rise in this time
_FLUSHES = 5  # about 0.2 ms, in which the host queues the timed operations


@dataclass(frozen=True)
class Limits:
    """This GPU's measured limits: `copy` in bytes/s, `product` (bf16 matrix product) in FLOP/s.

    `until` is when the section will be stopped, as `time.time()`.
    """

    copy: float
    product: float
    until: float = math.inf


@dataclass(frozen=True)
class Row:
    """A row of a result table. `share` is the share of the limit named by `of`.

    `published` is a figure of another engine to compare with, and its source.
    """

    name: str
    value: float
    unit: str
    share: float | None = None
    of: str = ""
    published: str = ""


def note(text: str) -> Row:
    """Return a row that has no value."""
    return Row(text, math.nan, "")


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


def measured_limits(limits: Limits) -> Iterator[Row]:
    """Measure copy bandwidth (bytes read plus written) and the rate of a large bf16 product."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=CUDA).random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds_of(lambda: target.copy_(source))
    yield Row("copy", copy / 1e12, "TB/s")
    a, b = (rand(8192, 8192, dtype=torch.bfloat16) for _ in range(2))
    yield Row("bf16 product", 2 * 8192**3 / seconds_of(lambda: a @ b) / 1e12, "TFLOP/s")
