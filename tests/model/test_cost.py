"""The parts of the cost model that no document covers: experts, windows, MXFP4, splits, memory."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import CheckpointError, ModelConfig
from model.cost.devices import DEVICES, UnknownDeviceError, find_device
from model.cost.known_models import KNOWN_CONFIGS, named_config
from model.cost.mlp_cost import distinct_experts
from model.cost.operations import (
    kv_bytes_per_sequence,
    operations,
    parameter_bytes,
    total,
)
from model.cost.roofline import bound, largest_batch
from model.cost.workload import Workload
from model.families import parse_config


@pytest.mark.parametrize(("tokens", "experts"), [(1, 4.0), (2, 7.5), (10**6, 32.0)])
def test_expected_number_of_distinct_experts(tokens: int, experts: float) -> None:
    assert distinct_experts(32, 4, tokens) == pytest.approx(experts)


def test_only_chosen_experts_are_read() -> None:
    config = named_config("gpt-oss-20b")
    read = {}
    for batch in (1, 2, 4096):
        ops = {
            op.name: op for op in operations(config, Workload("decode", batch, 1, 9, "bfloat16"))
        }
        read[batch] = ops["gate_up_proj"].bytes.weights
    one = 5760 * 90 * 17 + 5760 * 2  # 90 blocks of 32 values in 17 bytes, and a bias
    assert read == {1: 24 * 4 * one, 2: 24 * round(7.5 * one), 4096: 24 * 32 * one}


def test_a_shared_expert_is_read_and_computed_for_every_token() -> None:
    config = named_config("qwen1.5-moe-a2.7b")
    assert config.moe is not None
    routed = dataclasses.replace(config, moe=dataclasses.replace(config.moe, shared_size=0))
    work = Workload("decode", 3, 1, 9, "bfloat16")
    whole, part = ({op.name: op for op in operations(each, work)} for each in (config, routed))
    for name, outputs in (("gate_up_proj", 2 * 5632), ("down_proj", 5632)):
        shared = 24 * 2048 * outputs
        gate = 24 * 2048 if name == "down_proj" else 0  # which has one output
        assert whole[name].bytes.weights - part[name].bytes.weights == 2 * (shared + gate)
        assert whole[name].flops.matrix - part[name].flops.matrix == 2 * 3 * (shared + gate)
        assert whole[name].layer_count == part[name].layer_count == 24


def test_latents_take_the_place_of_keys_and_values() -> None:
    config = named_config("deepseek-v2-lite")
    assert kv_bytes_per_sequence(config, 1, "bfloat16") == 27 * 576 * 2  # DeepSeek-V2, table 1
    assert kv_bytes_per_sequence(config, 1, "bfloat16", tensor_parallel=4) == 27 * 576 * 2
    ops = {op.name: op for op in operations(config, Workload("decode", 1, 1, 1000, "bfloat16"))}
    assert ops["attention"].bytes.kv == 27 * 576 * 2 * 1000
    assert ops["attention"].flops.matrix == 27 * 16 * 2 * (576 + 512) * 1000


def test_all_figures_are_integers_even_with_a_fraction_of_an_expert() -> None:
    work = Workload("decode", 3, 1, 9, "bfloat16", tensor_parallel=8)
    for op in operations(named_config("gpt-oss-120b"), work):
        figures = [*dataclasses.astuple(op.flops), *dataclasses.astuple(op.bytes), op.launches]
        assert all(type(figure) is int for figure in figures)


def test_a_window_limits_attended_and_read_positions() -> None:
    config = named_config("gpt-oss-20b")  # every other layer has a window of 128
    ops = {op.name: op for op in operations(config, Workload("decode", 1, 1, 1000, "bfloat16"))}
    assert ops["attention"].flops.matrix == 12 * 4 * 64 * 64 * (128 + 1000)
    assert ops["attention"].bytes.kv == 12 * 2 * 8 * 64 * 2 * (128 + 1000)
    assert kv_bytes_per_sequence(config, 1000, "bfloat16") == ops["attention"].bytes.kv


@given(st.integers(1, 40), st.integers(0, 40), st.none() | st.integers(1, 50), st.integers(1, 3))
def test_causal_attention_counts_each_pair_once(
    query: int, before: int, window: int | None, batch: int
) -> None:
    context = before + query
    work = Workload("prefill", batch, query, context, "float32", causal=True)
    attended = [min(position + 1, window or context) for position in range(before, context)]
    assert work.attended(window) == batch * sum(attended)
    first_read = max(0, before - (window - 1)) if window else 0
    assert work.kv_positions(window) == batch * (context - first_read)


@pytest.mark.parametrize(("causal", "rows"), [(True, 23 * 200 + 2), (False, 24 * 200)])
def test_the_last_mlp_counts_the_rows_that_need_logits(causal: bool, rows: int) -> None:
    work = Workload("prefill", 2, 100, 100, "bfloat16", causal=causal)
    ops = {op.name: op for op in operations(named_config("qwen2-0.5b"), work)}
    assert ops["gate_up_proj"].flops.matrix == rows * 2 * 896 * 2 * 4864
    assert ops["gate_up_proj"].layer_count == 24
    assert ops["o_proj"].flops.matrix == 24 * 200 * 2 * 896 * 896


def _width_on_every_gpu(config: ModelConfig) -> int:
    """Return the outputs of a token's projections that each GPU computes whole, in all layers.

    These are the scores of the experts, the gate of shared ones, and the projections to latents.
    """
    latent, moe, width = config.latent, config.moe, 0
    for layer in config.layers:
        if latent is not None:
            width += config.head_dim + (latent.query_rank or 0)
        if layer.sparse and moe is not None:
            width += moe.num_experts + moe.shared_gate
    return width


@pytest.mark.parametrize("name", KNOWN_CONFIGS)
@pytest.mark.parametrize("fused", [False, True])
def test_two_gpus_halve_the_work(name: str, fused: bool) -> None:
    config = named_config(name)
    has_halves = not config.num_kv_heads % 2 or config.latent is not None
    if config.num_heads % 2 or not has_halves or config.whole_qk_norm:
        pytest.skip("cannot be split in equal parts")
    one = total(operations(config, Workload("prefill", 4, 64, 64, "bfloat16", fused=fused)))
    two = total(operations(config, Workload("prefill", 4, 64, 64, "bfloat16", 2, fused=fused)))
    whole = config.hidden_size * _width_on_every_gpu(config)  # weights that every GPU has
    assert two.flops.matrix == pytest.approx((one.flops.matrix + 2 * 256 * whole) / 2, rel=0.001)
    kv_shares = 2 if config.latent is None else 1  # every GPU has the latents
    assert two.bytes.kv == one.bytes.kv / kv_shares
    assert two.bytes.weights == pytest.approx((one.bytes.weights + 2 * whole) / 2, rel=0.001)


@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-3-1b", "llama-3.2-1b", "qwen3-0.6b"])
def test_a_step_reads_every_weight_once(name: str) -> None:
    """Also the norms before and after attention and MLP; tied embeddings are read as the head."""
    config = named_config(name)
    ops = operations(config, Workload("decode", 1, 1, 1, "bfloat16"))
    read = sum(op.bytes.weights for op in ops if op.name != "embedding")
    assert read == parameter_bytes(config, "bfloat16")


def test_an_impossible_split_is_refused() -> None:
    with pytest.raises(ValueError, match="14 heads"):
        operations(named_config("qwen2-0.5b"), Workload("decode", 1, 1, 1, "float32", 4))


@pytest.mark.parametrize("name", KNOWN_CONFIGS)
def test_fusion_changes_activations_and_launches_only(name: str) -> None:
    work = Workload("decode", 8, 1, 100, "bfloat16")
    plain = total(operations(named_config(name), work))
    fused = total(operations(named_config(name), dataclasses.replace(work, fused=True)))
    assert (fused.flops, fused.bytes.weights, fused.bytes.kv) == (
        plain.flops,
        plain.bytes.weights,
        plain.bytes.kv,
    )
    assert fused.bytes.activations < plain.bytes.activations
    assert fused.launches == 2 * len(named_config(name).layers) + 2 < plain.launches


@pytest.mark.parametrize("sizes", [(0, 1, 1, "float32"), (1, 2, 1, "float32"), (1, 1, 1, "int8")])
def test_invalid_workloads_are_refused(sizes: tuple[int, int, int, str]) -> None:
    with pytest.raises(ValueError, match=r"must be|more than|not one of"):
        Workload("decode", *sizes)


def test_a_bound_names_the_limit() -> None:
    h100 = find_device("H100")
    limits = {}
    for name, phase, batch, query in (
        ("llama-3-8b", "prefill", 32, 1024),
        ("llama-3-8b", "decode", 32, 1),
        ("qwen2-0.5b", "decode", 1, 1),
    ):
        work = Workload(phase, batch, query, 1024, "bfloat16")  # type: ignore[arg-type]
        found = bound(total(operations(named_config(name), work)), h100, "bfloat16", work.tokens)
        limits[name, phase] = found.limit
        assert max(found.mfu, found.mbu) <= 1
        assert found.tok_s * found.seconds == pytest.approx(work.tokens)
    assert list(limits.values()) == ["compute", "memory", "launch"]


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    config, device = named_config("llama-3-8b"), find_device("A100 SXM 40GB")
    work = Workload("decode", 1, 1, 1024, "bfloat16")
    batch = largest_batch(config, work, device)
    room = device.memory * 0.9 - parameter_bytes(config, "bfloat16")
    each = kv_bytes_per_sequence(config, 1024, "bfloat16")
    assert batch * each <= room < (batch + 1) * each
    assert largest_batch(named_config("gpt-oss-120b"), work, device) == 0


def test_devices_are_found_in_any_spelling() -> None:
    assert find_device("nvidia h100-sxm").name == "H100 SXM"
    assert find_device("a100 pcie").name == "A100 PCIe 40GB"
    assert all(find_device(device.name) is device for device in DEVICES)
    die, whole = find_device("MI250 die"), find_device("MI250")
    assert die.ridge("float16") == whole.ridge("float16")
    assert 2 * die.memory == whole.memory


def test_the_error_on_an_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(
        UnknownDeviceError, match=r"unknown GPU 'H10O'; did you mean H100.*V100.*MI355X, local"
    ):
        find_device("H10O")


def test_a_dtype_without_units_is_computed_in_a_wider_one() -> None:
    v100 = find_device("V100")
    assert (v100.computes_in("bfloat16"), v100.computes_in("float8")) == ("float16", "float16")
    assert find_device("H100").peak("float8") == pytest.approx(2 * 989.4e12, rel=1e-3)


def test_a_config_given_as_a_dictionary_is_checked_like_a_file() -> None:
    with pytest.raises(CheckpointError, match=r"my model: model_type 'bert'.*supported: .*qwen2"):
        parse_config({"model_type": "bert"}, "my model")
