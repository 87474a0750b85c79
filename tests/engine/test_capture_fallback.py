"""Where a capture fails, the next mode is tried, the user is told, and tokens stay the same."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Engine, EngineConfig, EngineError
from engine import engine as engine_module
from engine.execution import capture_fallback, model_runner
from engine.execution.capture import Capture, CaptureMode
from engine.execution.capture_child import small_runner, try_captures
from engine.execution.capture_fallback import crash_of_child, crash_of_hip
from model import load_config
from model.ops.backend import Backend, Compute
from model.ops.specs import Linear
from tests.engine.captures import Refusing, Repeating, Taping, TensorLengths
from tests.engine.test_engine import load

CPU = torch.device("cpu")
_RUN = subprocess.run
SETTINGS = EngineConfig(
    dtype="float32", kv_memory=32 << 20, max_batch_size=4, max_batch_tokens=128, speculation=False
)


class OverlappingLaunches(TensorLengths):
    """A backend whose kernels cannot be captured with programmatic launch."""

    def without_programmatic_launch(self) -> Backend:
        return TensorLengths(self.device, self.dtype)

    def linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        if TapingWithoutOverlap.capturing:
            raise RuntimeError("launch attribute not supported")
        return super().linear(x, linear)


class TapingWithoutOverlap(Taping):
    capturing = False

    def __call__(self, compute: Compute) -> Compute:
        self.run_first(compute)

        def noted() -> torch.Tensor:
            TapingWithoutOverlap.capturing = True
            try:
                return compute()
            finally:
                TapingWithoutOverlap.capturing = False

        with self.segment() as repeat:
            result = noted()

        def replay() -> torch.Tensor:
            repeat()
            return result

        return replay


def tokens_and_notices(
    folder: Path, make_capture: Callable[[], Capture] | None
) -> tuple[dict[Any, Any], list[str], bool]:
    notices: list[str] = []
    engine = Engine(folder, SETTINGS, notice=notices.append)
    if make_capture is not None:
        engine.make_capture = lambda stats: make_capture()
    with engine:
        found = {c.request_id: c.token_ids for c in engine.generate(load(4))}
        return found, notices, engine.runner.captured


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend whose attention needs lengths on the host, and whose experts wait for counts."""
    monkeypatch.setattr(model_runner, "choose_backend", Backend)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3", "qwen3_moe", "phi3-longrope"])
def test_attention_and_experts_that_cannot_be_captured_run_between_captured_parts(
    name: str, plain_torch: None, checkpoint: Callable[[str], Path]
) -> None:
    expected, notices, captured = tokens_and_notices(checkpoint(name), None)
    assert (notices, captured) == ([], False)
    captures: list[Taping] = []

    def taping() -> Taping:
        captures.append(Taping())
        return captures[-1]

    found, notices, captured = tokens_and_notices(checkpoint(name), taping)
    assert found == expected
    assert captured
    assert len(notices) == 1
    text = "decode steps are captured in parts, with attention and experts outside of graphs"
    cause = "torch's attention needs lengths that a captured step does not have"
    assert notices[0] == f"{text}, because a capture failed: {cause}"
    layers = load_config(checkpoint(name)).layers
    sizes, outside = 3, len(layers) + sum(layer.sparse for layer in layers)
    assert captures[-1].segments == sizes * (outside + 1)


def test_programmatic_launch_is_left_out_where_it_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], Path]
) -> None:
    monkeypatch.setattr(model_runner, "choose_backend", OverlappingLaunches)
    folder = checkpoint("qwen3")
    expected, _, _ = tokens_and_notices(folder, None)
    found, notices, captured = tokens_and_notices(folder, TapingWithoutOverlap)
    assert found == expected
    assert captured
    assert notices == [
        "decode steps are captured whole, without programmatic launch, because a capture failed: "
        "launch attribute not supported"
    ]


def test_an_engine_that_cannot_capture_gives_one_notice_a_mode_and_runs(
    plain_torch: None,
    checkpoint: Callable[[str], Path],
) -> None:
    folder = checkpoint("qwen2")
    expected, _, _ = tokens_and_notices(folder, None)
    found, notices, captured = tokens_and_notices(folder, Refusing)
    assert found == expected
    assert not captured
    assert len(notices) == 2
    assert notices[0].startswith("decode steps are captured in parts")
    assert notices[1] == (
        "decode steps are not replayed as graphs: operation not permitted when stream is capturing"
    )


def test_requests_are_admitted_in_groups_only_where_steps_are_replayed(
    plain_torch: None, checkpoint: Callable[[str], Path]
) -> None:
    for capture, size in ((Refusing(), 0), (Taping(), 4)):
        engine = Engine(checkpoint("qwen2"), SETTINGS, notice=lambda text: None)
        engine.make_capture = lambda stats, capture=capture: capture
        engine.group_size = 4
        with engine:
            assert engine.steps.scheduler.group_size == size


