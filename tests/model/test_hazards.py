"""Each check of `hazards.py` finds its hazard in a kernel that was compiled to have it."""

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl

from model.cost.known_models import named_config
from tests.model.hazards import hazards
from tests.model.machine_code import Instruction, disassemble
from tests.model.triton_compiler import Launch, compile_launch, launches


@triton.jit
def _reads_early(x_ptr, out_ptr):
    x = tl.load(x_ptr)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    tl.store(out_ptr, x)


@triton.jit
def _waits_on_one_path(x_ptr, out_ptr, rows):
    if tl.program_id(0) < rows:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
        tl.store(out_ptr, tl.load(x_ptr))


@triton.jit
def _product(x_ptr, w_ptr, out_ptr, K, BLOCK: tl.constexpr):
    at, k = tl.arange(0, BLOCK), tl.arange(0, 64)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, K, 64):
        x = tl.load(x_ptr + at[:, None] * K + first + k[None, :])
        w = tl.load(w_ptr + at[None, :] * K + first + k[:, None])
        total = tl.dot(x, w, total)
    tl.store(out_ptr + at[:, None] * BLOCK + at[None, :], total)


def _hazards(launch: Launch, architecture: str) -> list[str]:
    compiled = compile_launch(launch, architecture)
    (code,) = disassemble([compiled.code], architecture)
    return hazards(code, dict(launch.options))


def _launch(kernel: Any, types: dict[str, str], **options: int) -> Launch:
    constants = (("BLOCK", 256),) if "BLOCK" in types else ()
    aligned = tuple(i for i, kind in enumerate(types.values()) if kind != "constexpr")
    return Launch(kernel, tuple(types.items()), constants, aligned, tuple(options.items()))


def test_weights_overwritten_during_a_product_are_found() -> None:
    """The wait in `mxfp4.multiply` is left out for other vendors than NVIDIA."""
    guarded = next(
        x
        for x in launches("sm_90", (named_config("gpt-oss-20b"),), (1,))
        if x.kernel.__name__ == "experts_down" and dict(x.constants)["RUN"]
    )
    constants = {**dict(guarded.constants), "VENDOR": "none"}
    unguarded = replace(guarded, constants=tuple(constants.items()))
    assert not _hazards(guarded, "sm_90")
    assert "writes" in _hazards(unguarded, "sm_90")[0]


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", [_reads_early, _waits_on_one_path])
def test_memory_access_before_the_previous_kernel_has_ended_is_found(
    kernel: Any, architecture: str
) -> None:
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "rows": "i32"}
    names = {name: types[name] for name in kernel.arg_names}
    assert _hazards(_launch(kernel, names, num_warps=4, launch_pdl=1), architecture)


def test_warps_that_alternate_are_found() -> None:
    types = {
        "x_ptr": "*bf16",
        "w_ptr": "*bf16",
        "out_ptr": "*fp32",
        "K": "i32",
        "BLOCK": "constexpr",
    }
    launch = _launch(_product, types, num_warps=8, num_stages=2)
    assert any("s_setprio" in x for x in _hazards(launch, "gfx942"))


def _code(*lines: str) -> list[Instruction]:
    """Lines of SASS; a jump names the index of its target."""
    code = []
    for line in lines:
        predicate, _, rest = (
            line.rpartition("@")[2].partition(" ") if "@" in line else ("", "", line)
        )
        name, _, operands = rest.partition(" ")
        target = int(operands) if name == "BRA" else None
        code.append(Instruction(name, operands, target, predicate))
    return code


_PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR4].tnspB, R24, gsb0"


@pytest.mark.parametrize(
    ("lines", "writes"),
    [
        ((_PRODUCT, "MOV R123, R0", "EXIT"), 1),
        ((_PRODUCT, "MOV R124, R0", "EXIT"), 0),
        ((_PRODUCT, "LDS.128 R118, [R2]", "EXIT"), 1),
        ((_PRODUCT, "STS.128 [R120], R120", "EXIT"), 0),
        ((_PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R120, R0", "EXIT"), 0),
        ((_PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R120, R0", "EXIT"), 1),
        # The second group may still run, the first may not.
        (
            (
                _PRODUCT,
                _PRODUCT.replace("R120", "R8"),
                "WARPGROUP.DEPBAR.LE gsb0, 0x1",
                "MOV R120, R0",
                "MOV R8, R0",
                "EXIT",
            ),
            1,
        ),
        # The product of one iteration reads what the next iteration writes.
        (("MOV R120, R0", _PRODUCT, "@P0 BRA 0", "EXIT"), 1),
        (("MOV R120, R0", _PRODUCT, "BRA 4", "MOV R120, R0", "EXIT"), 0),
    ],
)
def test_a_product_reads_its_registers_until_its_group_is_waited_for(
    lines: tuple[str, ...], writes: int
) -> None:
    assert len(hazards(_code(*lines), {})) == writes
