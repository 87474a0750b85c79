"""Mode profile: the times of the parts of a step, its limit, and the changes that would help."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from engine import Engine, EngineConfig, EngineError, Request, SamplingParams
from engine.step_probe import StepProbe
from getp.analysis.advice import advise, find_bottleneck, predicted_seconds
from getp.analysis.part_timer import Launches, count_events, time_parts
from getp.analysis.profile import Profile, Times, assemble, measure_times
from getp.analysis.profile_table import print_profile
from getp.cli import main as cli
from model.cost.devices import find_device
from model.cost.known_models import named_config
from model.cost.operations import parameter_bytes, total
from model.cost.rates import Rates
from model.cost.roofline import USABLE_MEMORY
from model.cost.workload import Workload
from model.ops.cpu.backend import CpuBackend
from model.ops.step_parts import ACTIVATION, FUSED_INTO, GATE_UP_PROJ, ROPE, observe

CPU = torch.device("cpu")
QWEN2 = named_config("qwen2-0.5b")
RTX3090, H100 = find_device("RTX 3090"), find_device("H100 SXM")
DENSE = (
    "scheduling batch_preparation embedding input_norm qkv_proj rope attention o_proj "
    "post_norm gate_up_proj activation down_proj final_norm lm_head sampling other"
).split()


def profiled(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert cli.run([*map(str, args), "-m", "profile", "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert isinstance(result, dict)
    return result


def example_profile(work: Workload | None = None, **changes: Any) -> Profile:
    """The step of bottleneck-analysis: 230 tok/s, 15 kernels per layer, launch-bound."""
    work = work or Workload("decode", 1, 1, 1000, "bfloat16")
    counts = {"input_norm": 24, "qkv_proj": 72, "rope": 48, "attention": 24, "o_proj": 48,
              "post_norm": 24, "gate_up_proj": 48, "activation": 24, "down_proj": 48}  # fmt: skip
    times = Times(4.35e-3, dict.fromkeys(counts, 4.35e-3 / len(counts)))
    given = {"device": RTX3090, "on_gpu": False, "times": times, "launches": Launches(counts)}
    return assemble(QWEN2, work, **{**given, **changes})


def test_the_parts_of_a_profile_add_up_to_the_step(
    checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = profiled(capsys, checkpoint("qwen2"), "--batch", 3, "--context", 40)
    assert [part["name"] for part in found["parts"]] == DENSE
    assert sum(part["seconds"] for part in found["parts"]) == pytest.approx(found["timed_step_s"])
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1)
    assert found["slowdown"] == pytest.approx(found["timed_step_s"] / found["step_s"] - 1)
    assert found["launches"] == sum(part["launches"] for part in found["parts"]) > 50
    assert found["tok_s"] == pytest.approx(3 / found["step_s"])
    assert all(part["seconds"] > 0 for part in found["parts"])
    by_name = {part["name"]: part for part in found["parts"]}
    # The conversion to float32, the transposed view of the weight, and the product.
    assert by_name["lm_head"]["launches"] == 3


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "qwen3"])
def test_models_with_experts_or_head_norms_have_all_parts(
    family: str, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = profiled(
        capsys, checkpoint(family), "--phase", "prefill", "--batch", 2, "--context", 48
    )
    names = [part["name"] for part in found["parts"]]
    assert [name for name in names if name != "router"] == DENSE
    assert ("router" in names) == (family != "qwen3")
    assert (found["phase"], found["query"], found["context"]) == ("prefill", 48, 48)
    assert all(part["seconds"] > 0 and part["share"] < 0.9 for part in found["parts"])


def test_parts_are_within_5_percent_of_the_step_of_a_mid_size_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The test has one thread, so its processor time excludes the work of other processes.
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 384,
        "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
        "tie_word_embeddings": True, "torch_dtype": "float32",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with Engine(
        tmp_path, EngineConfig(device="cpu", max_batch_size=8, dummy_weights=True)
    ) as engine:
        probe = StepProbe(engine, batch=8, query=1, context=256)
        for _ in range(3):  # the processor's rate may change between the two measurements
            times = measure_times(probe.step, CPU, limit_s=30)  # it usually takes far less
            if sum(times.parts.values()) == pytest.approx(times.step_s, rel=0.05):
                break
    assert sum(times.parts.values()) == pytest.approx(times.step_s, rel=0.05)
    assert times.parts["other"] < 0.1 * times.step_s


def test_a_nested_part_is_timed_separately() -> None:
    seen: list[str] = []
    with observe(seen.append):
        with GATE_UP_PROJ, ACTIVATION:
            pass
        with ACTIVATION:
            pass
    expected = ["other", "gate_up_proj", "activation", "gate_up_proj", "other"]
    assert seen == [*expected, "activation", "other"]


def test_a_step_that_fails_ends_its_observation() -> None:
    with pytest.raises(ZeroDivisionError), observe(lambda name: None), ROPE:
        _ = 1 / 0
    seen: list[str] = []
    with (
        observe(seen.append),
        pytest.raises(RuntimeError, match="already being observed"),
        observe(print),
    ):
        pass
    assert seen == ["other"]


def test_parts_of_other_threads_are_not_observed() -> None:
    seen: list[str] = []
    steps = {name: threading.Event() for name in ("inside", "observed", "outside")}

    def other_thread() -> None:
        with ROPE:
            steps["inside"].set()
            assert steps["observed"].wait(10)
        with ACTIVATION:
            pass
        steps["outside"].set()

    thread = threading.Thread(target=other_thread)
    thread.start()
    assert steps["inside"].wait(10)
    with observe(seen.append), GATE_UP_PROJ:
        steps["observed"].set()
        assert steps["outside"].wait(10)
    thread.join()
    assert seen == ["other", "gate_up_proj", "other"]


def test_observing_a_step_changes_no_result(checkpoint: Callable[[str], Path]) -> None:
    with Engine(checkpoint("gpt_oss"), EngineConfig(device="cpu", max_batch_size=2)) as engine:
        probe = StepProbe(engine, batch=2, query=1, context=200)
        seconds = time_parts(probe.step, CPU)
        assert seconds["attention"] > 0
        assert time_parts(probe.step, CPU).keys() == seconds.keys()


def test_kernels_are_counted_in_the_part_that_launched_them() -> None:
    def event(name: str, parent: Any = None, *kernels: tuple[str, float]) -> Any:
        launched = [SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels]
        return SimpleNamespace(
            name=name, cpu_parent=parent, kernels=launched, device_type=DeviceType.CPU
        )

    part = event("attention", None, ("triton_decode", 30.0))
    outer = event("aten::linear", part)
    inner = event("aten::addmm", outer, ("gemm", 20.0), ("splitk_reduce", 5.0))
    stray = event("aten::empty", None, ("memset", 1.0))
    kernel = SimpleNamespace(name="gemm", cpu_parent=None, device_type=DeviceType.CUDA)
    events = [part, outer, inner, stray, kernel]
    found = count_events(events, on_gpu=True)
    assert found.count == {"attention": 3}
    assert found.busy_s == pytest.approx({"attention": 55e-6})
    assert count_events(events, on_gpu=False) == Launches({"attention": 1})


def test_a_probe_repeats_one_step_at_one_length(checkpoint: Callable[[str], Path]) -> None:
    """Also where a window frees blocks: the context is ten times the window of this gpt-oss."""
    with Engine(checkpoint("gpt_oss"), EngineConfig(device="cpu", max_batch_size=3)) as engine:
        probe = StepProbe(engine, batch=3, query=1, context=250)
        used = []
        for _ in range(20):
            probe.step()
            used.append(engine.stats.peak_kv_blocks)
        assert len(set(used)) == 1
        assert engine.stats.decode_context == 20 * 3 * 250
        assert not engine.stats.preemptions


def test_a_step_that_the_engine_has_no_room_for_is_refused(
    checkpoint: Callable[[str], Path],
) -> None:
    with Engine(
        checkpoint("qwen2"), EngineConfig(device="cpu", max_batch_size=2, kv_memory=2**18)
    ) as engine:
        with pytest.raises(EngineError, match="do not fit into one step"):
            StepProbe(engine, batch=3, query=1, context=40)
        with pytest.raises(EngineError, match="a context of 1000000 tokens exceeds the limit"):
            StepProbe(engine, batch=2, query=1, context=10**6)


def test_a_profile_does_not_disturb_another_engine(
    checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    request = Request([5, 6, 7], SamplingParams(max_new_tokens=8, ignore_eos=True))
    with Engine(checkpoint("qwen2"), EngineConfig(device="cpu")) as engine:
        before = next(iter(engine.generate([request]))).token_ids
        profiled(capsys, checkpoint("qwen2"), "--context", 30)
        assert next(iter(engine.generate([request]))).token_ids == before


def test_a_chrome_trace_names_the_parts(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.json"
    found = profiled(capsys, checkpoint("qwen2"), "--context", 30, "--trace", path)
    events = json.loads(path.read_text())["traceEvents"]
    # As operations: the profiler does not assign kernels launched outside torch to annotations.
    named = Counter(event.get("name") for event in events if event.get("cat") == "cpu_op")
    assert all(named[part["name"]] for part in found["parts"])


def test_the_step_of_the_document_is_launch_bound() -> None:
    """bottleneck-analysis: 360 launches of 7.5 µs are 62% of 4.35 ms at 230 tok/s."""
    found = example_profile()
    bottleneck = find_bottleneck(found)
    assert (bottleneck.bound, found.launches, round(found.tok_s)) == ("launch", 360, 230)
    assert bottleneck.launch_s == pytest.approx(2.70e-3)
    assert bottleneck.evidence.startswith("62.1% of the step is spent on starting 360")
    gains = {advice.change.split(":")[0]: advice for advice in advise(found)}
    # Four launches fewer per layer save 0.72 ms. The document saves 1.15 ms (313 tok/s), because it
    # assumes that the fused kernel is also faster than its parts.
    assert gains["fuse gate/up, activation and down"].tok_s == pytest.approx(275.6, abs=0.1)
    assert 400 < gains["fuse whole layers"].tok_s < 500  # "Potential: 400-500 tok/s"
    assert [a.gain for a in advise(found)] == sorted((a.gain for a in advise(found)), reverse=True)


def test_fused_operations_are_counted_in_their_kernel_and_not_advised_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    apart = example_profile()
    inner = ("activation", "down_proj")
    times = {name: s for name, s in apart.times.parts.items() if name not in inner}
    counts = dict.fromkeys(times, 24)
    found = example_profile(times=Times(4.35e-3, times), launches=Launches(counts))
    assert found.within == dict.fromkeys(inner, "gate_up_proj")
    before, after = ({part.name: part.op for part in one.components} for one in (apart, found))
    together = [before[name] for name in ("gate_up_proj", *inner)]
    assert after["gate_up_proj"].bytes == total(together).bytes
    assert after["gate_up_proj"].flops == total(together).flops
    assert total(found.ops) == total(apart.ops)
    titles = [advice.change.split(":")[0] for advice in advise(found)]
    assert "fuse norm and QKV" in titles
    assert "fuse gate/up, activation and down" not in titles
    print_profile(found, "qwen2", [], details=True)
    assert "down_proj in gate_up_proj" in capsys.readouterr().out


def test_a_narrow_terminal_truncates_no_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = []
    for columns in (200, 60):
        monkeypatch.setenv("COLUMNS", str(columns))
        print_profile(example_profile(), "qwen2", [], details=True)
        printed.append(capsys.readouterr().out)
    wide, narrow = printed
    assert max(len(line) for line in narrow.splitlines() if line.startswith(" ")) <= 60
    # The narrow table leaves out the column with the share of all bytes.
    shares = {word for word in wide.split() if word.endswith("%")} | {"%"}
    assert set(wide.split()) - set(narrow.split()) <= shares
    assert set(narrow.split()) <= set(wide.split())


def test_operations_of_a_fused_kernel_have_no_part_of_their_own(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def norm_qkv(self: Any, x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        heads = rest[3].heads
        return x, torch.zeros(len(x), heads.heads, heads.head_dim, dtype=x.dtype)

    monkeypatch.setattr(CpuBackend, "norm_qkv", norm_qkv)
    monkeypatch.setattr(CpuBackend, "norm_mlp", lambda self, x, delta, *rest: (x, delta.exp()))
    with Engine(checkpoint("qwen2"), EngineConfig(device="cpu", max_batch_size=1)) as engine:
        probe = StepProbe(engine, batch=1, query=1, context=30)
        seconds = time_parts(probe.step, CPU)
    assert not seconds.keys() & FUSED_INTO.keys()
    assert seconds["qkv_proj"] > 0
    assert seconds["gate_up_proj"] > 0


def test_graph_capture_is_advised_where_the_gpu_waits() -> None:
    busy = {"qkv_proj": 0.5e-3, "gate_up_proj": 1.0e-3}
    found = example_profile(on_gpu=True, launches=Launches({"gate_up_proj": 300}, busy))
    assert find_bottleneck(found).launch_s == pytest.approx(2.85e-3)
    assert find_bottleneck(found).evidence.startswith(
        "65.5% of the step is GPU idle time between 300 kernels"
    )
    changes = {advice.change: advice for advice in advise(found)}
    best = changes["capture the step as a graph, as jobs do"]
    assert best.step_s == pytest.approx(1.5e-3)
    assert best.gain == pytest.approx(4.35 / 1.5 - 1)


@pytest.mark.parametrize(
    ("work", "parts", "bound"),
    [
        (Workload("decode", 1, 1, 1000, "bfloat16"), {"gate_up_proj": 4e-4}, "memory"),
        (Workload("prefill", 4, 1024, 1024, "bfloat16"), {"gate_up_proj": 8e-3}, "compute"),
        (Workload("decode", 1, 1, 1000, "bfloat16"), {"scheduling": 4e-3}, "host"),
    ],
)
def test_the_largest_requirement_is_the_limit(
    work: Workload, parts: dict[str, float], bound: str
) -> None:
    times = Times(sum(parts.values()), parts)
    bottleneck = find_bottleneck(
        example_profile(work, device=H100, times=times, launches=Launches({}))
    )
    assert bottleneck.bound == bound


def test_a_larger_batch_is_advised_while_it_is_faster_and_fits() -> None:
    def best(found: Profile) -> list[str]:
        return [a.change for a in advise(found) if a.change.startswith("a batch")]

    assert best(example_profile()) == ["a batch of 16 instead of 1"]
    weights, sequence = parameter_bytes(QWEN2, "bfloat16"), 1000 * 2 * 2 * 64 * 2 * 24
    full = replace(RTX3090, memory=round((weights + 5 * sequence) / USABLE_MEMORY))
    assert best(example_profile(device=full)) == ["a batch of 4 instead of 1"]


@pytest.mark.parametrize(("measured", "larger"), [(3.0, 4.0), (1.0, 2.0), (0.5, 1.0)])
def test_what_a_part_takes_beyond_the_rates_does_not_grow(measured: float, larger: float) -> None:
    """At the rates the product takes 1 s for one row and 2 s for two, and sampling 1 s for each."""
    weight = 1 / (24 * 4864 * 896)
    rates = Rates(
        {"bfloat16": [(1, weight, 0.0), (2, 2 * weight, 0.0)]},
        *(0.0, {"bfloat16": [(1, 0.0)]}, 0.0, 0.0, 0.0, 0.0),
        *(1 / QWEN2.vocab_size, 0.0),
    )
    found = example_profile(
        device=replace(RTX3090, rates=rates, launch_s=0.0),
        times=Times(measured + 1.5, {"down_proj": measured, "sampling": 1.5}),
        launches=Launches({"down_proj": 24, "sampling": 1}),
    )
    two = replace(found.work, batch=2)
    assert predicted_seconds(found, two) == pytest.approx(larger + 2.5)


def test_options_that_a_profile_cannot_use_are_refused(
    checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        (["--phase", "backward"], "does not train"),
        (["--query", "9", "--context", "8"], "is larger than --context"),
        (["--fused"], "applies only to -m plan"),
        (["--context", "100000"], "exceeds the limit of"),
    ):
        assert cli.run([str(checkpoint("qwen2")), "-m", "profile", *options]) != 0
        assert message in capsys.readouterr().err


def test_a_profile_is_printed_with_its_bottleneck_and_advice(
    checkpoint: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    args = [str(checkpoint("qwen2")), "-m", "profile", "--context", "30", "--gpu", "A10"]
    assert cli.run([*args, "--details", "--dummy-weights"]) == 0
    text, err = capfd.readouterr()
    for words in ("tok/s", "gate_up_proj", "rope", "-bound:", "possible change", "A10 "):
        assert words in text
    assert "--details" not in text
    assert "profiler_start" not in err  # a log line of torch's profiler


def test_a_profile_shows_the_answer_first_and_the_long_table_on_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = example_profile()
    print_profile(found, "qwen2", [])
    title, step, bound, *rest = capsys.readouterr().out.splitlines()
    assert step.startswith("time per output token: 4.35 ms")
    assert bound.startswith("launch-bound:")
    parts = [line for line in rest if line.endswith("%")]
    largest = max(found.components, key=lambda part: part.seconds)
    assert parts[0].split()[0] == largest.name
    assert f" {len(found.components) - 5} more components" in parts[5]
    assert sum(float(line.split()[-1].rstrip("%")) for line in parts[:6]) == pytest.approx(100, 1)
    assert not any("FLOP/s" in line for line in rest)
    print_profile(found, "qwen2", [], details=True)
    detailed = capsys.readouterr().out
    assert detailed.splitlines()[:3] == [title, step, bound]
    assert "launches  " in detailed
    # Each share of a limit is stated once.
    share = bound.split("peak bandwidth takes ")[1].split()[0]
    assert detailed.count(share) == 1
