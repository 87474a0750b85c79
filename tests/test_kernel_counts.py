"""The counts of compiled kernels that `benchmarks/kernel_counts.py` prints."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

pytest.importorskip("triton")

from click.testing import CliRunner

from benchmarks import kernel_counts
from benchmarks.compiled_kernels import Kernel
from benchmarks.kernel_counts import count, main
from tests.model.machine_code import disassemble
from tests.model.occupancy import PROCESSORS

ROOT = Path(__file__).resolve().parent.parent
_LOOP = """
kernel:
	s_load_dwordx2 s[0:1], s[2:3], 0x0      ; a comment
.LBB0_1:
	buffer_load_ushort v1, v2, s[0:3], 0
.LBB0_2:
	global_load_dwordx4 v[4:7], v[2:3], off
	v_mfma_f32_16x16x16_bf16 v[8:11], v[4:5], v[6:7], 0
	s_barrier
	s_cbranch_scc1 .LBB0_2
	s_cbranch_scc1 .LBB0_1
	s_endpgm
	.section	.rodata
"""


def test_the_innermost_loop_is_counted_apart() -> None:
    kernel = Kernel("config", 1, "kernel", 1, "", 4, 130, 0, 16 << 10, _LOOP)
    (code,) = disassemble([_LOOP], "gfx942")
    values = count(kernel, code, "gfx942").values
    assert values == ("130", "0", "16384", "3", "8/4", "1/1", "1x16 1x2 / 1x16", "1/1")


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 168, 0, 8, 1),  # CUDA's occupancy calculator: 12 warps of 168 registers
        ("sm_90", 128, 0, 8, 2),
        ("sm_90", 32, 0, 2, 32),
        ("sm_90", 32, 74 << 10, 4, 3),
        ("sm_86", 32, 0, 1, 16),
        ("gfx942", 128, 0, 4, 4),
        ("gfx942", 129, 0, 4, 3),
        ("gfx942", 64, 33 << 10, 4, 1),
        ("gfx1100", 97, 0, 4, 12),  # 1536 / 120 waves a SIMD
    ],
)
def test_programs_at_once_are_limited_by_registers_shared_memory_and_warps(
    architecture: str, registers: int, shared: int, warps: int, programs: int
) -> None:
    assert PROCESSORS[architecture].programs_at_once(registers, shared, warps) == programs


def test_only_kernels_that_differ_from_another_revision_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("model", "tests/model"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "tests" / "__init__.py", tmp_path / "tests")
    monkeypatch.setattr(kernel_counts, "_worktree", lambda _: nullcontext(tmp_path))
    source = tmp_path / "model" / "ops" / "triton" / "norm.py"
    source.write_text(source.read_text().replace("gate * tl.sigmoid(gate)", "gate"))
    arguments = "sm_90 --only activate --config qwen2-0.5b --rows 64 --against HEAD"
    output = CliRunner().invoke(main, arguments.split()).output
    lines = [line.split()[:2] for line in output.splitlines() if line.startswith(" _")]
    assert lines == [["_activate", "before"], ["_activate", "after"]]
