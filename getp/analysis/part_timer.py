"""Follow a step through its parts: how long each takes, and how many operations it launches."""

import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from model.step_parts import AFTER_INNER, OTHER, Part

Step = Callable[[], None]


@dataclass
class Launches:
    """What a step launches, by part: kernels on a GPU, operations called from Python on a CPU."""

    count: dict[str, int]
    busy_s: dict[str, float] | None = None  # on a GPU: seconds that its kernels ran


@contextmanager
def following(parts: Iterable[Part], switch: Callable[[str], None]) -> Iterator[None]:
    """While this is open, `switch` is called with a part's name whenever another one begins."""
    running = [OTHER]

    def followed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(function)  # its attributes too: a linear's weight is asked for beside it
        def call(*args: Any, **kwargs: Any) -> Any:
            running.append(name)
            switch(name)
            try:
                return function(*args, **kwargs)
            finally:
                running.pop()
                running[-1] = AFTER_INNER.get(running[-1], running[-1])
                switch(running[-1])

        return call

    with ExitStack() as restore:
        for part in parts:
            function = getattr(part.owner, part.attribute)
            if part.attribute in vars(part.owner):
                restore.callback(setattr, part.owner, part.attribute, function)
            else:  # a method of its class
                restore.callback(delattr, part.owner, part.attribute)
            setattr(part.owner, part.attribute, followed(function, part.name))
        yield


def time_parts(step: Step, parts: Iterable[Part], device: torch.device) -> dict[str, float]:
    """Run the step once; seconds of each part, which add up to the step.

    On a GPU they are the stream's: from a part's first kernel to the next part's, waiting for the
    host included.
    """
    stamp, difference = _clock(device)
    names: list[str] = []
    stamps: list[Any] = []

    def switch(name: str) -> None:
        names.append(name)
        stamps.append(stamp())

    with following(parts, switch):
        switch(OTHER)
        step()
        stamps.append(stamp())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds: dict[str, float] = defaultdict(float)
    for name, start, end in zip(names, stamps, stamps[1:], strict=False):
        seconds[name] += difference(start, end)
    return seconds


def count_launches(
    step: Step, parts: Iterable[Part], device: torch.device, trace: str | None = None
) -> Launches:
    """Run the step once under torch's profiler; `trace` names a file for its Chrome trace."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # Not torch.profiler.record_function: kernels that no operation of torch launches, as Triton's,
    # are counted to a range of this kind alone.
    current: list[_RecordFunctionFast] = []

    def switch(name: str) -> None:
        for last in current:
            last.__exit__(None, None, None)
        current[:] = [_RecordFunctionFast(name)]
        current[0].__enter__()

    with profile(activities=activities) as profiler:
        with following(parts, switch):
            switch(OTHER)
            step()
        current[0].__exit__(None, None, None)
    if trace is not None:
        profiler.export_chrome_trace(trace)
    names = {OTHER, *AFTER_INNER.values(), *(part.name for part in parts)}
    return add_up(profiler.events(), names, on_gpu)


def add_up(events: Iterable[Any], names: Container[str], on_gpu: bool) -> Launches:
    """Count torch's profiler events by the part that they ran in."""
    found = Launches(defaultdict(int), defaultdict(float) if on_gpu else None)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: it is among those of the operation that launched it
        top = event
        while top.cpu_parent is not None:
            top = top.cpu_parent
        if top.name not in names:
            continue
        if found.busy_s is not None:
            found.count[top.name] += len(event.kernels)
            found.busy_s[top.name] += sum(kernel.duration for kernel in event.kernels) * 1e-6
        elif event.cpu_parent is top and "::" in event.name:
            found.count[top.name] += 1
    return found


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """How to take a stamp on the device, and the seconds between two."""
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: end - start

    def stamp() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return stamp, lambda start, end: start.elapsed_time(end) * 1e-3
