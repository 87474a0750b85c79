"""The time and the number of launched operations of each part of a step."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from model.ops.step_parts import ALL_PARTS, OTHER, StepPart, observe

# torch's profiler (2.13) prints a line whenever it starts or stops, above the level of errors. It
# reads this variable at its first use in a process: 6 silences it, 2 would show warnings.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

Step = Callable[[], None]


@dataclass
class Launches:
    """Launches of a step by part: kernels on a GPU, operations called from Python on a CPU."""

    count: dict[str, int]
    busy_s: dict[str, float] | None = None  # on a GPU: seconds in which its kernels ran


def time_parts(step: Step, device: torch.device) -> dict[str, float]:
    """Run the step once; return the seconds of each part, which add up to the step.

    On a GPU these are seconds of the stream, from the first kernel of a part to that of the next
    part, including idle time while it waits for the host.
    """
    stamp, difference = _clock(device)
    names: list[str] = []
    stamps: list[Any] = []

    def note(name: str) -> None:
        names.append(name)
        stamps.append(stamp())

    with observe(note):
        step()
        stamps.append(stamp())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds: dict[str, float] = defaultdict(float)
    for name, start, end in zip(names, stamps, stamps[1:], strict=False):
        seconds[name] += difference(start, end)
    return seconds


def count_launches(step: Step, device: torch.device, trace: str | None = None) -> Launches:
    """Run the step once under torch's profiler. trace: file for its Chrome trace."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler, StepPart(OTHER):
        step()
    if trace is not None:
        profiler.export_chrome_trace(trace)
    return count_events(profiler.events(), on_gpu)


def count_events(events: Iterable[Any], on_gpu: bool) -> Launches:
    """Count events of torch's profiler by the innermost part in which they ran."""
    launches = Launches(defaultdict(int), defaultdict(float) if on_gpu else None)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: it is counted with the operation that launched it
        part = event
        while part is not None and part.name not in ALL_PARTS:
            part = part.cpu_parent
        if part is None:
            continue
        if launches.busy_s is not None:
            launches.count[part.name] += len(event.kernels)
            launches.busy_s[part.name] += sum(kernel.duration for kernel in event.kernels) * 1e-6
        elif event.cpu_parent is part and "::" in event.name:
            launches.count[part.name] += 1
    return launches


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Return a function that takes a time stamp, and one for the seconds between two stamps."""
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: end - start

    def stamp() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return stamp, lambda start, end: start.elapsed_time(end) * 1e-3
