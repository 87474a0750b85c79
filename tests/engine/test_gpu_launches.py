"""The kernel launches of a GPU, recorded without a GPU.

The engine runs on the CPU with the Triton kernels and tiles of a GPU. Kernels do not compute; for
each launch, the kernel's name and Triton's key of the compiled variant are recorded.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import Engine, EngineConfig, Request, SamplingParams
from engine.execution import model_runner
from engine.execution.sampler import Sampler
from model.ops.backend import Compute
from tests.engine.captures import Repeating

pytest.importorskip("triton")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(Kernel, key of its compiled variant) of every launch on a simulated H100."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from model.ops.triton.backend import TritonBackend
    from model.ops.triton.tiles import TILES, Target
    from tests.model.triton_compiler import target

    compiler, found = make_backend(target("sm_90")), list[tuple[str, str]]()

    @cache
    def binder(kernel: Any) -> Callable[..., Any]:
        bind: Callable[..., Any] = create_function_from_signature(
            kernel.signature, kernel.params, compiler
        )
        return bind

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kw: Any) -> None:
        bound, specialization, options = binder(kernel)(*args, **kw)
        found.append((kernel.__name__, f"{specialization} {options}"))
        if "tokens_ptr" in bound:  # sampled tokens must be valid
            bound["tokens_ptr"].zero_()

    monkeypatch.setattr(JITFunction, "run", record)
    h100 = Target("sm_90", 132, TILES["sm_90"])
    monkeypatch.setattr(
        model_runner,
        "choose_backend",
        lambda device, dtype, kv_dtype: TritonBackend(device, dtype, h100, kv_dtype=kv_dtype),
    )
    return found


class Launching(TorchDispatchMode):
    """Records torch's own operations as launches, except those that launch no kernel."""

    _none = (
        "empty",
        "view",
        "flatten",
        "slice",
        "select",
        "expand",
        "alias",
        "transpose",
        "squeeze",
        "aten.t.",
    )

    def __init__(self, launches: list[tuple[str, str]]):
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(name in str(func) for name in self._none):
            self._launches.append((str(func).removeprefix("aten.").split(".")[0], ""))
        return func(*args, **(kwargs or {}))


def prepare(engine: Engine, launches: list[tuple[str, str]]) -> None:
    """As `Engine.warm_up` on a GPU: run the peak step, allocate, capture."""
    runner = engine.runner
    sizes = engine.max_batch_size, engine.max_batch_tokens
    runner.run_peak_step(*sizes, engine.max_batch_tokens, engine.config.block_size)
    runner.allocate(500, engine.config.block_size, engine.max_positions, engine.max_batch_size)

    class Once(Repeating):
        def __call__(self, compute: Compute) -> Compute:
            logits = compute()
            return lambda: logits

    runner.capture(Once())


@pytest.mark.parametrize("batch_size", [1, 3, 40])
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_warm_up_compiles_every_kernel_that_a_job_needs(
    name: str,
    batch_size: int,
    launches: list[tuple[str, str]],
    checkpoint: Callable[[str], Path],
) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.7, "top_k": 30, "logprobs": 2},
        {"temperature": 0.7, "min_p": 0.1, "repetition_penalty": 1.1, "logit_bias": {7: 1}},
    ]
    requests = [
        Request(
            [5] * size,
            SamplingParams(max_new_tokens=3 + i % 5, ignore_eos=True, **kinds[i % 4]),
        )
        for i, size in enumerate((1, 2, 1, 20, 60, 150, 400, 3, 1, 7) * 6)
    ]
    with Engine(
        checkpoint(name),
        EngineConfig(
            dtype="bfloat16",
            max_batch_size=batch_size,
            max_batch_tokens=256,
            kv_memory=32 << 20,
            speculation=False,
        ),
    ) as engine:
        prepare(engine, launches)
        compiled = set(launches)
        launches.clear()
        # A pool of more than 2^31 elements, as on a large GPU.
        for i, cache in enumerate(engine.runner.kv_caches):
            engine.runner.kv_caches[i] = torch.empty_strided(
                cache.shape, (1 << 40, *cache.stride()[1:]), dtype=cache.dtype, device="meta"
            )
        for request in requests:  # one at a time, then all together
            list(engine.generate([request]))
        list(engine.generate(requests))
    assert len(launches) > 1000
    assert set(launches) <= compiled, Counter(name for name, _ in set(launches) - compiled)


