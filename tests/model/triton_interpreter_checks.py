"""Faults in kernels, found by the check of kernels in Triton's interpreter.

pytest does not collect this file by its name: test_triton.py runs it in a separate process.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Engine, EngineConfig, Request, SamplingParams
from engine import kernels as engine_kernels
from engine.execution import model_runner
from model import load_config
from model.checks import OPERATIONS, kernel_cache
from model.checks.verify import Kernels, Timing, Verifier, measure, verify
from model.ops.backend import Backend
from model.ops.cpu.backend import CpuBackend
from model.ops.triton import attention, experts, linear, norm, rotary, route, sampling
from model.ops.triton.backend import TritonBackend
from model.ops.triton.kernels import embedding
from model.ops.triton.recurrent import convolution, delta_rule
from model.ops.triton.selection import TORCH, Selection, candidates, describe
from model.ops.triton.tiles import TILES, Target, Tile, target_of
from tests.checkpoints import write_checkpoint, write_mxfp4_pair
from tests.model.ops_helpers import CPU

ONE_ROW = Tile(1, 4, 32, 4, 1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("checkpoint") / name
            if name == "mxfp4":
                write_mxfp4_pair(made[name], made[name].with_name("dense"))
            else:
                write_checkpoint(made[name], name)
        return made[name]

    return write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "getp" / "kernels.json"


def kernels(**tiles: Any) -> TritonBackend:
    """The kernels, with a kernel for a single row and fusions."""
    target = target_of(CPU)
    tiles = {"one_row": ONE_ROW, "fused_qkv": 1, "fused_gate_up": 1, **tiles}
    return TritonBackend(CPU, torch.float32, replace(target, tiles=replace(target.tiles, **tiles)))


class Changed:
    """A kernel whose launches get other constants."""

    def __init__(self, kernel: Any, change: Callable[[dict[str, Any]], None]):
        self._kernel, self._change = kernel, change

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            self._change(options)
            return self._kernel[grid](*args, **options)

        return launch


class Missing:
    """A kernel that is launched with fewer programs."""

    def __init__(self, kernel: Any):
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._kernel[(max(1, grid[0] - 1),) + grid[1:]]  # noqa: RUF005 - mypy


def setting(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda options: options.update(values)


def scaled(name: str, factor: float) -> Callable[[dict[str, Any]], None]:
    return lambda options: options.update({name: options[name] * factor})


# (operation, module and name of the launched kernel, what is wrong with its launches)
FAULTS: list[tuple[str, Any, str, Callable[[Any], Any]]] = [
    ("embed", embedding, "_embed", Missing),
    ("add_rms_norm", norm, "_add_rms_norm", lambda k: Changed(k, setting(BLOCK=32))),
    ("activate", norm, "_activate", lambda k: Changed(k, setting(LIMIT=1.0))),
    ("rotate_and_write", rotary, "_rotate_and_write", lambda k: Changed(k, setting(HALF=4))),
    ("linear", linear, "fused_linear", lambda k: Changed(k, setting(BIAS=False))),
    ("logits", linear, "fused_linear", Missing),
    ("norm_mlp", linear, "fused_linear", lambda k: Changed(k, setting(PARTS=0))),
    ("attention", attention, "decode_attention", lambda k: Changed(k, setting(WINDOW=None))),
    ("attention", attention, "decode_attention", lambda k: Changed(k, setting(SINKS=False))),
    ("attention", attention, "decode_attention", lambda k: Changed(k, scaled("SCALE", 1.1))),
    ("attention", attention, "prefill_attention", lambda k: Changed(k, setting(SINKS=False))),
    ("attention", attention, "prefill_attention", lambda k: Changed(k, setting(WINDOW=None))),
    ("attention", attention, "prefill_attention", Missing),
    ("route", route, "_route", lambda k: Changed(k, setting(AFTER_TOP_K=False, NORMALIZE=False))),
    ("experts", experts, "experts_gate_up", lambda k: Changed(k, setting(LIMIT=None))),
    ("experts", experts, "experts_down", lambda k: Changed(k, setting(BIAS=False))),
    ("experts", experts, "sum_experts", Missing),
    ("sample_rows", sampling, "choose_tokens", Missing),
    ("causal_conv", convolution, "_causal_conv", lambda k: Changed(k, setting(BLOCK_C=32))),
    ("delta_rule", delta_rule, "_single_token", lambda k: Changed(k, setting(BLOCK_V=16))),
    ("delta_rule", delta_rule, "_chunks", lambda k: Changed(k, setting(BLOCK_K=8))),
    ("gated_norm", convolution, "_gated_norm", Missing),
]
FAMILIES = {"activate": "qwen3_moe", "norm_mlp": "qwen3_moe"}
FAMILIES |= dict.fromkeys(("causal_conv", "delta_rule", "gated_norm"), "qwen3_5_text")


def verifier_of(path: Path, backend: TritonBackend, capture: Any = None) -> Verifier:
    return Verifier(backend, load_config(path), capture=capture)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}-{fault[2]}")
def test_a_fault_is_found_and_plain_torch_serves_instead(
    fault: tuple[str, Any, str, Callable[[Any], Any]],
    folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    op, module, name, change = fault
    path = folder(FAMILIES.get(op, "gpt_oss-wide"))
    monkeypatch.setattr(module, name, change(getattr(module, name)))
    monkeypatch.setattr("model.checks.verify.OPERATIONS", (op,))
    found = verify(verifier_of(path, kernels()))
    assert found.choices.keys() == found.replaced.keys() == {op}
    # Other tiles do not help against these faults, but the library or no fusion does.
    assert found.choices[op] in (TORCH, {"one_row": None}, {"fused_gate_up": 0})
    verifier = verifier_of(path, kernels())
    assert verifier.problem(verifier.cases(op), {}) is not None
    assert verifier.problem(verifier.cases(op), found.choices) is None


def test_nothing_is_replaced_where_every_kernel_is_right(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Sampling takes half a minute, and the interpreter compares it in a file of its own.
    slow = "sample_rows"
    monkeypatch.setattr(
        "model.checks.verify.OPERATIONS", tuple(op for op in OPERATIONS if op != slow)
    )
    captured = []

    def capture(call: Callable[[], Any]) -> Callable[[], Any]:
        captured.append(call)
        return call

    found = verify(verifier_of(folder("gpt_oss-wide"), kernels(), capture))
    assert found == Kernels()
    assert captured  # and the replays were compared as well


def test_a_tile_that_the_device_refuses_is_replaced_by_the_next_that_it_takes(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by torch: a candidate with a smaller tile compiles."""

    def refuse(options: dict[str, Any]) -> None:
        if options["BLOCK_N"] > 32:
            raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    verifier = verifier_of(folder("gpt_oss-wide"), kernels(decode=Tile(16, 64, 0, 4, 5)))
    monkeypatch.setattr("model.checks.verify.OPERATIONS", ("attention",))
    monkeypatch.setattr(attention, "for_dtype", lambda tile, dtype: tile)
    monkeypatch.setattr(attention, "decode_attention", Changed(attention.decode_attention, refuse))
    found = verify(verifier)
    assert found.choices == {
        "attention": {"decode": {"m": 16, "n": 16, "k": 0, "warps": 1, "stages": 5}}
    }
    assert found.replaced == {
        "attention": "one token, window 20: RuntimeError: out of resource: shared memory"
    }


