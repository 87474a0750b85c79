"""Where the time of a step goes: its slowest kernels, and its launches."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_sections.measure import Row
from engine import Engine, Request, SamplingParams
from engine.step_probe import StepProbe
from getp.analysis import part_timer  # noqa: F401  silences torch's profiler


def profile_step(engine: Engine, context: int) -> Iterator[Row]:
    """Measure the slowest kernels of a decode step of the largest batch, without graphs.

    Programmatic launch is off, because with it the times of successive kernels overlap.
    """
    from torch.profiler import ProfilerActivity, profile

    from model.ops.triton.tiles import Target

    probe = StepProbe(engine, engine.max_batch_size, 1, context)
    count, spent = 4, Counter[str]()
    with patch.object(Target, "launch_options", {"PROGRAMMATIC_LAUNCH": False}):
        probe.step()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            for _ in range(count):
                probe.step()
            torch.cuda.synchronize()
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] += event.time_range.elapsed_us()
    for name, us in spent.most_common(8):
        yield Row(f"one step: {name[:60]}", us / count, "us", us / spent.total(), "all kernels")


def count_launches(engine: Engine, name: str) -> Iterator[Row]:
    """Count kernels and launches per token while decoding one request, with torch's profiler.

    Also measures how long at least one kernel runs per token; the rest of the time is between
    kernels.
    """
    from torch.profiler import ProfilerActivity, profile

    counts = []
    for tokens in (4, 4 + 16):  # the same prefill twice; the difference is 16 decode steps
        request = Request([1] * 100, SamplingParams(max_new_tokens=tokens, ignore_eos=True))
        list(engine.generate([request]))
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            list(engine.generate([request]))
            torch.cuda.synchronize()
        on_gpu = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        launches = sum(
            "Launch" in e.name
            for e in found.events()
            if e.device_type == torch.autograd.DeviceType.CPU
        )
        kernels = sum(not e.name.startswith(("Mem", "mem")) for e in on_gpu)
        counts.append((kernels, launches, union_us(on_gpu)))
    kernels, launches, us = ((b - a) / 16 for a, b in zip(*counts, strict=True))
    yield Row(f"{name}: kernels per token", kernels, "kernels")
    yield Row(f"{name}: kernels per layer", kernels / len(engine.model_config.layers), "kernels")
    yield Row(f"{name}: launches per token", launches, "launches")
    yield Row(f"{name}: kernel and copy time per token", us, "us")


def union_us(events: list[Any]) -> float:
    """Return for how many microseconds at least one of the events runs."""
    total, until = 0.0, -math.inf
    for span in sorted((e.time_range for e in events), key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total
