"""Fallbacks where steps cannot be captured: other modes are tried, with a notice for each failure.

A HIP graph can crash the process (pytorch/pytorch#155720, vllm-project/vllm#35485), which cannot be
caught, so on HIP a child process tries first.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from engine.execution.capture import Capture, CaptureMode, capture_error
from engine.execution.model_runner import ModelRunner
from engine.memory_plan import is_out_of_memory

_CHILD_TIMEOUT_S = 240.0  # importing torch, and compiling the kernels of a decode step


def capture_if_possible(
    runner: ModelRunner,
    make_capture: Callable[[], Capture],
    notice: Callable[[str], None],
    max_batch_tokens: int = 0,
) -> bool:
    """Capture steps as `ModelRunner.capture` in the first mode that works, the same on all ranks.

    False if none does. `notice` is called once for each mode that fails. Raises errors that have
    other causes than the capture.
    """
    modes = runner.capture_modes
    for mode, following in zip(modes, [*modes[1:], None], strict=True):
        try:
            runner.capture(make_capture(), mode, max_batch_tokens)
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            notice(_notice(following, capture_error(error)))
        else:
            return True
    return False


def _notice(mode: CaptureMode | None, cause: str) -> str:
    if mode is None:
        return f"decode steps are not replayed as graphs: {cause}"
    return f"decode steps are captured {mode.value}, because a capture failed: {cause}"


def crash_of_child(arguments: list[str], timeout: float = _CHILD_TIMEOUT_S) -> str:
    """Run `engine.execution.capture_child` with these arguments; returns why it failed, or ""."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        child = subprocess.run(
            [sys.executable, "-m", "engine.execution.capture_child", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return f"a child process that tried it did not end within {timeout:g} s"
    if child.returncode == 0:
        return ""
    if child.returncode < 0:
        return f"a child process that tried it was killed by signal {-child.returncode}"
    last = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return f"a child process that tried it exited with status {child.returncode}: {last}"


def crash_of_hip(
    checkpoint: Path, device: torch.device, dtype: str, kv_dtype: str, block_size: int
) -> str:
    """Why captures must not be tried in this process; "" if they may, as always except on HIP."""
    if torch.version.hip is None:
        return ""
    return crash_of_child([str(checkpoint), str(device), dtype, kv_dtype, str(block_size)])