def test_running_out_of_memory_is_no_reason_to_try_another_mode(
    checkpoint: Callable[[str], Path],
) -> None:
    class Full(Repeating):
        def __call__(self, compute: Compute) -> Compute:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    notices: list[str] = []
    engine = Engine(checkpoint("qwen2"), SETTINGS, notice=notices.append)
    engine.make_capture = lambda stats: Full()
    with pytest.raises(EngineError, match="out of memory while the model was loaded"):
        engine.warm_up()
    assert not notices


def test_only_hip_needs_a_child() -> None:
    if torch.version.hip is None:
        assert crash_of_hip(Path("none"), CPU, "float32", "auto", 16) == ""


def started_as(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the child run this code."""

    def run(command: list[str], **options: Any) -> Any:
        return _RUN([sys.executable, "-c", code], **options)

    monkeypatch.setattr(capture_fallback.subprocess, "run", run)


def test_a_child_that_dies_or_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    started_as(monkeypatch, "")
    assert crash_of_child([]) == ""
    started_as(monkeypatch, "import os; os.abort()")
    assert crash_of_child([]) == (
        f"a child process that tried it was killed by signal {signal.SIGABRT.value}"
    )
    started_as(monkeypatch, "import sys; print('a'); sys.exit('no such device')")
    assert crash_of_child([]) == (
        "a child process that tried it exited with status 1: no such device"
    )
    started_as(monkeypatch, "import time; time.sleep(60)")
    start = time.perf_counter()
    assert crash_of_child([], timeout=0.5) == (
        "a child process that tried it did not end within 0.5 s"
    )
    assert time.perf_counter() - start < 30


def test_the_child_gets_a_checkpoint_that_it_can_read(checkpoint: Callable[[str], Path]) -> None:
    """Here it fails for the lack of a GPU, after its imports and the config have succeeded."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = crash_of_child([str(checkpoint("qwen3")), "cuda:0", "float32", "auto", "16"])
    assert "exited with status 1" in found
    assert "cuda" in found.lower()


def test_after_a_crash_of_the_child_nothing_is_captured(
    monkeypatch: pytest.MonkeyPatch, plain_torch: None, checkpoint: Callable[[str], Path]
) -> None:
    monkeypatch.setattr(engine_module, "crash_of_hip", lambda *args: "the child died")
    expected, _, _ = tokens_and_notices(checkpoint("qwen3"), None)
    found, notices, captured = tokens_and_notices(checkpoint("qwen3"), Taping)
    assert (found, captured) == (expected, False)
    assert notices == ["decode steps are not replayed as graphs: the child died"]


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3", "phi3-longrope"])
def test_the_child_captures_as_many_kernels_as_the_engine(
    name: str, plain_torch: None, checkpoint: Callable[[str], Path]
) -> None:
    config = load_config(checkpoint(name))
    runner = small_runner(config, CPU, torch.float32, 16)
    assert runner.model is not None
    assert len(runner.model.layers) == len(config.layers)
    assert len(set(runner.model.layers)) == len(set(config.layers))
    captures: list[Taping] = []

    def taping() -> Taping:
        captures.append(Taping())
        return captures[-1]

    tokens = try_captures(runner, taping)
    assert tokens is not None
    assert len(tokens) == 4
    outside = len(config.layers) + sum(layer.sparse for layer in config.layers)
    assert captures[-1].segments == 3 * (outside + 1)
    assert try_captures(runner, Refusing) is None


def test_modes_without_effect_are_not_tried(checkpoint: Callable[[str], Path]) -> None:
    runner = small_runner(load_config(checkpoint("qwen3")), CPU, torch.float32, 16)
    assert runner.capture_modes == [CaptureMode.WHOLE, CaptureMode.PARTS]
    runner.backend = OverlappingLaunches(CPU, torch.float32)
    assert runner.capture_modes == list(CaptureMode)


def test_triton_kernels_are_launched_without_overlap_on_request() -> None:
    pytest.importorskip("triton")
    from model.ops.triton.backend import TritonBackend
    from model.ops.triton.tiles import TILES, Target

    target = Target("sm_90", 132, TILES["sm_90"])
    backend = TritonBackend(CPU, torch.bfloat16, target)
    plain = backend.without_programmatic_launch()
    assert isinstance(plain, TritonBackend)
    assert backend.target.launch_options == {"PROGRAMMATIC_LAUNCH": True, "launch_pdl": True}
    assert plain.target.launch_options == {"PROGRAMMATIC_LAUNCH": False}
    assert plain.without_programmatic_launch() is plain
    assert plain.kernels("any") == backend.kernels("any")
