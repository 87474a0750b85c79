import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from getp.analysis.job_plan import Job, decode_batches, make_job
from getp.analysis.job_requests import Requests
from getp.cli import main as cli
from getp.units import duration, quantity
from model.cost import measure, measure_rates
from model.cost.known_models import KNOWN_CONFIGS
from model.cost.rates import Rates
from model.ops.backend import choose_backend
from tests.getp.helpers import write_tokenizer

ROOT = Path(__file__).parents[2]
Printed = pytest.CaptureFixture[str]
OPS = (
    "embedding input_norm qkv_proj rope attention o_proj post_norm router gate_up_proj activation "
    "down_proj final_norm lm_head"
).split()


def planned(capsys: Printed, *args: str) -> dict[str, Any]:
    assert cli.run([args[0], "-m", "plan", "--format", "json", *args[1:]]) == 0
    result = json.loads(capsys.readouterr().out)
    assert isinstance(result, dict)
    return result


def test_a_plan_in_json_has_every_operation_and_their_sum(capsys: Printed) -> None:
    plan = planned(capsys, "gpt-oss-20b", "--batch", "7", "--gpu", "H100")
    settings = {key: plan[key] for key in ("model", "phase", "batch", "query", "context", "dtype")}
    assert list(settings.values()) == ["gpt-oss-20b", "decode", 7, 1, 1024, "bfloat16"]
    assert [op["name"] for op in plan["ops"]] == OPS
    assert list(plan) == [
        *settings,
        "kv_dtype",
        "quantization",
        "fused",
        "ops",
        "total",
        "tensor_parallel",
        "exchange",
        "gpus",
    ]
    for op in plan["ops"]:
        assert list(op) == ["name", "layer_count", "flops", "bytes", "launches"]
        assert op["layer_count"] == (1 if op["name"] in (OPS[0], *OPS[-2:]) else 24)
    for group, kinds in (
        ("flops", ["matrix", "vector", "special"]),
        ("bytes", ["weights", "activations", "kv"]),
    ):
        assert list(plan["total"][group]) == kinds
        for kind in kinds:
            assert plan["total"][group][kind] == sum(op[group][kind] for op in plan["ops"])
    (gpu,) = plan["gpus"]
    keys = "name bound seconds link link_s tok_s mfu mbu ridge intensity"
    assert list(gpu) == keys.split()
    moved = sum(plan["total"]["bytes"].values())
    assert gpu["intensity"] == plan["total"]["flops"]["matrix"] / moved


def test_a_model_is_named_by_its_usual_spelling(capsys: Printed) -> None:
    assert planned(capsys, "Qwen/Qwen3-0.6B") == planned(capsys, "qwen3-0.6b")
    assert planned(capsys, "meta-llama/Llama-3.1-8B-Instruct")["model"] == "llama-3.1-8b"


def test_a_dense_model_has_no_router(capsys: Printed) -> None:
    names = [op["name"] for op in planned(capsys, "llama-3-8b")["ops"]]
    assert names == [name for name in OPS if name != "router"]


def test_phases_have_default_sizes(capsys: Printed) -> None:
    plan = planned(capsys, "qwen3-0.6b", "--phase", "prefill", "--context", "300")
    assert (plan["query"], plan["context"]) == (300, 300)
    plan = planned(capsys, "qwen3-0.6b", "--phase", "backward", "--dtype", "fp32")
    assert (plan["query"], plan["context"], plan["dtype"]) == (1024, 1024, "float32")
    assert sum(plan["total"]["bytes"].values()) == plan["total"]["launches"] == 0
    plan = planned(capsys, "qwen3-0.6b", "--query", "2000")
    assert plan["context"] == 2000