# For one row, getp's own kernel computes every linear layer, fused with the norm before it.
_QKV = ("_add_rms_norm", "linear", "_rotate_and_write")
_ATTENTION = ("decode_attention", "linear")
_MLP = ("_add_rms_norm", "linear", "_activate", "linear")
_ONE_ROW_ATTENTION = ("decode_attention", "fused_linear")
_FUSED_MLP = ("fused_linear", "fused_linear")
_EXPERTS = ("experts_gate_up", "experts_down")
_MOE = ("fused_linear", "_route_and_sort", *_EXPERTS)  # the next norm sums the experts
_ROUTE = ("_add_rms_norm", "linear", "_route", "_count_by_expert", "_sort_by_expert")
_LARGE_MOE = (*_ROUTE, *_EXPERTS, "sum_experts")
_FP8 = ("quantize_rows", "quantized_product")
_FP8_LAYER = (
    *("_add_rms_norm", *_FP8, "_rotate_and_write", "decode_attention", *_FP8),
    *("_add_rms_norm", *_FP8, "_activate", *_FP8),
)


@pytest.mark.parametrize(
    ("name", "rows", "layers"),
    [
        ("llama-llama3-rope", 1, [("fused_linear", *_ONE_ROW_ATTENTION, *_FUSED_MLP)] * 4),
        ("qwen3", 1, [("fused_linear", "_rotate_and_write", *_ONE_ROW_ATTENTION, *_FUSED_MLP)] * 4),
        ("qwen3", 256, [_QKV + _ATTENTION + _MLP] * 4),
        ("gpt_oss-wide", 1, [("fused_linear", *_ONE_ROW_ATTENTION, *_MOE)] * 4),
        ("gpt_oss-wide", 16, [(*_QKV, "decode_attention", "linear", *_MOE)] * 4),
        ("gpt_oss-wide", 256, [(*_QKV, *_ATTENTION, *_LARGE_MOE)] * 4),
        ("llama-llama3-rope", 4, [_FP8_LAYER] * 4),
    ],
)
def test_kernels_of_a_decode_step(
    name: str,
    rows: int,
    layers: list[tuple[str, ...]],
    launches: list[tuple[str, str]],
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On a GPU one call of torch; a CPU has none with a float32 result.
    def product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.nn.functional.linear(x, weight)

    monkeypatch.setattr("model.ops.triton.backend.float32_product", product)
    settings: Any = {"dtype": "bfloat16", "max_batch_size": rows, "kv_memory": 32 << 20}
    is_fp8 = layers[0] == _FP8_LAYER
    if is_fp8:
        settings["quantize"] = "fp8"
    with Engine(checkpoint(name), EngineConfig(**settings)) as engine:
        steps: dict[int, list[list[str]]] = {}

        class Noting(Repeating):
            def __call__(self, compute: Compute) -> Compute:
                launches.clear()
                with Launching(launches):
                    logits = compute()
                steps.setdefault(len(logits), []).append([kernel for kernel, _ in launches])
                return lambda: logits

        engine.runner.capture(Noting())
    # The last tokens, their embeddings, and the angles of their positions.
    expected = ["index", "_embed", "index", *sum(layers, ()), "_add_rms_norm"]
    expected += _FP8 if is_fp8 else ["fused_linear" if rows == 1 else "linear"]
    decode, greedy, sampled, adjusted = steps[rows]
    assert decode == expected  # the head writes into the buffer of the logits
    zeros = ["zero_"]  # of this test, see above
    assert greedy == ["summarize_blocks", "choose_tokens", *zeros]
    assert sampled == ["summarize_blocks", "list_candidates", "choose_tokens", *zeros]
    assert adjusted == ["add_biases", "apply_penalties", "apply_min_p", *sampled]


@pytest.mark.parametrize("rows", [1, 40])
def test_kernels_that_sample_a_step(rows: int, launches: list[tuple[str, str]]) -> None:
    """No launch or size depends on the rows' parameters, so that a GPU can capture the step."""
    backend = model_runner.choose_backend(torch.device("cpu"), torch.bfloat16, "auto")
    sampler, at = Sampler(rows, backend, vocab=5000), torch.arange(rows)
    logits, positions = torch.zeros(rows, 5000), at.int()
    captured = []
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.7}, {"temperature": 1, "top_p": 0.9}]
    kinds.append({"temperature": 1, "top_k": 30})
    for first in range(len(kinds)):
        params = [SamplingParams(seed=1, **kinds[(first + i) % len(kinds)]) for i in range(rows)]
        sampler.set_params(at.tolist(), params)
        launches.clear()
        with Launching(launches):
            sampler.sample_rows(logits, at, positions)
        captured.append(list(launches))
    kernels = ["summarize_blocks", "list_candidates", "choose_tokens"]
    zeros = ["zero_"]  # of this test, see above
    assert [name for name, _ in captured[0]] == kernels + zeros
    assert captured == captured[:1] * len(kinds)
    launches.clear()
    with Launching(launches):
        sampler.sample_greedy(logits, at)
    assert [name for name, _ in launches] == ["summarize_blocks", "choose_tokens", *zeros]
