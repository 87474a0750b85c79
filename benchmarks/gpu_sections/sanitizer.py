"""The kernels on small inputs under NVIDIA's compute-sanitizer, where it is installed."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.gpu_sections.inputs import CUDA, kernels
from benchmarks.gpu_sections.measure import Limits, Row, note
from model.checks import SMALL, cases
from model.config import ModelConfig
from model.cost.known_models import KNOWN_CONFIGS
from model.families import parse_config

_TOOLS = ("memcheck", "racecheck")
_FAILED = 99  # exit status if the tool finds something
_TINY = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
}


def tiny_configs() -> list[ModelConfig]:
    """Return a dense model and one with experts, both with few and small layers."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return [
        parse_config(KNOWN_CONFIGS["qwen3-0.6b"] | _TINY, "qwen3"),
        parse_config(KNOWN_CONFIGS["gpt-oss-20b"] | _TINY | experts, "gpt-oss"),
    ]


def run_small_cases() -> None:
    """Run every operation once on small inputs; results are not compared."""
    backend = kernels()
    for config in tiny_configs():
        for case in cases(config, CUDA, backend.dtype, size=SMALL):
            print(case, flush=True)
            case.run(backend)
    torch.cuda.synchronize()


def sanitize(limits: Limits) -> Iterator[Row]:
    """Run the small cases under each tool at once; yield what it reports.

    Raises RuntimeError if a tool finds an error or fails.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        yield note("compute-sanitizer: not installed")
        return
    code = "from benchmarks.gpu_sections.sanitizer import run_small_cases; run_small_cases()"

    def run(tool: str) -> subprocess.CompletedProcess[str]:
        options = ["--tool", tool, "--error-exitcode", str(_FAILED), "--print-limit", "5"]
        command = [program, *options, sys.executable, "-c", code]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    problems = []
    with ThreadPoolExecutor(len(_TOOLS)) as pool:
        for tool, done in zip(_TOOLS, pool.map(run, _TOOLS), strict=True):
            reports = [line for line in done.stdout.splitlines() if line.startswith("=====")]
            yield note(f"{tool}: {reports[-1].strip('= ') if reports else done.stdout[-200:]}")
            if done.returncode:
                problems.append(f"{tool} ended with status {done.returncode}")
    if problems:
        raise RuntimeError("; ".join(problems))