def test_a_checkpoint_directory_and_its_config_give_the_same_plan(
    tmp_path: Path, capsys: Printed
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
    rest = {"model_type": "llama", "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(sizes | heads | rest))
    plan = planned(capsys, str(folder))
    assert plan["model"] == "mine"
    assert plan == planned(capsys, str(folder / "config.json"))


def test_weights_that_no_kernel_reads_are_planned_as_dense_ones(
    tmp_path: Path, capsys: Printed
) -> None:
    dense = KNOWN_CONFIGS["qwen3-30b-a3b"]
    settings = {"quant_method": "fp8", "weight_block_size": [24, 24]}
    (tmp_path / "config.json").write_text(json.dumps({**dense, "quantization_config": settings}))
    plan, usual = planned(capsys, str(tmp_path)), planned(capsys, "qwen3-30b-a3b")
    assert {**plan, "model": "qwen3-30b-a3b"} == usual
    assert cli.run([str(tmp_path), "-m", "plan"]) == 0
    assert "bfloat16 (dequantized from FP8)" in " ".join(capsys.readouterr().out.split())


def test_fp8_takes_its_bytes_and_is_multiplied_at_the_peak_of_fp8(
    tmp_path: Path, capsys: Printed
) -> None:
    config = KNOWN_CONFIGS["llama-3-8b"]
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    work = ["--phase", "prefill", "--batch", "1", "--context", "4096"]
    for gpu, share in (("H100", 0.6), ("A100", 1.0)):  # an A100 has no products of e4m3
        eight, usual = (planned(capsys, name, "--gpu", gpu, *work) for name in (
            str(tmp_path), "llama-3-8b"
        ))  # fmt: skip
        weights = [plan["total"]["bytes"]["weights"] for plan in (eight, usual)]
        assert 0.5 < weights[0] / weights[1] < 0.6
        times = [plan["gpus"][0]["seconds"] for plan in (eight, usual)]
        assert 0.8 * share < times[0] / times[1] <= share
    assert cli.run([str(tmp_path), "-m", "plan"]) == 0
    assert "bfloat16, weights in FP8" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("args", [["--batch", "64"], ["--phase", "prefill", "--batch", "4096"]])
@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_the_terminal(
    capsys: Printed, monkeypatch: pytest.MonkeyPatch, args: list[str], columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    args = ["gpt-oss-120b", "-m", "plan", "--gpu", "all", "--dtype", "float8", *args]
    assert cli.run([*args, "--details"]) == 0
    out = capsys.readouterr().out
    title, *lines = out.splitlines()
    assert "…" not in out
    assert max(map(len, lines)) <= max(columns, 88)  # the notes are up to 88 columns wide
    assert all(len(line) <= columns for line in lines if line.startswith(" "))
    assert title.startswith("gpt-oss-120b: ")
    assert "* A10 computes float8 as bfloat16" in out


def test_several_gpus_may_follow_one_option(capsys: Printed) -> None:
    plan = planned(capsys, "qwen2-0.5b", "--gpu", "A10", "v100", "--gpu", "l40s,MI250 die")
    assert [gpu["name"] for gpu in plan["gpus"]] == ["A10", "V100", "L40S", "MI250 die"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["none"], ["unknown model 'none'", "config.json", "llama-3-8b"]),
        (
            ["Qwen3-0.7B"],
            ["'Qwen3-0.7B'", "did you mean qwen3-1.7b, qwen3-0.6b", "config"],
        ),
        (["qwen2-0.5b", "--query", "5", "--context", "3"], ["--query 5", "--context 3"]),
        (["qwen2-0.5b", "--tensor-parallel", "3"], ["--tensor-parallel", "14 heads", "3 ways"]),
        (["qwen2-0.5b", "--gpu", "H1000"], ["--gpu", "'H1000'", "did you mean", "MI355X", "local"]),
        (["qwen2-0.5b", "--batch", "0"], ["'--batch'", "1<=x"]),
        (["qwen2-0.5b", "--context", "99999999999"], ["'--context'", "x<=1048576"]),
        (["qwen2-0.5b", "--query", "9", "--context", "8"], ["query 9", "context 8"]),
        (["qwen2-0.5b", "--tensor-parallel", "4"], ["14 heads", "4 ways"]),
        (["qwen2-0.5b", "--plot", "x.gif"], ["--plot x.gif", ".png", ".svg"]),
        (["qwen2-0.5b", "--plot", "-", "--format", "json"], ["--plot -", "JSON"]),
        (["qwen2-0.5b", "--price", "2"], ["--price", "-i/--input"]),
        (["qwen2-0.5b", "-i", "x", "--batch", "2"], ["--batch", "-i/--input"]),
        (
            ["qwen2-0.5b", "-i", "x", "--price", "1", "--price", "2"],
            ["--price was given 2 times", "6 GPUs"],
        ),
        (["qwen2-0.5b", "-t", "1"], ["-t/--temperature", "applies only to"]),
    ],
)
def test_an_error_names_the_option_and_the_allowed_values(
    capsys: Printed, args: list[str], words: list[str]
) -> None:
    assert cli.run(["-m", "plan", *args]) == 2
    first = capsys.readouterr().err.splitlines()[0]
    for word in words:
        assert word in first


def test_the_error_on_an_unknown_model_type_names_the_families(
    tmp_path: Path, capsys: Printed
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    assert cli.run([str(tmp_path), "-m", "plan"]) == 1
    error = capsys.readouterr().err
    assert "'resnet'" in error
    assert "gpt_oss" in error


def test_other_modes_need_a_directory_and_refuse_float8(capsys: Printed, tmp_path: Path) -> None:
    assert cli.run(["qwen2-0.5b", "-i", "hi"]) == 2
    assert "qwen2-0.5b" in capsys.readouterr().err
    assert cli.run([str(tmp_path), "-i", "hi", "--dtype", "float8"]) == 2
    assert "float8 is only available in -m plan" in capsys.readouterr().err


def test_a_context_beyond_the_model_is_planned_with_a_warning(capsys: Printed) -> None:
    assert cli.run(["llama-3-8b", "-m", "plan", "--context", "9000"]) == 0
    assert "8192 tokens" in capsys.readouterr().err


def test_the_default_context_is_within_the_models_limit(capsys: Printed) -> None:
    assert cli.run(["-m", "plan"]) == 0
    printed = capsys.readouterr()
    assert "context 512," in printed.out
    assert not printed.err
    assert cli.run(["-m", "plan", "--phase", "prefill"]) == 0
    printed = capsys.readouterr()
    assert "query 512, context 512," in printed.out
    assert not printed.err


def test_a_plan_imports_no_torch() -> None:
    program = (
        "import sys; from getp.cli.main import run; status = run(['qwen2-0.5b', '-m', 'plan']); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_roofline_is_drawn(tmp_path: Path, capsys: Printed, suffix: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"roofline{suffix}"
    planned(capsys, "gpt-oss-20b", "--plot", str(file))
    drawn = file.read_bytes()
    assert drawn.startswith(begins)
    if suffix == ".svg":
        assert b"H100 SXM (ridge 295)" in drawn
    for plot, most in ((str(file), 8), ("-", 9)):
        assert cli.run(["qwen2-0.5b", "-m", "plan", "--gpu", "all", "--plot", plot]) == 2
        expected = f"19 rooflines are too many for one plot; give at most {most} GPUs"
        assert expected in capsys.readouterr().err


def test_the_error_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.run(["qwen2-0.5b", "-m", "plan", "--plot", "x.png"]) == 1
    assert "pip install 'getp[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [80, 120])
def test_the_roofline_on_the_terminal_needs_no_matplotlib_and_names_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: Printed, columns: int
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setenv("COLUMNS", str(columns))
    args = ["gpt-oss-20b", "-m", "plan", "--batch", "32", "--gpu", "H100", "A10", "--plot", "-"]
    assert cli.run(args) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[1:])) <= columns
    assert "rooflines: 1 = H100 SXM, 2 = A10" in out
    for name in OPS[1:]:  # the embedding has no FLOPs
        assert name in out


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "input.txt"
    file.write_text("3\nabcdefgh\nabcd\n" + "a" * 400 + "\n")
    return str(file)


def test_a_job_is_predicted(prompts: str, capsys: Printed) -> None:
    args = ["-i", prompts, "-n", "50", "--gpu", "H100", "A100", "--price", "3", "--price", "1.5"]
    job = planned(capsys, "llama-3-8b", *args)
    # 2, 1 and 100 tokens of four bytes; the last prompt leaves no room within 50 positions.
    assert (job["requests"], job["requests_refused"], job["prompt_tokens"]) == (2, 1, 3)
    assert job["output_tokens"] == 48 + 49
    h100, a100 = job["gpus"]
    assert h100["efficiency"] == {
        "compute": 0.7,
        "memory": 0.7,
        "source": "assumed",
        "at_rates": False,
    }
    assert h100["decode_steps"] == 48
    weights_read = (16.06e9 - 128_256 * 4096 * 2) / (3350e9 * 0.7)  # without the embedding
    assert h100["decode_s"] == pytest.approx(48 * weights_read, rel=0.01)
    assert h100["seconds"] == h100["prefill_s"] + h100["decode_s"]
    assert h100["ttft_s"] == h100["prefill_s"]  # one step
    assert h100["per_token_s"] == pytest.approx(h100["decode_s"] / 48)
    assert h100["tok_s"] == pytest.approx(97 / h100["seconds"])
    assert a100["seconds"] > h100["seconds"]
    assert h100["price"] == pytest.approx(3 * h100["seconds"] / 3600)
    assert a100["price"] == pytest.approx(1.5 * a100["seconds"] / 3600)


def test_a_request_starts_in_the_slot_that_becomes_free_first() -> None:
    job = Job([1] * 5, [9, 6, 4, 3, 2])
    # One of two slots decodes 8 tokens, then 2 or 1; the other decodes 5, 3 and the rest.
    assert decode_batches(job, 2) == [(9, 18), (1, 1)]
    assert decode_batches(job, 5) == [(2, 5 + 4), (3, 3 + 2 * 2), (3, 3)]
    assert decode_batches(job, 1) == [(19, 19)]


def test_a_predicted_job_has_the_order_of_a_real_one() -> None:
    requests = Requests("counted", [5, 3, 4], [None, None, 1], [None] * 3)
    assert make_job(requests, max_positions=100).prompts == [5, 3, 4]
    requests.max_lengths = [10] * 3
    assert make_job(requests, max_positions=100).prompts == [3, 5, 4]


def test_a_job_is_planned_with_the_batch_that_each_gpu_gets(
    prompts: str, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["qwen3-0.6b", "-i", prompts, "--gpu", "RTX 4090,H200"]
    gpus = planned(capsys, *args)["gpus"]
    assert [(one["max_batch_size"], one["max_batch_tokens"]) for one in gpus] == [
        (256, 8192),
        (1024, 16384),
    ]
    given = planned(capsys, *args, "--max-batch-size", "40", "--max-batch-tokens", "100")["gpus"]
    assert {(one["max_batch_size"], one["max_batch_tokens"]) for one in given} == {(40, 100)}
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.run(["qwen3-0.6b", "-m", "plan", *args[1:]]) == 0
    text = capsys.readouterr().out
    assert "At most 256 requests at once and 8,192 tokens per step on RTX 4090." in text
    assert "At most 1,024 requests at once and 16,384 tokens per step on H200." in text
    assert cli.run(["qwen3-0.6b", "-m", "plan", *args[1:], "--max-batch-size", "40"]) == 0
    assert "At most 40 requests at once and 8,192 tokens per step.\n" in capsys.readouterr().out


def test_requests_beyond_the_first_batch_make_the_job_longer(
    tmp_path: Path, capsys: Printed
) -> None:
    file = tmp_path / "input.txt"
    file.write_text("300\n" + "abcd\n" * 300)
    args = ["llama-3-8b", "-i", str(file), "-n", "101", "--gpu", "H100"]
    (two_waves,) = planned(capsys, *args, "--max-batch-size", "256")["gpus"]
    assert (two_waves["decode_steps"], two_waves["mean_batch"]) == (2 * 99, 150)
    assert two_waves["prefill_steps"] == 2
    (one_wave,) = planned(capsys, *args, "--max-batch-size", "300")["gpus"]
    assert (one_wave["decode_steps"], one_wave["mean_batch"]) == (99, 300)
    # The second wave reads the weights as often as the first, but less KV.
    assert 1.5 < two_waves["decode_s"] / one_wave["decode_s"] < 2


def test_each_request_has_its_own_limit_and_refused_ones_are_reported(
    tmp_path: Path, capsys: Printed
) -> None:
    file = tmp_path / "input.jsonl"
    bodies = [
        {"prompt": "abcdefgh", "max_tokens": 1},
        {"prompt": "abcd"},
        {"prompt": [1, 2, 3], "max_tokens": 99},
        {"messages": [{"role": "user", "content": "abcdefgh"}, {"role": "user", "content": "a"}]},
        {"prompt": "abcd", "n": "2"},
        {"prompt": "a" * 400},
    ]
    file.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    args = ["gpt-oss-20b", "-m", "plan", "-i", str(file), "-n", "50", "--max-new-tokens", "7"]
    assert cli.run([*args, "--format", "json"]) == 0
    out, err = capsys.readouterr()
    job = json.loads(out)
    # A token is four bytes; the last prompt leaves no room within 50 positions.
    assert (job["requests"], job["requests_refused"]) == (4, 2)
    assert (job["prompt_tokens"], job["output_tokens"]) == (2 + 1 + 3 + 3, 1 + 7 + 47 + 7)
    assert "would refuse 1 request; the first is in line 5: 'n' must be an integer" in err
    assert cli.run([*args, "-z", str(write_tokenizer(tmp_path / "tokenizer"))]) == 0
    assert "(counted), at most 62 output tokens" in capsys.readouterr().out


def test_a_predicted_job_is_printed_with_its_assumptions(
    prompts: str, tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    gpus = ["--gpu", "A10", "B200", "--price", "3"]
    tokenizer = ["-z", str(write_tokenizer(tmp_path / "tokenizer"))]
    assert cli.run(["gpt-oss-120b", "-m", "plan", "-i", prompts, *gpus, *tokenizer]) == 0
    out = capsys.readouterr().out
    assert "prompt tokens (counted)" in out
    assert "A10" in out
    assert "does not fit" in out
    assert out.count("70%") == 2
    assert "Assumed: 70% of peak FLOP/s, 70% of bandwidth" in out
    assert all(len(line) <= 80 for line in out.splitlines() if line.startswith(" "))


def test_a_plan_shows_the_answer_first_and_the_long_tables_on_request(capsys: Printed) -> None:
    args = ["gpt-oss-20b", "-m", "plan", "--gpu", "H200"]
    assert cli.run(args) == 0
    short = capsys.readouterr().out.splitlines()
    assert short[1].split() == "GPU bound by time per output token tok/s largest batch".split()
    assert short[2].split()[0] == "H200"
    assert len(short) < 10
    assert short[-1].startswith("--details: MFU and MBU, the cost of each operation")
    assert cli.run([*args, "--details"]) == 0
    long = capsys.readouterr().out
    assert long.splitlines()[2].split()[0] == "H200"
    for words in ("MBU", "operation", "gate_up_proj", "collectives", "H200: NVIDIA H200 datasheet"):
        assert words in long
        assert not any(words in line for line in short[:-1])
    assert "--details" not in long


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ([], "time per output token"),
        (["--query", "4"], "time per step"),
        (["--phase", "prefill"], "time to first token"),
        (["--phase", "prefill", "--query", "8", "--context", "64"], "time per step"),
    ],
)
def test_the_time_of_a_step_is_named_by_what_a_request_sees(
    capsys: Printed, args: list[str], name: str
) -> None:
    assert cli.run(["llama-3-8b", "-m", "plan", "--gpu", "H200", *args]) == 0
    assert f" {name} " in capsys.readouterr().out.splitlines()[1]


def test_a_predicted_job_shows_both_latencies_and_its_phases_on_request(
    prompts: str, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    args = ["llama-3-8b", "-m", "plan", "-i", prompts, "--gpu", "H200"]
    assert cli.run(args) == 0
    short = capsys.readouterr().out
    header = "GPU bound by time tok/s time to first token time per output token"
    assert header.split() in [line.split() for line in short.splitlines()]
    assert cli.run([*args, "--details"]) == 0
    long = capsys.readouterr().out
    longer = [*header.split(), "prefill", "decode", "batch"]
    assert longer in [line.split() for line in long.splitlines()]


@pytest.mark.parametrize("job", [True, False])
def test_tables_truncate_no_word(
    prompts: str, capsys: Printed, monkeypatch: pytest.MonkeyPatch, job: bool
) -> None:
    args = ["gpt-oss-120b", "-m", "plan", "--gpu", "MI250 die,H200", "--tensor-parallel", "8"]
    args += ["-i", prompts, "--price", "3"] if job else ["--details"]
    monkeypatch.delenv("COLUMNS", raising=False)
    assert cli.run(args) == 0
    piped = capsys.readouterr().out
    assert ("2 replicas × TP=4 (" if job else "Infinity Fabric 3  ") in piped
    assert "MI250 die " in piped
    for columns in (30, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert cli.run(args) == 0
        out = capsys.readouterr().out
        assert Counter(out.split()) == Counter(piped.split())
    assert max(len(line) for line in out.splitlines() if line.startswith(" ")) <= 80


def test_the_local_device_is_measured_once_and_shows_the_date(
    tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def small(target: object) -> dict[str, Any]:
        calls.append(target)
        peaks = {"float32": 1e11, "bfloat16": 2e11}
        return {"date": "2030-01-02", "peaks": peaks, "bandwidth": 1e10, "launch_s": 1e-6,
                "memory": 2**33, "rates": None}  # fmt: skip

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "measure", small)
    for _ in range(2):
        (gpu,) = planned(capsys, "qwen2-0.5b", "--gpu", "local")["gpus"]
        assert gpu["ridge"] == 20
    assert len(calls) == 1
    assert cli.run(["qwen2-0.5b", "-m", "plan", "--gpu", "local"]) == 0
    assert "2030-01-02" in capsys.readouterr().out
    (tmp_path / "getp" / "hardware.json").write_text('{"broken": ')
    planned(capsys, "qwen2-0.5b", "--gpu", "local")
    assert len(calls) == 2
    planned(capsys, "qwen2-0.5b", "--gpu", "local", "--measure")
    assert len(calls) == 3


def test_a_cpu_is_planned_at_the_rates_of_its_kernels(
    prompts: str, tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its peaks nor the efficiency of an earlier run count, and limits are a CPU's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu = torch.device("cpu")
    entry = {"date": "2030-01-02", "peaks": {"float32": 1e11}, "bandwidth": 1e10, "launch_s": 0}
    rates = Rates(
        {"bfloat16": [(1, 1e-12, 0.0), (64, 1e-12, 0.0)]},
        0.0,
        {"bfloat16": [(1, 0.0)]},
        *(0.0, 0.0, 0.0, 0.0, 0.0),
        0.25,
    )
    entry |= {"memory": 2**34, "rates": rates.as_json()}
    measure.write_cache({measure.cache_key(cpu): entry})
    measure.store_efficiency(cpu, "qwen2-0.5b", 0.25)
    (step,) = planned(capsys, "qwen2-0.5b", "--gpu", "local", "--batch", "2")["gpus"]
    weights = 357_826_560 + 151_936 * 896  # of all linear layers, and of the head
    assert step["seconds"] == pytest.approx(0.25 + weights * 1e-12)
    assert step["tok_s"] == pytest.approx(2 / step["seconds"])
    (job,) = planned(capsys, "qwen2-0.5b", "-i", prompts, "--gpu", "local")["gpus"]
    assert job["per_token_s"] == pytest.approx(0.25 + weights * 1e-12)
    assert (job["max_batch_size"], job["max_batch_tokens"]) == (64, 512)
    assert job["efficiency"]["at_rates"]
    # Until copies of weights are made, 32 steps of up to 8 rows take the time of more rows.
    speeds = [(8, 1e-12, 0.0), (9, 4e-12, 0.0), (64, 4e-12, 0.0)]
    entry["rates"] = replace(rates, products={"bfloat16": speeds}, copied_rows=8.0).as_json()
    measure.write_cache({measure.cache_key(cpu): entry})
    for options, early in (([], 32), (["--max-batch-size", "8"], 0)):
        (job,) = planned(capsys, "qwen2-0.5b", "-i", prompts, "--gpu", "local", *options)["gpus"]
        steps = job["decode_steps"]
        expected = 0.25 * steps + weights * 1e-12 * (steps + 3 * min(early, steps))
        assert job["decode_s"] == pytest.approx(expected)
    for options in ([], ["-i", prompts]):
        assert cli.run(["qwen2-0.5b", "-m", "plan", "--gpu", "local", *options]) == 0
        assert "at the measured rates of its kernels" in capsys.readouterr().out


def test_predictions_use_the_efficiency_of_the_last_run_here(
    prompts: str, tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu = torch.device("cpu")
    entry = {"date": "2030-01-02", "peaks": {"float32": 1e11}, "bandwidth": 1e10}
    measure.write_cache(
        {measure.cache_key(cpu): entry | {"launch_s": 0, "memory": 2**34, "rates": None}}
    )
    args = ["qwen2-0.5b", "-i", prompts, "--gpu", "local", "A10"]
    before, other = planned(capsys, *args)["gpus"]
    assert "measured on" in before["efficiency"]["source"]
    measure.store_efficiency(cpu, "qwen2-0.5b", 0.25)
    after, other_after = planned(capsys, *args)["gpus"]
    assert after["efficiency"]["compute"] == after["efficiency"]["memory"] == 0.25
    assert "last run of qwen2-0.5b here" in after["efficiency"]["source"]
    assert after["seconds"] == pytest.approx(4 * before["seconds"])
    assert other == other_after


def test_this_machine_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_BIGGEST_PRODUCT", 256)
    monkeypatch.setattr(measure, "_RUNS", 1)
    for name, value in (
        ("_PASSES", 1), ("_SIZE", 128), ("_ROWS", (1, 8)), ("_EXPERT_ROWS", (1, 2)),
        ("_WEIGHT_BYTES", 1 << 20), ("_NORMS", 2), ("_CONTEXT", 64), ("_SHORT", 32),
        ("_QUERY", 32), ("_KV_BYTES", 1 << 20), ("_LOGITS", (2, 256)),
    ):  # fmt: skip
        monkeypatch.setattr(measure_rates, name, value)
    found = measure.measure(measure.default_target())
    assert 0 < found["launch_s"] < 1
    assert found["peaks"]["float32"] > 1e8
    assert 1e7 < found["bandwidth"] < 1e15
    assert found["memory"] > 2**28
    rates = Rates.parse(json.loads(json.dumps(found["rates"])))
    assert rates.products.keys() >= {"float32", "bfloat16"}
    if choose_backend(torch.device("cpu"), torch.bfloat16).keeps_integers(quantizes=True):
        assert rates.products.keys() >= {"int8", "int4"}
        assert rates.decode.keys() == {"bfloat16", "int8", "fp8"}
    for speeds in rates.products.values():
        assert all(each > 0 or more > 0 for _, each, more in speeds)
    assert min(rates.kernel_s, rates.prefill_s, rates.logit_s, rates.host_s) > 0
    assert all(each > 0 for speeds in rates.decode.values() for _, each in speeds)


def test_a_slow_product_is_not_timed_at_larger_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's bfloat16 without AVX-512 is a hundred times slower than the kernels of getp."""
    timed = []

    def best(function: Callable[[], object], target: torch.device) -> float:
        assert isinstance(function, partial)
        by_torch = function.func is torch.nn.functional.linear
        size = len(function.args[0])
        timed.append((by_torch, size))
        return 1.0 if by_torch else 1e-9 * size

    monkeypatch.setattr(measure, "_best", best)
    monkeypatch.setattr(measure, "_BIGGEST_PRODUCT", 1024)
    rate = measure._product_rate(torch.device("cpu"), torch.bfloat16)
    assert [size for by_torch, size in timed if by_torch] == [256]
    assert [size for by_torch, size in timed if not by_torch] == [256, 512, 1024]
    assert rate == pytest.approx(2 * 1024**2 * 1e9)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "-"), (0.5, "0.5"), (999, "999"), (999.7, "1.00k"), (399e6, "399M"), (12_345, "12.3k")],
)
def test_quantities_have_three_digits_and_a_prefix(value: float, shown: str) -> None:
    assert quantity(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(7.5e-6, "7.50 μs"), (0.00435, "4.35 ms"), (0.5, "500 ms"), (90, "90.0 s"), (600, "10.0 min")],
)
def test_durations_have_a_suitable_unit(value: float, shown: str) -> None:
    assert duration(value) == shown
