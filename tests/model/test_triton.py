"""Triton kernels without a GPU: results in Triton's interpreter, code by compiling it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.ops import backend
from model.ops.backend import Backend, choose_backend

ROOT = Path(__file__).resolve().parents[2]


def test_gpus_run_the_reference_if_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    for device in ("cuda", "mps"):
        assert type(choose_backend(torch.device(device), torch.bfloat16)) is Backend


def test_a_run_on_the_cpu_does_not_import_triton_kernels() -> None:
    code = "import sys, engine, getp.cli.main; assert 'model.ops.triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "file",
    ["triton_interpreter.py", "triton_interpreter_sampling.py", "triton_interpreter_proof.py"],
)
def test_kernels_equal_their_references_in_the_interpreter(file: str) -> None:
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", f"tests/model/{file}"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-5000:]


ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx950", "gfx1201")


def test_nothing_is_tuned_while_a_job_runs() -> None:
    """Tiles come from the table; neither Triton's autotuner nor torch's is used."""
    sources = [p for folder in ("model", "engine", "getp") for p in (ROOT / folder).rglob("*.py")]
    tuners = re.compile(r"autotune|cudnn\.benchmark|tunable|torch\.compile")
    assert [p for p in sources if tuners.search(p.read_text())] == []


def waits_before_memory(ptx: str) -> bool:
    """Whether a kernel waits for the previous one exactly once, before it accesses memory.

    Prefetches are allowed before the wait, because they do not change results.
    """
    memory = (
        r"griddepcontrol\.\w+|(?<![.\w])(?:ld|st|atom|red)\.(?!param|shared)"
        r"|cp\.(?:reduce\.)?async\.(?!wait|commit|bulk\.prefetch)"
    )
    first, second, *later = re.findall(memory, ptx)
    waits = [first, second] == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    return waits and not any(word.startswith("griddepcontrol") for word in later)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_and_fit_their_targets(architecture: str) -> None:
    pytest.importorskip("triton")
    from model.ops.triton.tiles import TILES
    from tests.model.triton_compiler import LIMITS, compile_launch, launches

    chosen = launches(architecture)
    # Either every launch may start early, or none.
    assert {dict(x.options).get("launch_pdl", False) for x in chosen} == {
        TILES[architecture].programmatic_launch
    }
    experts = [dict(x.constants) for x in chosen if x.kernel.__name__ == "experts_gate_up"]
    assert {(x["PACKED"], x["BLOCK_M"]) for x in experts} == {
        (packed, tile.m)
        for packed, choices in enumerate((TILES[architecture].experts, TILES[architecture].mxfp4))
        for tile in choices
    }
    for launch in chosen:
        compiled = compile_launch(launch, architecture)
        assert compiled.shared <= LIMITS[architecture], f"{launch}: {compiled.shared} bytes"
        assert not compiled.spills, f"{launch}: {compiled.spills} spilled"
        if TILES[architecture].programmatic_launch:
            assert waits_before_memory(compiled.binary.asm["ptx"]), str(launch)
        named = dict(launch.constants)
        if named.get("PACKED") and architecture == "sm_90":
            waits = re.findall(
                r"wgmma\.wait_group\.sync\.aligned (\d+)", compiled.binary.asm["ptx"]
            )
            assert set(waits) == {"0"}, f"{launch}: weights are overwritten during the product"
        if launch.kernel.__name__ == "decode_attention" and architecture.startswith("sm_"):
            # Room for two tiles of keys and values: the next is loaded while one is used.
            assert compiled.shared >= 2 * 2 * 2 * named["BLOCK_N"] * named["BLOCK_D"], str(launch)


def test_kernels_are_compiled_for_every_architecture_with_tiles() -> None:
    pytest.importorskip("triton")
    from model.ops.triton.tiles import TILES

    assert set(TILES) == set(ARCHITECTURES)
