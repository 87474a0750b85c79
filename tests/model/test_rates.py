"""The time of a step at measured rates of kernels."""

from dataclasses import fields, replace
from typing import Any

import pytest

from model.cost.known_models import named_config
from model.cost.mlp_cost import distinct_experts
from model.cost.operations import operations
from model.cost.rates import Rates, step_seconds
from model.cost.workload import Op, Workload, state_bytes

PRODUCTS = {
    "bfloat16": [(1.0, 1.0, 10.0), (4.0, 1.0, 10.0), (8.0, 2.0, 10.0)],
    "mxfp4": [(1.0, 0.5, 0.0), (16.0, 2.0, 0.0)],
}
ZERO: dict[str, Any] = {field.name: 0.0 for field in fields(Rates) if field.name != "products"}
ZERO["decode"] = {"bfloat16": [(1.0, 0.0)]}
QWEN2 = named_config("qwen2-0.5b")


def ops_of(name: str, work: Workload) -> dict[str, Op]:
    return {op.name: op for op in operations(named_config(name), work)}


@pytest.mark.parametrize(
    ("rows", "each"), [(1, 1.0), (2, 1.0), (4, 1.0), (6, 1.5), (8, 2.0), (16, 4.0)]
)
def test_products_take_the_time_of_their_rows(rows: int, each: float) -> None:
    """Between measured numbers of rows it grows linearly, beyond them in proportion."""
    work = Workload("decode", rows, 1, 9, "bfloat16")
    op = ops_of("qwen2-0.5b", work)["down_proj"]
    besides = 10.0 * (2 if rows == 16 else 1)
    expected = 24 * (4864 * 896 * each + besides)
    assert Rates(PRODUCTS, **ZERO).op_seconds(op, QWEN2, work) == pytest.approx(expected)


def test_experts_take_the_time_of_the_rows_that_each_one_has() -> None:
    for tokens in (1, 8, 64):
        work = Workload("decode", tokens, 1, 9, "bfloat16")
        op = ops_of("gpt-oss-20b", work)["gate_up_proj"]
        experts = distinct_experts(32, 4, tokens)
        assert len(op.products) == 2  # layers with a window, and without
        for product in op.products:
            assert (product.kind, product.count) == ("mxfp4", 12)
            assert product.rows == pytest.approx(4 * tokens / experts)
            assert product.weights == pytest.approx(12 * experts * 2 * 2880 * 2880)


def test_products_are_all_matrix_operations_but_attention() -> None:
    for name in ("qwen2-0.5b", "gpt-oss-20b", "llama-3-8b"):
        for op in operations(named_config(name), Workload("prefill", 2, 64, 64, "bfloat16")):
            flops = sum(2 * each.rows * each.weights for each in op.products)
            if op.name != "attention":
                assert flops == pytest.approx(op.flops.matrix)


def test_attention_takes_the_time_of_as_many_query_heads_as_share_a_kv_head() -> None:
    work = Workload("decode", 3, 1, 1000, "bfloat16", causal=True)
    decode = {"bfloat16": [(1.0, 1.0), (4.0, 2.0), (8.0, 6.0)], "int8": [(1.0, 5.0), (8.0, 5.0)]}
    rates = Rates(PRODUCTS, **{**ZERO, "decode": decode, "sequence_s": 2.0})
    keys = 24 * 3 * 1000 * 64
    for heads, kv_heads, each in ((1, 1, 1.0), (7, 1, 5.0), (14, 2, 5.0), (16, 1, 12.0)):
        config = replace(QWEN2, num_heads=heads, num_kv_heads=kv_heads)
        op = {op.name: op for op in operations(config, work)}["attention"]
        found = rates.op_seconds(op, config, work)
        assert found == pytest.approx(kv_heads * keys * each + 24 * 3 * 2)


@pytest.mark.parametrize(("dtype", "each"), [("int8", 5.0), ("fp8", 0.5), ("float32", 2.0)])
def test_a_kv_cache_takes_the_time_of_its_dtype_or_of_as_many_bytes(
    dtype: str, each: float
) -> None:
    work = Workload("decode", 3, 1, 1000, "bfloat16", causal=True)
    decode = {"bfloat16": [(1.0, 1.0), (20.0, 1.0)], "int8": [(1.0, 5.0), (8.0, 5.0)]}
    rates, config = Rates(PRODUCTS, **{**ZERO, "decode": decode}), replace(QWEN2, kv_dtype=dtype)
    op = {op.name: op for op in operations(config, work)}["attention"]
    assert rates.op_seconds(op, config, work) == pytest.approx(24 * 3 * 1000 * 2 * 64 * each)


