"""Checks of kernels and of the whole engine on one backend; run in a child process."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from engine import Engine, EngineConfig, Request, SamplingParams
from engine.resolve import choose_dtype, dtype_name
from getp import EMBEDDED
from getp.analysis.doctor.reports import KernelReport, ScoreReport
from getp.checkpoints import embedded_model, load_tokenizer
from getp.hub import model_name
from model import ModelConfig, load_config
from model.checks import OPERATIONS, Case, cases, problem, reference_of
from model.cost.known_models import KNOWN_CONFIGS, named_config
from model.ops.backend import Backend, choose_backend
from model.ops.cpu.bindings import kernels, library

_ON_HOST = ("argmax", "top_tokens", "adjust_logits", "sample_rows")
"""Operations that torch computes on a CPU, whatever the instruction set of the native kernels."""
_LONGEST_ANSWER = 64  # tokens; the answers are numbers and words
_TIMED_S = 2e-3  # of repeated calls, from which the fastest counts
_MIN_CALLS, _MAX_CALLS = 3, 50
_REPEATED = 20  # calls that are timed together on a GPU


def kernel_tasks(model: str, device: torch.device, with_sampling: bool) -> "Iterator[KernelTask]":
    """Yield a task for each case of the kernels that a model uses.

    model: a checkpoint directory, or the name of a well-known model. with_sampling: also of what
    does not depend on the instruction set of the native kernels.
    """
    config = _config(model)
    dtype = choose_dtype("auto", config.dtype, device)
    backend = choose_backend(device, dtype)
    config = config.held(backend)
    reference = reference_of(backend)
    if not with_sampling and library() is not None and backend_name(backend) == "torch":
        return  # a dtype without native kernels
    operations = [name for name in OPERATIONS if with_sampling or name not in _ON_HOST]
    for case in cases(config, device, dtype, operations=operations):
        yield KernelTask(_name(model), case, backend, reference)


def _config(model: str) -> ModelConfig:
    return named_config(model) if model in KNOWN_CONFIGS else load_config(model)


def _name(model: str) -> str:
    if model in KNOWN_CONFIGS:
        return model
    folder = Path(model)
    return EMBEDDED if folder.samefile(embedded_model()) else model_name(folder)


class KernelTask:
    """Compares one case with the reference, and times it."""

    def __init__(self, model: str, case: Case, backend: Backend, reference: Backend) -> None:
        self.name, self.model = str(case), model
        self._case, self._backend, self._reference = case, backend, reference

    @torch.inference_mode()
    def __call__(self) -> KernelReport:
        case, backend = self._case, self._backend
        found = problem(case, backend, self._reference)
        return KernelReport(
            backend=backend_name(backend),
            model=self.model,
            op=case.op,
            label=case.label,
            dtype=dtype_name(backend.dtype),
            problem=found,
            seconds=None if found else _seconds(case.prepare(backend), backend.device),
            bytes=case.bytes,
            flops=case.flops,
        )


def backend_name(backend: Backend) -> str:
    """Return the instruction set of native kernels, triton, or torch."""
    if backend.device.type == "cuda":
        return "triton" if type(backend) is not Backend else "torch"
    # Native kernels are for bfloat16.
    is_native = library() is not None and backend.dtype == torch.bfloat16
    return kernels.level if is_native else "torch"


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of the fastest call."""
    if device.type == "cuda":
        return _gpu_seconds(call)
    best, started = float("inf"), time.perf_counter()
    for number in range(_MAX_CALLS):
        before = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - before)
        if number + 1 >= _MIN_CALLS and now - started > _TIMED_S:
            break
    return best


def _gpu_seconds(call: Callable[[], Any]) -> float:
    def call_repeatedly() -> None:
        for _ in range(_REPEATED):
            call()

    call()
    torch.cuda.synchronize()
    repeat = _captured(call_repeatedly) or call_repeatedly
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(_MIN_CALLS):
        start.record()
        repeat()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / _REPEATED)
    return min(times)


def _captured(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """Return a replay of a graph of the call; None if it cannot be captured.

    A launch from Python takes longer than a small kernel. On AMD's GPUs nothing is captured here: a
    capture that fails there can end the process, which would be taken for a fault of the kernel.
    """
    if torch.version.hip:
        return None
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # an operation that waits for the GPU
        torch.cuda.set_stream(stream)  # which torch does not restore if the capture fails
        torch.cuda.synchronize()
        return None
    return graph.replay


def score(device: torch.device) -> ScoreReport:
    """Let the embedded model answer its questions, and see whether decode steps are replayed."""
    folder = embedded_model()
    count, *questions = (folder.parent / "input.txt").read_text(encoding="utf-8").split("\n")
    del questions[int(count) :]
    answers = (folder.parent / "answers.txt").read_text(encoding="utf-8").split("\n")
    tokenizer = load_tokenizer(folder)
    params = SamplingParams(max_new_tokens=_LONGEST_ANSWER, stop_ids=tokenizer.stop_ids)
    requests = [Request(tokenizer.encode(question), params) for question in questions]
    notices: list[str] = []
    started, right = time.perf_counter(), 0
    # With every kernel, including those that a job would replace because they fail.
    config = EngineConfig(device=str(device), trust_kernels=True)
    with Engine(folder, config, notice=notices.append) as engine:
        backend = engine.runner.backend
        for done in engine.generate(requests):
            text = tokenizer.decode(done.token_ids)
            right += text.strip() == answers[done.request_id].strip()
        return ScoreReport(
            backend=backend_name(backend),
            right=right,
            questions=len(questions),
            seconds=time.perf_counter() - started,
            captured=engine.runner.captured,
            can_capture=device.type == "cuda" or backend.recorder() is not None,
            notices=tuple(notices),
        )
