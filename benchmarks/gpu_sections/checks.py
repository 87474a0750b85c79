"""Checks of kernels on a GPU, at the true widths of real models, and that repetition is exact."""

import sys
from collections.abc import Collection, Iterator
from itertools import chain

import torch

from benchmarks.gpu_sections.inputs import COMPUTES, CUDA, fused, kernels, one_row
from model.checks import Case, cases, problem, reference_of
from model.checks.case import error_text
from model.config import ModelConfig
from model.cost.known_models import named_config
from model.ops.backend import Backend

MODELS = ("gpt-oss-20b", "qwen3-0.6b", "qwen2-0.5b", "llama-3.1-8b")
RECURRENT = "qwen3.5-0.8b"
_REPEATS = 10


def check_norms() -> Iterator[str | None]:
    """Check the embedding, sums, norms, SwiGLU, rotary embedding and the logits."""
    operations = ("embed", "add_rms_norm", "activate", "rotate_and_write", "logits")
    return compare(kernels(), *operations)


def check_attention() -> Iterator[str | None]:
    """Check attention of single tokens and of chunks, and with a KV cache in fp8."""
    yield from compare(kernels(), "attention")
    if kernels().target.fp8 is not None:
        fp8 = kernels(kv_dtype="fp8")
        yield from compare(fp8, "rotate_and_write", "norm_qkv", "attention")


def check_experts() -> Iterator[str | None]:
    """Check router and experts."""
    return compare(kernels(), "route", "experts", "norm_experts")


def check_recurrent() -> Iterator[str | None]:
    """Check convolution, delta rule and gates of recurrent layers."""
    operations = ("causal_conv", "delta_rule", "gated_norm", "output_gate")
    return problems_of(kernels(), RECURRENT, named_config(RECURRENT), operations)


def check_sampling() -> Iterator[str | None]:
    """Check sampling with top-k and top-p."""
    return compare(kernels(), "argmax", "top_tokens", "adjust_logits", "sample_rows")


def check_fusions() -> Iterator[str | None]:
    """Check linear layers and fused norms: as jobs use them, and fused for up to 64 rows."""
    operations = ("linear", "norm_qkv", "norm_mlp")
    limits = {"fused_qkv": 64, "fused_gate_up": 64, "one_row": one_row()}
    return chain(
        compare(kernels(), *operations),
        compare(fused(**limits), *operations[1:]),
        compare(fused(**limits | {"fused_mlp": 64}), "norm_mlp"),
    )


def compare(backend: Backend, *operations: str) -> Iterator[str | None]:
    """Yield the problem of each case of these operations in MODELS, or None."""
    for model in MODELS:
        yield from problems_of(backend, model, named_config(model), operations)


def problems_of(
    backend: Backend, name: str, config: ModelConfig, operations: Collection[str]
) -> Iterator[str | None]:
    """Yield the problem of each case of these operations of a model, or None."""
    reference = reference_of(backend)
    for case in cases(
        config, CUDA, backend.dtype, kv_dtype=backend.kv_dtype, operations=operations
    ):
        print(f"{name}, {case}", file=sys.stderr, flush=True)  # shows where a check hangs
        if COMPUTES:
            found = problem(case, backend, reference) or difference(case, backend)
        else:
            found = failure(case, backend)
        yield None if found is None else f"{name}, {case}: {found}"


def failure(case: Case, backend: Backend) -> str | None:
    """Return the error of a case that is run without looking at its results."""
    try:
        case.run(backend)
    except Exception as error:
        return error_text(error)
    return None


def difference(case: Case, backend: Backend) -> str | None:
    """Return how many of some repetitions differ, if any.

    The order of execution in a kernel varies, but must not change its result.
    """
    call = case.prepare(backend)
    first = [result.clone() for result in call()]
    differ = sum(
        not all(_is_equal(a, b) for a, b in zip(first, call(), strict=True))
        for _ in range(_REPEATS)
    )
    return f"{differ} of {_REPEATS} repetitions differ" if differ else None


def _is_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype.itemsize == 1:  # fp8, which torch does not compare
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(a, b)
