"""Compile the kernels that calls would launch, on all cores, without launching them."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import triton
from triton.runtime.jit import JITFunction


@contextmanager
def compile_only() -> Iterator[None]:
    """Make each launch only compile its kernel; results of calls are uninitialized memory."""
    run = JITFunction.run

    def compile_kernel(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(kernel, *args, grid=grid, warmup=True, **options)

    with patch.object(JITFunction, "run", compile_kernel):
        yield


def compile_together(calls: Iterable[Callable[[], Any]]) -> list[Exception]:
    """Compile the kernels of all calls at once; return the errors of calls.

    Kernels that do not compile are left out. The compiler releases Python's lock, so threads are
    enough.
    """
    errors = list[Exception]()
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
        compile_only(),
    ):
        for call in calls:
            try:
                call()
            except Exception as error:
                errors.append(error)
    return errors
