"""What runs in a child process of the examination: one task after the other, each reported."""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

from getp.analysis.doctor import reports
from getp.analysis.doctor.reports import INSTALL, REFERENCE, Ended, Failed, Report, Request, Started

_LIBRARY = "native kernels"
_Task = tuple[Started, Callable[[], Report]]


def main() -> None:
    """Run the tasks of the request that is the last argument; write a line for each report."""
    faulthandler.enable()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = Request.read(sys.argv[-1])
    try:
        for task, run in _tasks(request):
            if task.number >= request.first and not _run(task, run):
                return  # another process runs the rest
    except Exception as error:
        _write(_failed("device", error))
    _write(Ended())


def _end_with_parent() -> None:
    """End this process once the parent has ended, by whatever signal: it holds the other end."""
    sys.stdin.buffer.read()
    os._exit(1)


def _run(task: Started, run: Callable[[], Report]) -> bool:
    """Run and report a task. Returns whether others can still run in this process."""
    _write(task)
    try:
        _write(run())
    except Exception as error:
        if task.name == _LIBRARY:  # then nothing can be computed
            raise
        _write(_failed(task.name, error, task.model))
    return _gpu_works()


def _write(report: Report) -> None:
    print(reports.write(report), flush=True)


def _failed(name: str, error: BaseException, model: str = "") -> Failed:
    """Return the report on an error, with what to do if that is known."""
    from engine.memory_plan import is_out_of_memory
    from model.checks import ReferenceFailedError
    from model.ops.cpu.bindings import VARIABLE

    remedy = ""
    if isinstance(error, ReferenceFailedError):  # nothing is known about the kernel
        return Failed(REFERENCE, str(error), remedy=INSTALL)
    if is_out_of_memory(error):
        remedy = "free memory, or use a smaller model: a layer of this one does not fit"
    elif str(error).startswith(VARIABLE):
        name, remedy = _LIBRARY, f"change {VARIABLE} in the environment, or unset it"
    return Failed(name, _cause(error), model, remedy)


def _cause(error: BaseException) -> str:
    """Return the error in one line: those of torch and Triton go on for many."""
    if hasattr(error, "worded"):  # an error of getp, which is a sentence
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _gpu_works() -> bool:
    """Whether this process can still use the GPU: after a fault in a kernel every call fails."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _tasks(request: Request) -> Iterator[_Task]:
    """Yield the tasks in an order that is the same in each process.

    Raises ImportError and EngineError if torch or the device cannot be used.
    """
    # Imported only now: if an import fails, that is a report, too.
    from model.ops.cpu import bindings

    if request.level is not None:
        os.environ[bindings.VARIABLE] = request.level
    from getp.analysis.doctor.device import (
        describe_device,
        describe_library,
        find_device,
        report_rates,
    )
    from getp.analysis.doctor.kernels import kernel_tasks, score

    numbers = count()
    device, notices = find_device(request.device)
    if request.machine:
        yield Started(next(numbers), "device"), lambda: describe_device(device, notices)
        if device.type == "cpu":
            yield Started(next(numbers), _LIBRARY), describe_library
        yield Started(next(numbers), "speed"), lambda: report_rates(device)
    for model in request.models:
        try:
            for task in kernel_tasks(model, device, request.machine):
                yield Started(next(numbers), task.name, task.model), task
        except Exception as error:
            yield Started(next(numbers), f"kernels of {model}"), partial(_fail, error)
    yield Started(next(numbers), "answers"), lambda: score(device)


def _fail(error: Exception) -> Report:
    raise error
