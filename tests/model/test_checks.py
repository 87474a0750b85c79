"""The checks of kernels: right backends pass them, and each of these faults is found."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import load_config
from model.checks import OPERATIONS, ReferenceFailedError, cases, problem, reference_of
from model.checks.case import compare
from model.ops.backend import Backend
from model.ops.cpu.backend import CpuBackend
from model.ops.specs import ExpertShard
from model.sharding import Shard
from tests.model.ops_helpers import CPU

FAMILIES = ["gpt_oss-wide", "qwen2", "qwen3", "qwen3_moe", "granite"]
FAMILIES += ["gemma4_text-experts-wide", "gemma4_text-shared-wide", "nanochat-wide"]
FAMILIES += ["olmo2-wide", "ministral3-wide", "hunyuan_v1_dense-wide", "glm4_moe-wide"]
FAMILIES += ["deepseek_v3-wide", "qwen3_5_text"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_right_backend_has_no_problem(
    name: str, dtype: torch.dtype, checkpoint: Callable[[str], Path]
) -> None:
    config = load_config(checkpoint(name))
    for shard in (Shard(), Shard(1, 2)):
        found = list(cases(config, CPU, dtype, shard=shard))
        for backend in (Backend(CPU, dtype), CpuBackend(CPU, dtype)):
            assert [problem(case, backend, reference_of(backend)) for case in found] == [
                None for _ in found
            ]
        sparse = "experts" in {case.op for case in found}
        dense = "norm_mlp" in {case.op for case in found}
        assert sparse or dense
        unused = set() if sparse else {"route", "experts", "norm_experts"}
        unused |= set() if dense else {"activate", "norm_mlp"}
        unused |= set() if config.moe and config.moe.shared_size else {"add_gated"}
        unused |= set() if config.layer_scalars else {"scaled_sum"}
        unused |= set() if config.per_layer_size else {"gated"}
        recurrent = {"causal_conv", "delta_rule", "gated_norm", "output_gate"}
        unused |= set() if config.delta_rule else recurrent
        latent = {"head_linear", "latent_query"}
        unused |= latent if config.latent is None else {"norm_qkv", "rotate_and_write"}
        assert {case.op for case in found} == set(OPERATIONS) - unused
        assert all(case.bytes > 0 for case in found)


class Faulty(Backend):
    """The reference with a fault in one operation."""

    def __init__(self, fault: str, dtype: torch.dtype = torch.float32):
        super().__init__(CPU, dtype)
        self.fault = fault

    def attention(
        self, query: Any, kv: Any, batch: Any, group: Any, spec: Any, sinks: Any = None
    ) -> torch.Tensor:
        if self.fault == "no sinks":
            sinks = None
        if self.fault == "a narrow window" and spec.window is not None:
            spec = replace(spec, window=spec.window - 1)
        if self.fault == "a wide window" and spec.window is not None:
            spec = replace(spec, window=spec.window + 1)
        if self.fault == "no window":
            spec = replace(spec, window=None)
        if self.fault == "one key left out":
            batch = replace(
                batch, host_context_lens=[max(1, n - 1) for n in batch.host_context_lens]
            )
        if self.fault == "wrong scale of scores":
            spec = replace(spec, scale=spec.scale * 1.1)
        if self.fault == "wrong block table":
            group = replace(group, block_table=group.block_table.roll(1, 0))
        return super().attention(query, kv, batch, group, spec, sinks)

    def experts(
        self, x: Any, chosen: Any, weights: Any, experts: Any, activation: Any,
        shard: Any = ExpertShard(),  # noqa: B008 - immutable
    ) -> torch.Tensor:  # fmt: skip
        if self.fault == "no bias of experts":
            experts = replace(experts, down_bias=None)
        if self.fault == "weights of the first expert only":
            weights = weights * (torch.arange(weights.shape[1]) == 0)
        out = super().experts(x, chosen, weights, experts, activation, shard)
        if self.fault == "last row not written":
            out[-1] = torch.empty_like(out[-1])
        return out

    def rotate_and_write(self, qkv: Any, rope: Any) -> torch.Tensor:
        query = super().rotate_and_write(qkv, rope)
        if self.fault == "a key written to the wrong slot":
            rope.kv.flatten(1, 2)[0, 0] = 1.0
        return query

    def add_rms_norm(self, x: Any, delta: Any, norm: Any) -> Any:
        summed, normed = super().add_rms_norm(x, delta, norm)
        return (x if self.fault == "sum without delta" else summed), normed

    def embed(self, table: Any, ids: Any, scale: float, first: int = 0) -> torch.Tensor:
        if self.fault == "tokens of another rank":
            ids = ids.clamp(first, first + len(table) - 1)
        return super().embed(table, ids, scale, first)

    def sample(self, logits: Any, temperature: Any, top_k: Any, top_p: Any, uniform: Any) -> Any:
        if self.fault == "no top-p":
            top_p = torch.ones_like(top_p)
        if self.fault == "no top-k":
            top_k = None
        return super().sample(logits, temperature, top_k, top_p, uniform)

    def activate(self, gate_up: Any, activation: Any) -> torch.Tensor:
        if self.fault == "raises":
            raise RuntimeError("out of resource: shared memory\nmore")
        return super().activate(gate_up, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("fault", "op"),
    [
        ("no sinks", "attention"),
        ("a narrow window", "attention"),
        ("a wide window", "attention"),
        ("no window", "attention"),
        ("one key left out", "attention"),
        ("wrong scale of scores", "attention"),
        ("wrong block table", "attention"),
        ("no bias of experts", "experts"),
        ("weights of the first expert only", "experts"),
        ("last row not written", "experts"),
        ("a key written to the wrong slot", "rotate_and_write"),
        ("sum without delta", "add_rms_norm"),
        ("tokens of another rank", "embed"),
        ("no top-p", "sample_rows"),
        ("no top-k", "sample_rows"),
    ],
)
def test_a_fault_is_found_in_its_operation(
    fault: str, op: str, dtype: torch.dtype, checkpoint: Callable[[str], Path]
) -> None:
    config, backend = load_config(checkpoint("gpt_oss-wide")), Faulty(fault, dtype)
    found = {
        case.op
        for case in cases(config, CPU, dtype)
        if problem(case, backend, reference_of(backend)) is not None
    }
    assert op in found
    # norm_qkv runs add_rms_norm and rotate_and_write, norm_experts add_rms_norm and experts.
    assert found <= {op, "norm_qkv", "norm_experts"}


def test_an_exception_is_a_problem_in_one_line(checkpoint: Callable[[str], Path]) -> None:
    config = load_config(checkpoint("qwen2"))
    backend = Faulty("raises")
    first = next(cases(config, CPU, torch.float32, operations=["activate"]))
    found = problem(first, backend, reference_of(backend))
    assert found == "RuntimeError: out of resource: shared memory"


def test_nan_and_a_wrong_integer_are_problems() -> None:
    one, nan = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert compare((one,), (one,), torch.float32) is None
    assert "not finite" in str(compare((nan,), (one,), torch.bfloat16))
    found = compare((torch.tensor([1, 2]),), (torch.tensor([1, 3]),), torch.float32)
    assert found == "result 0: 1 of 2 values differ"


def test_a_reference_that_fails_says_nothing_about_a_kernel(
    checkpoint: Callable[[str], Path],
) -> None:
    config, right = load_config(checkpoint("qwen2")), Backend(CPU, torch.float32)

    class NotFinite(Backend):
        def activate(self, gate_up: Any, activation: Any) -> torch.Tensor:
            return gate_up * float("nan")

    first = next(cases(config, CPU, torch.float32, operations=["activate"]))
    for reference, words in (
        (Faulty("raises"), "activate: 1 rows: plain torch fails: RuntimeError: out of resource"),
        (NotFinite(CPU, torch.float32), "plain torch gives values that are not finite"),
    ):
        with pytest.raises(ReferenceFailedError, match=words):
            problem(first, right, reference)
