"""Triton kernels without a GPU: results in Triton's interpreter, code by compiling it."""

import os
import re
import subprocess
import sys
from dataclasses import replace
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
    [
        "triton_interpreter.py",
        "triton_interpreter_sampling.py",
        "triton_interpreter_checks.py",
        "triton_interpreter_faults.py",
        "triton_interpreter_recurrent.py",
        "triton_interpreter_quantized.py",
    ],
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
# Their kernels with tiles are compiled, for a few models; the others, and all weights in other
# formats, have nearly the same code as those of an architecture above.
SIMILAR_ARCHITECTURES = ("sm_86", "sm_89", "sm_103", "sm_120", "gfx1100", "gfx1151")
# Of those with the same tiles as one before them, a launch of each kernel is compiled.
SAME_TILES = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_103": "sm_100", "gfx1151": "gfx1100"}


def test_nothing_is_tuned_while_a_job_runs() -> None:
    """Tiles come from the table; neither Triton's autotuner nor torch's is used."""
    sources = [p for folder in ("model", "engine", "getp") for p in (ROOT / folder).rglob("*.py")]
    tuners = re.compile(r"autotune|cudnn\.benchmark|tunable|torch\.compile")
    assert [p for p in sources if tuners.search(p.read_text())] == []


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx90a", "gfx942", "gfx1201"])
def test_kernels_of_recurrent_layers_compile_and_fit_their_targets(architecture: str) -> None:
    pytest.importorskip("triton")
    from model.ops.triton.tiles import TILES
    from tests.model.compiled_kernels import compiled
    from tests.model.triton_compiler import recurrent_launches

    launches = recurrent_launches(architecture)
    assert {launch.kernel.__name__ for launch in launches} == {
        *("_causal_conv", "_single_token", "_chunks", "_gated_norm", "_output_gate")
    }
    for launch in launches:
        options = dict(launch.options)
        assert options.get("launch_pdl", False) == TILES[architecture].programmatic_launch
    compiled(launches, architecture)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *SIMILAR_ARCHITECTURES])
def test_kernels_compile_and_fit_their_targets(architecture: str) -> None:
    pytest.importorskip("triton")
    from model.ops.triton.tiles import TILES
    from tests.model.compiled_kernels import compiled
    from tests.model.machine_code import innermost_loop
    from tests.model.triton_compiler import FEW_CONFIGS, FEW_ROWS, launches

    if architecture in ARCHITECTURES:
        chosen = launches(architecture)
    else:
        chosen = launches(architecture, FEW_CONFIGS, FEW_ROWS)
        chosen = [launch for launch in chosen if launch.is_tiled]
    if architecture in SAME_TILES:
        assert TILES[architecture] == TILES[SAME_TILES[architecture]]
        chosen = list({launch.kernel: launch for launch in chosen}.values())
    # Either every launch may start early, or none.
    assert {dict(x.options).get("launch_pdl", False) for x in chosen} == {
        TILES[architecture].programmatic_launch
    }
    tiles = TILES[architecture]
    for name, packed in (
        ("experts_gate_up", tiles.mxfp4_gate_up),
        ("experts_down", tiles.mxfp4_down),
    ):
        experts = [dict(x.constants) for x in chosen if x.kernel.__name__ == name]
        found = {(bool(x["RUN"]), x["BLOCK_M"], x["BLOCK_N"]) for x in experts}
        dense = {(False, tile.m, tile.n) for tile in tiles.experts}
        every = dense | {(True, tile.m, tile.n) for tile in packed}
        assert found == every or (architecture in SAME_TILES and found < every)
    for launch, kernel, code in compiled(chosen, architecture):
        named = dict(launch.constants)
        if launch.kernel.__name__ == "decode_attention" and architecture.startswith("sm_"):
            # Room for two tiles of keys and values: the next is loaded while one is used.
            assert kernel.shared >= 2 * 2 * 2 * named["BLOCK_N"] * named["BLOCK_D"], str(launch)
        if named.get("RUN") and named["BLOCK_M"] == 16 and architecture.startswith("gfx9"):
            # Lanes load the packed weights that they need: only x passes through shared memory.
            threads = 64 * dict(launch.options)["num_warps"]
            stored = threads * sum(x.shared_bytes for x in innermost_loop(code))
            assert stored <= 2 * named["BLOCK_M"] * named["BLOCK_K"], str(launch)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_with_packed_weights_compile_and_fit_their_targets(architecture: str) -> None:
    """The highest tiles, which need the most registers; the others are like those of MXFP4.

    FP8 in blocks takes more of them than by channels.
    """
    pytest.importorskip("triton")
    from tests.model.compiled_kernels import compiled
    from tests.model.triton_compiler import CONFIGS, QUANTIZED, quantized_launches

    four_bits, _, _, _, blocks = QUANTIZED
    launches = quantized_launches(architecture, [four_bits, blocks], [1024], [CONFIGS[2]])
    if architecture in ("sm_90", "gfx942"):  # experts and few rows
        launches += quantized_launches(architecture, [blocks], [1], [CONFIGS[4]])
    if architecture in ("sm_100", "gfx942", "gfx950"):  # loops over few groups are unrolled
        launches += quantized_launches(architecture, [blocks], [512, 4096], [CONFIGS[4]])
    has_float8 = any(architecture in each for each in FP8.values())
    kinds = {dict(launch.constants).get("KIND") for launch in launches} - {None}
    assert kinds == {"int4", "fp8x8" if has_float8 else "fp8"}
    compiled(launches, architecture)


