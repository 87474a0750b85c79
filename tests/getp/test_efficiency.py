"""The efficiency of a run and its largest loss, from the counters of the engine."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import (
    Engine,
    EngineConfig,
    EngineStats,
    ReplicaSummary,
    Request,
    RunSummary,
    SamplingParams,
)
from engine.summary import longest_wait, thread_waits
from getp import machine
from getp.report.efficiency import RunEfficiency, record_efficiency, run_cost, run_efficiency
from getp.report.job_report import job_report
from getp.report.losses import FinishedRun, largest_loss
from getp.report.measurements import Measurements
from model.cost import measure
from model.cost.devices import find_device
from model.cost.known_models import named_config
from model.cost.operations import operations, total
from model.cost.rates import Rates
from model.cost.workload import Workload
from tests.getp.helpers import FakeEngine

LLAMA3, H100 = named_config("llama-3-8b"), find_device("H100 SXM")

# 100 steps, each of 32 tokens decoded at a context of 1024: 5.8 ms at best.
DECODING = EngineStats(
    steps=100,
    launched_steps=100,
    batch_sum=3200,
    decode_tokens=3200,
    decode_context=3200 * 1024,
    output_tokens=3200,
    short_steps=100,
    model_s=1.0,
)
RUN = RunSummary(
    device="NVIDIA H100 80GB HBM3",
    device_type="cuda",
    device_count=1,
    dtype="bfloat16",
    tensor_parallel=1,
    max_batch_size=32,
    config=LLAMA3,
    stats=DECODING,
    peak_memory_bytes=0,
)
REPLICA = ReplicaSummary(0, "here", 1, 1600, 1.0, 1.0, 32.0, 0, 0, 0)


def efficiency_of(
    stats: EngineStats, inference_s: float, max_batch_size: int = 32
) -> RunEfficiency:
    return run_efficiency(replace(RUN, stats=stats, max_batch_size=max_batch_size), inference_s, 0)


def test_the_cost_of_a_run_is_the_cost_of_its_steps() -> None:
    step = total(operations(LLAMA3, Workload("decode", 32, 1, 1024, "bfloat16", fused=True)))
    cost = run_cost(LLAMA3, "bfloat16", DECODING)
    assert cost.flops.matrix == 100 * step.flops.matrix
    assert cost.bytes.kv == 100 * step.bytes.kv
    assert cost.bytes.weights == pytest.approx(100 * step.bytes.weights, rel=1e-3)
    prompts = EngineStats(steps=1, prefill_chunks=4, prefill_tokens=400, prefill_context=400)
    work = Workload("prefill", 4, 100, 100, "bfloat16", fused=True, causal=True)
    assert run_cost(LLAMA3, "bfloat16", prompts).flops == total(operations(LLAMA3, work)).flops


def test_steps_with_compressed_weights_read_12_bits_of_a_value() -> None:
    """But for the embedding, which every token reads a row of, and norms."""
    every = run_cost(LLAMA3, "bfloat16", replace(DECODING, compressed_steps=DECODING.steps))
    read = run_cost(LLAMA3, "bfloat16", DECODING).bytes.weights
    assert every.bytes.weights == pytest.approx(0.75 * read, rel=2e-3)


def test_utilization_is_relative_to_the_peaks_of_the_device() -> None:
    efficiency = efficiency_of(DECODING, inference_s=1.2)
    assert efficiency.bound == "memory"
    assert efficiency.mbu == efficiency.limit_share == pytest.approx(0.577 / 1.2, rel=0.01)
    assert efficiency.mfu == pytest.approx(100 * 0.4972e12 / 989.4e12 / 1.2, rel=0.01)
    assert efficiency.peaks == "H100 SXM: NVIDIA H100 datasheet"


def test_the_peaks_of_replicas_are_summed() -> None:
    one = run_efficiency(RUN, 1.2, 0)
    phrase = "2 replicas on one host, NVIDIA H100 80GB HBM3 each"
    replicas = replace(
        RUN,
        device=phrase,
        device_count=2,
        replicas=(REPLICA, REPLICA),
        replicas_device=RUN.device,
    )
    both = run_efficiency(replicas, 1.2, 0)
    assert both.mbu == pytest.approx((one.mbu or 0) / 2)
    assert both.mfu == pytest.approx((one.mfu or 0) / 2)
    assert both.peaks == "2 × H100 SXM: NVIDIA H100 datasheet"
    assert (
        run_efficiency(replace(replicas, replicas_device="an unknown GPU"), 1.2, 0)
        == RunEfficiency()
    )


def test_each_gpu_of_a_split_model_does_an_equal_share_of_the_work() -> None:
    one, shared = (
        run_efficiency(RUN, 1.2, 0),
        run_efficiency(replace(RUN, tensor_parallel=2), 1.2, 0),
    )
    assert shared.mfu == pytest.approx((one.mfu or 0) / 2, rel=0.01)
    assert shared.peaks == one.peaks


def test_only_the_efficiency_of_a_long_run_on_one_device_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded: list[tuple[str, float]] = []
    monkeypatch.setattr(
        "getp.report.efficiency.store_efficiency",
        lambda target, model, share: recorded.append((model, share)),
    )
    cpu = replace(RUN, device="cpu", device_type="cpu")
    efficiency = RunEfficiency(limit_share=0.5)
    record_efficiency(cpu, "short", efficiency, 0.9)
    record_efficiency(replace(cpu, tensor_parallel=2), "shared", efficiency, 9.0)
    record_efficiency(replace(cpu, replicas=(REPLICA,)), "replicas", efficiency, 9.0)
    record_efficiency(cpu, "nothing", RunEfficiency(), 9.0)
    record_efficiency(cpu, "long", efficiency, 1.0)
    assert recorded == [("long", 0.5)]
    assert (
        run_efficiency(cpu, 1.2, 0).peaks
        == f"local: {machine.peaks_of(measure.default_target()).source}"
    )


@pytest.mark.parametrize(
    ("stats", "inference_s", "max_batch_size", "sentence"),
    [
        (DECODING, 1.0, 32, "36% of the time was spent on launching 483 operations"),
        (replace(DECODING, launched_steps=0), 1.0, 32, "42% of the time is kernels and sampling"),
        (
            replace(DECODING, model_s=3.0),
            3.0,
            32,
            "69% of the time is kernels and sampling running below peak",
        ),
        (DECODING, 4.0, 32, "75% of the time the device waited for prompts"),
        (replace(DECODING, schedule_s=2.0), 3.0, 32, "67% of the time .* the scheduler"),
        (DECODING, 1.0, 256, "batch was 32 of 256: too few requests to fill it"),
        (
            replace(DECODING, gathering_steps=101),
            1.0,
            256,
            "batch was 32 of 256: new requests waited",
        ),
        (
            replace(DECODING, kv_full_steps=101),
            1.0,
            256,
            "batch was 32 of 256: KV memory was full",
        ),
        (replace(DECODING, preemptions=7, output_tokens=800), 1.0, 32, "75% .* 7 preemptions"),
    ],
)
def test_the_largest_loss_is_one_sentence(
    stats: EngineStats, inference_s: float, max_batch_size: int, sentence: str
) -> None:
    efficiency = efficiency_of(stats, inference_s, max_batch_size)
    assert efficiency.largest_loss is not None
    assert re.search(sentence, efficiency.largest_loss)


def test_on_a_cpu_the_loss_may_be_other_processes_or_a_small_batch() -> None:
    """Time in which other processes had the cores does not count as kernels below peak speed."""
    rates = Rates(
        {"bfloat16": [(1, 1e-12, 0.0), (64, 2e-12, 0.0)]}, 0.0, {"bfloat16": [(1, 0.0)]}, *[0.0] * 6
    )
    cpu = replace(H100, peaks={"bfloat16": 1e15}, bandwidth=1e15, launch_s=0.0, rates=rates)
    for wait, batch, sentence in (
        (0.7, 32, "70% of the time other processes used the processor's cores"),
        (0.2, 32, "80% of the time is kernels and sampling running below peak speed"),
        (0.0, 1024, "the decode batch was 32 of 1024: too few requests to fill it"),
        (0.9, 1024, "90% of the time other processes used the processor's cores"),
    ):
        stats = replace(DECODING, cpu_wait_s=wait)
        # At this limit a larger batch costs as much for each token as at the measured rates.
        limit_s = 1.0 if batch > 32 else 0.0
        run = FinishedRun(LLAMA3, "bfloat16", cpu, stats, batch, 1.0, 32)
        assert largest_loss(run, limit_s) == sentence


def test_waiting_for_a_core_is_counted() -> None:
    """The longest wait of a thread counts, since threads wait for each other."""
    assert longest_wait({"1": 1.0, "2": 5.0}, {"1": 1.5, "2": 5.25, "3": 0.125}) == 0.5
    assert longest_wait({}, {}) == 0.0
    if sys.platform == "linux":
        assert str(os.getpid()) in thread_waits()


def test_a_run_without_steps_has_no_efficiency() -> None:
    assert run_efficiency(FakeEngine().summary(), 1.0, 0) == RunEfficiency()


def test_the_engine_counts_computed_tokens(checkpoint: Callable[[str], Path]) -> None:
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    with Engine(checkpoint("qwen2"), EngineConfig(max_batch_size=2, dtype="float32")) as engine:
        list(engine.generate([Request(list(range(1, n)), params, n) for n in (6, 9, 12)]))
        stats = engine.stats
    assert (stats.prefill_chunks, stats.prefill_tokens) == (3, 5 + 8 + 11)
    assert stats.prefill_context == stats.prefill_tokens
    assert stats.decode_tokens == 3 * 3  # the prefill produces the first token of each request
    assert stats.decode_context == sum(n + i for n in (5, 8, 11) for i in (1, 2, 3))
    assert 0 < stats.schedule_s < stats.inference_s
    assert 0 < stats.model_s < stats.inference_s
    assert stats.kv_full_steps == 0


def test_steps_that_wait_for_kv_memory_are_counted(checkpoint: Callable[[str], Path]) -> None:
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    block = 2 * 4 * 4 * 2 * 16 * 4  # K and V, layers, positions, KV heads, head size, float32
    config = EngineConfig(
        dtype="float32", kv_memory=12 * block, block_size=4, max_batch_size=8, prefix_cache=False
    )
    with Engine(checkpoint("qwen2"), config) as engine:
        list(engine.generate([Request([1, 2, 3, n], params, n) for n in range(6)]))
    assert engine.stats.kv_full_steps > engine.stats.short_steps


def test_a_measurement_of_this_machine_is_announced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"peaks": {"float32": 1e11}, "bandwidth": 1e10, "launch_s": 1e-6, "memory": 2**33,
             "rates": None}  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "measure", lambda target: {"date": "2030-01-02", **rates})
    cpu = replace(RUN, device="cpu", device_type="cpu")
    for message in ("getp: measuring the peak speed of this machine (once; about 10 s)\n", ""):
        run_efficiency(cpu, 1.2, 0)
        assert capsys.readouterr().err == message


def test_products_of_e4m3_count_at_their_peak() -> None:
    work = EngineStats(steps=1, prefill_chunks=1, prefill_tokens=4096, prefill_context=4096)
    dense = run_efficiency(replace(RUN, stats=work), 1.0, 0)
    eights = run_efficiency(replace(RUN, stats=work, config=LLAMA3.quantized("fp8")), 1.0, 0)
    assert dense.mfu is not None
    assert eights.mfu is not None
    assert 0.5 * dense.mfu < eights.mfu < 0.6 * dense.mfu  # attention stays in 16 bits


@pytest.mark.parametrize(
    ("fields", "devices"),
    [
        ({}, 1),
        ({"tensor_parallel": 2}, 2),
        ({"device_count": 4, "tensor_parallel": 2, "replicas": (REPLICA, REPLICA)}, 4),
        ({"device_type": "cpu", "device": "cpu", "tensor_parallel": 2}, 1),
    ],
)
def test_a_job_costs_the_price_of_each_device_once(fields: dict[str, Any], devices: int) -> None:
    measured = Measurements(inference_s=1800.0)
    report = job_report(measured, replace(RUN, stats=EngineStats(), **fields), "m", price=3.0)
    assert report["cost"] == pytest.approx(3.0 * devices / 2)
