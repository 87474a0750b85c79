"""Communication between GPUs: bytes and time, and tensor parallelism compared with replicas."""

import json
from pathlib import Path

import pytest

from getp.cli import main as cli
from model.cost.devices import DEVICES, find_device
from model.cost.interconnect import LINKS, exchange
from model.cost.known_models import named_config
from model.cost.operations import check_tensor_parallel
from model.cost.workload import Workload


def test_a_step_sends_two_activations_per_layer_and_one_more() -> None:
    work = Workload("decode", 32, 1, 1024, "bfloat16", 4)
    sent = exchange(named_config("llama-3-8b"), work)
    assert sent.collectives == 2 * 32 + 1 + 1
    activation = 32 * 4096 * 2
    assert sent.bytes == 65 * activation * 2 * 3 // 4 + 3 * 32 * 16
    link = LINKS["NVLink 4"]
    assert sent.seconds(link) == pytest.approx(66 * 10e-6 + sent.bytes / 450e9)


def test_one_gpu_sends_nothing_and_more_gpus_send_more() -> None:
    config, work = named_config("llama-3-8b"), Workload("prefill", 4, 512, 512, "bfloat16")
    found = [exchange(config, work, ranks).bytes for ranks in (1, 2, 4, 8)]
    assert found[0] == 0
    assert found == sorted(set(found))
    assert found[3] < 2 * found[1]  # a ring: less than twice the data, with any number of GPUs


def test_every_device_has_a_link() -> None:
    assert all(LINKS[device.link.name] is device.link for device in DEVICES)
    assert find_device("H200").link.bandwidth == 450e9
    assert find_device("MI250").link.name == find_device("MI250 die").link.name


def test_the_error_on_an_impossible_split_names_the_possible_ones() -> None:
    with pytest.raises(
        ValueError, match=r"this model .14 heads, 2 KV heads, MLP 4864. .* possible: 1, 2"
    ):
        check_tensor_parallel(named_config("qwen2-0.5b"), 4)


def test_communication_adds_to_the_time_of_a_shared_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["llama-3-8b", "-m", "plan", "--batch", "8", "--tensor-parallel", "4", "--gpu", "H200"]
    assert cli.run([*args, "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (gpu,) = plan["gpus"]
    assert plan["tensor_parallel"] == 4
    assert list(plan["exchange"]) == ["2", "4", "8"]
    assert gpu["link_s"] == plan["exchange"]["4"]["seconds"][gpu["link"]] > 0
    assert gpu["tok_s"] == pytest.approx(8 / gpu["seconds"])
    moved = sum(plan["total"]["bytes"].values()) / find_device("H200").bandwidth
    launches = plan["total"]["launches"] * find_device("H200").launch_s
    assert gpu["seconds"] == pytest.approx(max(moved, launches) + gpu["link_s"])
    assert cli.run([*args, "--details"]) == 0
    printed = capsys.readouterr().out
    assert "NVLink 4: half of 900 GB/s" in printed
    assert "Ethernet 400G" in printed


def test_a_job_is_predicted_for_every_layout_of_the_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("64\n" + "What is the answer to this question?\n" * 64)
    args = ["llama-3-8b", "-m", "plan", "-i", str(prompts), "-n", "200", "--tensor-parallel", "4"]
    assert cli.run([*args, "--gpu", "H200", "A10", "--price", "2", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["gpus"]
    layouts = [(one["name"], one["tensor_parallel"], one["replicas"]) for one in found]
    expected = [(4, 1), (2, 2), (1, 4)]
    assert layouts == [(name, *each) for name in ("H200", "A10") for each in expected]
    for one in found[:3]:
        assert one["price"] == pytest.approx(4 * 2 * one["seconds"] / 3600)
        assert (one["link_s"] > 0) == (one["tensor_parallel"] > 1)
    # Few requests on slow memory: every replica reads all weights for its share of them.
    assert found[3]["seconds"] == min(one["seconds"] for one in found[3:])
    assert cli.run([*args, "--gpu", "H200"]) == 0
    printed = capsys.readouterr().out
    assert "2 replicas × TP=2" in printed
    assert "4 replicas" in printed
