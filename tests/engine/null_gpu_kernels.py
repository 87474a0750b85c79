"""The choice of kernels on the simulated GPU of benchmarks/null_gpu.py; test_null_gpu.py runs it.

Kernels compile, launch, are captured and replayed for real, but do not run. So results are not
compared; instead one kernel does not compile, and one cannot be captured.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.gpu_sections.inputs import kernels  # noqa: E402
from benchmarks.gpu_sections.quantized import FORMS  # noqa: E402
from engine import Engine, EngineConfig, Request, SamplingParams  # noqa: E402
from model.checks import case, reference_of  # noqa: E402
from model.ops.triton import attention, route  # noqa: E402


class Refusing:
    """A kernel that cannot be launched, always or during a capture."""

    def __init__(self, kernel: Any, only_in_capture: bool):
        self._kernel, self._only_in_capture = kernel, only_in_capture

    def __getitem__(self, grid: Any) -> Any:
        if not self._only_in_capture or torch.cuda.is_current_stream_capturing():
            raise RuntimeError("refused")
        return self._kernel[grid]


def load_quantized() -> None:
    """Load weights of 4 and 8 bits: checks of their values do not take zeros for wrong ones."""
    backend, shape = kernels(), (64, 256)
    for form in FORMS.values():
        source = form.allocate(reference_of(backend), shape)
        form.fill_random(source, torch.Generator("cuda"))
        form.allocate(backend, shape).copy_(source)


def main() -> None:
    """Print the choices and notices of three engines, and the tokens of the last one."""
    load_quantized()
    unchecked: Any = case
    unchecked._expected = lambda one, reference: one.run(reference)
    unchecked.compare = lambda *arguments: None
    for module, kernel, only_in_capture in (
        (None, "", False),
        (attention, "decode_attention", False),
        (route, "_route", True),
    ):
        if module is not None:
            original = getattr(module, kernel)
            setattr(module, kernel, Refusing(original, only_in_capture))
        notices: list[str] = []
        config = EngineConfig(
            device="cuda", kv_memory=64 << 20, max_batch_size=4, max_batch_tokens=64
        )
        engine = Engine(ROOT / "data" / "model", config, notice=notices.append)
        with tempfile.TemporaryDirectory() as cache:
            os.environ["XDG_CACHE_HOME"] = cache
            engine.choose_kernels()
        choices, found = engine.kernels.choices, list(notices)
        if module is not None:
            setattr(module, kernel, original)
        with engine:
            params = SamplingParams(max_new_tokens=3, ignore_eos=True)
            done = list(engine.generate([Request([5, 6, 7], params)]))
        print(json.dumps([choices, found, len(done[0].token_ids)]))


if __name__ == "__main__":
    main()