def test_attention_of_chunks_computes() -> None:
    chunk = Workload("prefill", 1, 100, 100, "bfloat16", causal=True)
    prefill = Rates(PRODUCTS, **{**ZERO, "prefill_s": 1.0})
    op = ops_of("qwen2-0.5b", chunk)["attention"]
    assert prefill.op_seconds(op, QWEN2, chunk) == pytest.approx(24 * 5050 * 14 * 64)


def test_a_step_adds_the_choice_of_tokens_and_the_host() -> None:
    config, work = named_config("qwen2-0.5b"), Workload("decode", 8, 1, 100, "bfloat16")
    free = {"bfloat16": [(1.0, 0.0, 0.0)]}
    rates = Rates(free, **{**ZERO, "host_s": 3.0, "logit_s": 1.0})
    assert step_seconds(config, work, rates) == pytest.approx(3 + 8 * 151_936)


@pytest.mark.parametrize("products", [{}, {"bfloat16": []}])
def test_rates_without_products_are_refused(products: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="no rates of products"):
        Rates.parse({**ZERO, "products": products})
    with pytest.raises(ValueError, match="no rates of attention"):
        Rates.parse({**ZERO, "products": PRODUCTS, "decode": {}})
    assert Rates.parse(Rates(PRODUCTS, **ZERO).as_json()) == Rates(PRODUCTS, **ZERO)


def test_without_copies_few_rows_take_the_time_of_more() -> None:
    rates = Rates(PRODUCTS, **{**ZERO, "copied_rows": 4.0})
    work = Workload("decode", 2, 1, 9, "bfloat16")
    op, eight = (ops_of("qwen2-0.5b", replace(work, batch=rows))["down_proj"] for rows in (2, 8))
    expected = rates.op_seconds(eight, QWEN2, replace(work, batch=8))
    assert rates.without_copies().op_seconds(op, QWEN2, work) == expected
    assert rates.op_seconds(op, QWEN2, work) < expected
    assert rates.without_copies().products["mxfp4"] == PRODUCTS["mxfp4"]
    without = Rates(PRODUCTS, **ZERO)
    assert without.without_copies() == without


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_quantized_head_is_a_product_in_its_format(name: str) -> None:
    work = Workload("decode", 1, 1, 9, "bfloat16")
    ops = {op.name: op for op in operations(QWEN2.quantized(name), work)}
    kinds = {op.products[0].kind for op in (ops["lm_head"], ops["down_proj"])}
    assert kinds == {name}


def test_states_of_recurrent_layers_take_the_time_of_their_bytes() -> None:
    config = named_config("qwen3-next-80b-a3b")
    work = Workload("decode", 3, 1, 1000, "bfloat16", causal=True)
    op = {op.name: op for op in operations(config, work)}["attention"]
    rates = Rates(PRODUCTS, **{**ZERO, "moved_byte_s": 1.0})
    states = 2 * 3 * state_bytes(config, 2)
    assert 0 < states < op.bytes.kv
    for kv_dtype in ("auto", "int8"):
        found = rates.op_seconds(op, replace(config, kv_dtype=kv_dtype), work)
        assert found == pytest.approx(states)
    decode = Rates(PRODUCTS, **{**ZERO, "decode": {"bfloat16": [(1.0, 1.0), (99.0, 1.0)]}})
    keys = (op.bytes.kv - states) / 4  # a key and a value of two bytes each
    assert decode.op_seconds(op, config, work) == pytest.approx(keys)


def test_only_the_stored_weights_of_latent_attention_are_products_in_their_format() -> None:
    config = named_config("deepseek-v3").quantized("fp8")
    work = Workload("decode", 1, 1, 9, "bfloat16")
    ops = {op.name: op for op in operations(config, work)}
    for name in ("qkv_proj", "o_proj"):
        assert {(each.kind, each.is_float8) for each in ops[name].products} == {
            ("fp8", True), ("dense", False),
        }  # fmt: skip