def test_formats_that_do_not_fit_the_sizes_of_a_model_have_no_launches() -> None:
    pytest.importorskip("triton")
    from tests.model.triton_compiler import CONFIGS, QUANTIZED, quantized_launches

    assert CONFIGS[0].hidden_size == 2880  # no multiple of 64
    counts = [len(quantized_launches("sm_90", [form], [1], CONFIGS[:1])) for form in QUANTIZED]
    assert counts[0] > 0
    assert 0 in counts


FP8 = {
    "*fp8e4nv": {"sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx950", "gfx1201"},
    "*fp8e4b8": {"gfx942"},
}


@pytest.mark.parametrize("form", FP8)
def test_kernels_of_a_cache_in_fp8_compile_where_the_hardware_has_the_form(form: str) -> None:
    pytest.importorskip("triton")
    from tests.model.compiled_kernels import compiled
    from tests.model.triton_compiler import fp8_launches

    for architecture in sorted(FP8[form] - {"sm_89", "sm_103"}):  # like sm_90 and sm_100
        launches = fp8_launches(architecture)
        assert {launch.kernel.__name__ for launch in launches} >= {
            "_rotate_and_write", "decode_attention", "prefill_attention",
        }  # fmt: skip
        assert all(form in dict(launch.types).values() for launch in launches)
        compiled(launches, architecture)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *SIMILAR_ARCHITECTURES])
def test_what_the_hardware_lacks_for_a_cache_in_8_bits_is_refused(architecture: str) -> None:
    pytest.importorskip("triton")
    from model.ops.backend import KvDtypeError
    from model.ops.triton.backend import TritonBackend
    from model.ops.triton.tiles import Target, nearest_tiles

    target = Target(architecture, 132, nearest_tiles(architecture))
    meta = torch.device("meta")
    with pytest.raises(KvDtypeError, match="int8"):
        TritonBackend(meta, torch.bfloat16, target, kv_dtype="int8")
    if any(architecture in each for each in FP8.values()):
        assert TritonBackend(meta, torch.bfloat16, target, kv_dtype="fp8").kv_dtype == target.fp8
    else:
        with pytest.raises(KvDtypeError, match=f"{architecture} has no fp8"):
            TritonBackend(meta, torch.bfloat16, target, kv_dtype="fp8")


def test_kernels_are_compiled_for_every_architecture_with_tiles() -> None:
    pytest.importorskip("triton")
    from model.ops.triton.tiles import TILES

    assert set(TILES) == {*ARCHITECTURES, *SIMILAR_ARCHITECTURES}


@pytest.mark.parametrize(
    ("architecture", "nearest"),
    [
        ("sm_87", "sm_86"),
        ("sm_110", "sm_103"),
        ("sm_121", "sm_120"),
        ("sm_130", "sm_120"),  # after all that are known
        ("gfx940", "gfx90a"),
        ("gfx1102", "gfx1100"),
        ("gfx1200", "gfx1151"),
        ("gfx1250", "gfx1201"),
    ],
)
def test_an_unknown_architecture_uses_the_tiles_of_the_nearest_older_one(
    architecture: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from model.ops.triton import tiles

    marked = {x: replace(y, short=i) for i, (x, y) in enumerate(tiles.TILES.items())}
    monkeypatch.setattr(tiles, "TILES", marked)
    assert tiles.nearest_tiles(architecture) == marked[nearest]


@pytest.mark.parametrize("architecture", ["sm_75", "gfx906", "gfx1030"])
def test_an_architecture_older_than_all_known_ones_uses_the_smallest_tiles(
    architecture: str,
) -> None:
    pytest.importorskip("triton")
    from model.ops.triton.tiles import nearest_tiles, target_of

    assert nearest_tiles(architecture) == target_of(torch.device("cpu")).tiles


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_grids_of_large_steps_are_within_the_limits_of_y_and_z(architecture: str) -> None:
    pytest.importorskip("triton")
    from tests.model.triton_compiler import CONFIGS, grids

    large = {
        (kernel, grid)
        for kernel, grid in grids(architecture, CONFIGS, 65_536)
        if max((*grid, 1, 1)[1:]) > 65_535
    }
    assert not large