def test_a_kernel_that_cannot_be_captured_or_replays_wrongly_is_replaced(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.checks.verify.OPERATIONS", ("linear",))

    def refuse(call: Callable[[], Any]) -> Callable[[], Any]:
        raise RuntimeError("operation not permitted when stream is capturing")

    def forget(call: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: tuple(torch.zeros_like(one) for one in call())

    path = folder("gpt_oss-wide")
    for capture, words in ((refuse, "not permitted when stream"), (forget, "replayed: result 0")):
        found = verify(verifier_of(path, kernels(), capture))
        assert found.choices == {"linear": TORCH}
        assert words in found.replaced["linear"]


def test_choices_of_a_journal_come_before_the_table_if_they_are_right(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.checks.verify.OPERATIONS", ("linear", "activate"))
    verifier = verifier_of(folder("qwen3_moe"), kernels())
    preferred = {"linear": {"one_row": None}, "activate": TORCH}
    assert verify(verifier, preferred) == Kernels(preferred)
    monkeypatch.setattr(linear, "fused_linear", Missing(linear.fused_linear))
    found = verify(verifier, {"linear": {"one_row": {**_json(ONE_ROW), "n": 8}}})
    assert found.choices == {"linear": {"one_row": None}}
    with pytest.raises(ValueError, match="is not a choice of kernels"):
        verify(verifier, {"linear": {"two_rows": 1}})


def _json(tile: Tile) -> dict[str, Any]:
    choice: Any = {
        "one_row": {name: getattr(tile, name) for name in ("m", "n", "k", "warps", "stages")}
    }
    return dict(choice["one_row"])


class Timed(TritonBackend):
    """The kernels, with a clock that each call of `linear` for one row moves on."""

    now = 0.0
    seconds: Callable[[Any], float] = staticmethod(lambda tile: 1.0)

    def linear(self, x: torch.Tensor, linear: Any) -> torch.Tensor:
        Timed.now += type(self).seconds(self._target("linear").tiles.one_row)
        return super().linear(x, linear)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda tile: 1.0 if tile == ONE_ROW else 0.98, {}),  # within the margin of noise
        (lambda tile: 1.0 if tile else 0.9, {"linear": {"one_row": None}}),
        (
            lambda tile: {None: 0.9, 4: 1.0, 8: 0.8}[tile and tile.n],
            {"linear": {"one_row": {"m": 1, "n": 8, "k": 512, "warps": 4, "stages": 1}}},
        ),
    ],
)
def test_the_fastest_candidate_is_kept_if_it_is_faster_by_a_margin(
    seconds: Callable[[Any], float],
    expected: dict[str, Any],
    folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("model.checks.verify.MEASURED", ("linear",))
    monkeypatch.setattr(Timed, "seconds", staticmethod(seconds))
    monkeypatch.setattr(Timed, "now", 0.0)
    backend = Timed(CPU, torch.float32, kernels().target)
    verifier = verifier_of(folder("gpt_oss-wide"), backend)
    found = measure(verifier, Kernels(), Timing(lambda: Timed.now, budget_s=1e9))
    assert found == Kernels(expected, measured=("linear",))
    # Without time left, everything stays as it is and can be measured in a later job.
    Timed.now = 0.0
    assert measure(verifier, Kernels(), Timing(lambda: Timed.now, budget_s=0)) == Kernels()


@pytest.mark.parametrize("architecture", sorted(TILES))
def test_every_candidate_is_a_selection_as_json(architecture: str) -> None:
    target = Target(architecture, 100, TILES[architecture])
    for op in ("linear", "logits", "norm_qkv", "norm_mlp", "attention", "experts", "route"):
        *found, last = candidates(op, target)
        assert last == TORCH
        for choice in found:
            stored = json.loads(json.dumps(choice))
            changed = Selection({op: stored}).target(op, target)
            assert changed.tiles != target.tiles
            assert changed == Selection({op: choice}).target(op, target)
            assert describe(op, stored).startswith(f"{op}: ")
    wrong: Any
    for wrong in ({"fused": {"m": 1}}, {"decode": None}, {"short": True}, {"experts": []}, 3, None):
        with pytest.raises(ValueError, match="linear"):
            Selection({"linear": wrong})
    for op in ("liner", "kernels"):  # no operation, and a method that is none
        with pytest.raises(ValueError, match=op):
            Selection({op: TORCH})


def engine_with(
    backend: Backend, path: Path, patch: pytest.MonkeyPatch, **settings: Any
) -> tuple[Engine, list[str]]:
    """An engine that runs and checks the kernels in the interpreter; its notices."""
    patch.setattr(model_runner, "choose_backend", lambda *_: backend)
    # It is about the device, a CPU, and not about the backend.
    patch.setattr("engine.engine.conversion_notice", lambda *_: "")
    notices: list[str] = []
    config = EngineConfig(dtype="float32", kv_memory=1 << 20, max_batch_tokens=64, **settings)
    engine = Engine(path, config, notice=notices.append)
    engine.checks_kernels = not config.trust_kernels
    return engine, notices


def tokens_of(engine: Engine) -> dict[Any, list[int]]:
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    requests = [Request([7, 3, 9, 4], params, 0), Request([5, 6], params, 1)]
    with engine:
        return {c.request_id: list(c.token_ids) for c in engine.generate(requests)}


def test_an_engine_with_wrong_kernels_gives_the_tokens_of_a_cpu(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """Experts in MXFP4 become torch's, with their storage; attention gets a smaller tile."""
    path = folder("mxfp4")
    expected = tokens_of(engine_with(CpuBackend(CPU, torch.float32), path, monkeypatch)[0])
    monkeypatch.setattr(experts, "experts_down", Changed(experts.experts_down, setting(BIAS=False)))
    names = ("linear", "attention", "experts")
    monkeypatch.setattr("model.checks.verify.OPERATIONS", names)
    trusting, notices = engine_with(kernels(), path, monkeypatch, trust_kernels=True)
    assert tokens_of(trusting) != expected  # the fault matters
    assert notices == []
    engine, notices = engine_with(kernels(), path, monkeypatch)
    assert tokens_of(engine) == expected
    assert len(notices) == 1
    assert notices[0].startswith("the kernel of experts failed its check on this GPU (")
    assert notices[0].endswith("; used instead: plain torch")
    assert engine.rounding["kernel choices"] == {"experts": TORCH}
    (named,) = engine.summary().kernels
    assert named.startswith("experts: plain torch (instead of one that failed: ")
    # The next engine takes the result from the disk, and says the same.
    monkeypatch.setattr(engine_kernels, "verify", None)
    again, repeated = engine_with(kernels(), path, monkeypatch)
    assert again.rounding == engine.rounding
    assert repeated == notices


def test_the_cache_is_for_one_driver_and_ignored_if_damaged(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    runs: list[Mapping[str, Any] | None] = []

    def fake_verify(verifier: Verifier, preferred: Mapping[str, Any] | None = None) -> Kernels:
        runs.append(preferred)
        return Kernels(preferred or {})

    monkeypatch.setattr(engine_kernels, "verify", fake_verify)
    path = folder("gpt_oss-wide")

    def settle(preferred: Mapping[str, Any] | None = None) -> dict[str, Any]:
        engine, _ = engine_with(kernels(), path, monkeypatch)
        engine.choose_kernels(preferred)
        return engine.rounding

    settle()
    settle()
    settle({})  # a resumed job whose journal names the defaults
    assert runs == [None]
    monkeypatch.setattr(kernel_cache, "driver_version", lambda: "NVRM version: 999")
    settle()
    assert runs == [None, None]
    for damage in (
        "{",
        "[]",
        cache.read_text().replace('"choices": {}', '"choices": {"linear": 3}'),
    ):
        cache.write_text(damage)
        settle()
    assert runs == [None] * 5
    chosen = {"linear": {"one_row": None}}
    assert settle(chosen)["kernel choices"] == chosen
    assert runs[5:] == [chosen]
    assert "kernel choices" not in settle()  # the job's choices are not those of the device
    # Choices of another version: the job says that its rounding would change.
    assert "kernel choices" not in settle({"linear": {"two_rows": 1}})
    assert len(runs) == 6


def test_candidates_are_timed_for_long_jobs_only(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    faster = Kernels({"linear": {"one_row": None}}, measured=("linear",))
    monkeypatch.setattr(engine_kernels, "verify", lambda *_: Kernels())
    monkeypatch.setattr(engine_kernels, "measure", lambda *_: faster)
    path = folder("gpt_oss-wide")
    for preferred, expected_s, choices in (
        (None, None, {}),
        (None, 59.0, {}),
        ({}, 600.0, {}),  # resumed with the defaults
        (None, 60.0, faster.choices),
        (None, 1.0, faster.choices),  # from the disk
    ):
        engine, _ = engine_with(kernels(), path, monkeypatch)
        engine.choose_kernels(preferred, expected_s)
        assert engine.kernels.choices == choices
    assert engine.summary().kernels == ("linear: one row off",)
