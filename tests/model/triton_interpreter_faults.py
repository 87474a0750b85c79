"""A fault in any kernel is found by the check of kernels, in Triton's interpreter.

The faults of triton_interpreter_checks.py, which also looks at what serves instead, and those here
are of all kernels there are. pytest does not collect this file by its name: test_triton.py runs it
in a separate process.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_sections.quantized import with_weights
from model import load_config
from model.checks import cases, problem, reference_of
from model.config import ModelConfig
from model.formats.float8 import FP8
from model.formats.integers import Integers
from model.ops.triton import fused, norm, rotary, route, sampling, sort_by_expert
from model.ops.triton.backend import TritonBackend
from model.ops.triton.quantized import linear as quantized
from model.ops.triton.recurrent import convolution
from model.ops.triton.tiles import target_of
from tests.checkpoints import write_checkpoint
from tests.model import triton_interpreter_checks as checks
from tests.model.ops_helpers import CPU
from tests.model.triton_interpreter_checks import Changed, Missing, setting

ROOT = Path(__file__).resolve().parents[2]


class Altered:
    """A kernel after whose launches an argument is changed."""

    def __init__(self, kernel: Any, number: int, change: Callable[[torch.Tensor], torch.Tensor]):
        self._kernel, self._number, self._change = kernel, number, change

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> None:
            self._kernel[grid](*args, **options)
            args[self._number].copy_(self._change(args[self._number].clone()))

        return launch


def zeroed(number: int) -> Callable[[Any], Any]:
    return lambda kernel: Altered(kernel, number, torch.zeros_like)


def flipped(number: int) -> Callable[[Any], Any]:
    return lambda kernel: Altered(kernel, number, lambda x: x.flip(0))


def without_zeros(kernel: Any) -> Any:
    return Changed(kernel, setting(ZEROS=False))


def kernels() -> TritonBackend:
    target = target_of(CPU)
    fusing = replace(target, tiles=replace(target.tiles, fused_mlp=8))
    return TritonBackend(CPU, torch.float32, fusing)


# (operation, family, module and name of the launched kernel, what is wrong with its launches)
FAULTS: list[tuple[str, str, Any, str, Callable[[Any], Any]]] = [
    ("experts", "qwen3_moe", sort_by_expert, "_count_by_expert", zeroed(1)),
    ("experts", "gpt_oss-wide", sort_by_expert, "_sort_by_expert", flipped(2)),
    ("norm_experts", "gpt_oss-wide", route, "_route_and_sort", flipped(4)),
    ("norm_mlp", "qwen2", fused, "_norm_mlp", Missing),
    ("norm_mlp", "qwen2", fused, "_sum_mlp_slices", Missing),
    ("add_gated", "qwen2_moe", norm, "_add_gated", Missing),
    ("scaled_sum", "gemma4_text-shared-wide", norm, "_scaled_sum", Missing),
    ("output_gate", "qwen3_5_text", convolution, "_output_gate", Missing),
    ("rotate_and_write", "olmo2-wide", rotary, "_norm_all_heads", Missing),
    ("latent_query", "deepseek_v3-wide", rotary, "_write_latents", Missing),
    ("adjust_logits", "qwen2", sampling, "add_biases", Missing),
    ("adjust_logits", "qwen2", sampling, "apply_penalties", Missing),
    ("adjust_logits", "qwen2", sampling, "apply_min_p", Missing),
    ("sample_rows", "qwen2", sampling, "summarize_blocks", Missing),
    ("sample_rows", "qwen2", sampling, "list_candidates", zeroed(8)),
    ("linear", "qwen2 in 4 bits", quantized, "quantized_product", without_zeros),
    ("linear", "qwen2 in 8 bits", quantized, "quantize_rows", Missing),
]
FORMS = {"qwen2 in 4 bits": Integers(4, 32, True, quantizes=False), "qwen2 in 8 bits": FP8}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelConfig]:
    def config_of(name: str) -> ModelConfig:
        folder = tmp_path_factory.mktemp("checkpoint")
        write_checkpoint(folder, name.split()[0])
        config = load_config(folder)
        return with_weights(config, FORMS[name]) if name in FORMS else config

    return config_of


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[3])
def test_a_fault_is_found(
    fault: tuple[str, str, Any, str, Callable[[Any], Any]],
    configs: Callable[[str], ModelConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    op, family, module, name, change = fault
    backend = kernels()
    monkeypatch.setattr(sort_by_expert, "_CHUNK", 1)  # so that one token is several chunks
    monkeypatch.setattr(module, name, change(getattr(module, name)))
    found = cases(configs(family), CPU, torch.float32, operations=(op,))
    assert any(problem(case, backend, reference_of(backend)) for case in found)


def test_there_is_a_fault_of_every_kernel() -> None:
    sources = (ROOT / "model" / "ops" / "triton").rglob("*.py")
    launch = re.compile(r"^ +(\w+)\[.*\]\(", re.MULTILINE)
    launched = {name for path in sources for name in launch.findall(path.read_text())}
    assert launched == {fault[3] for fault in FAULTS} | {fault[2] for fault in checks.FAULTS}
