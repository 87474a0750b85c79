"""Products with weights of 4 and 8 bits: checks, and their times beside those of bf16."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_sections.checks import problems_of
from benchmarks.gpu_sections.inputs import CUDA, kernels, linear_of, rand
from benchmarks.gpu_sections.measure import Limits, Row, seconds_of
from model.config import ModelConfig
from model.cost.known_models import named_config
from model.formats import FP8, WeightFormat
from model.formats.float8 import Float8
from model.formats.integers import Integers
from model.ops.specs import Linear

FORMS: dict[str, WeightFormat] = {
    "W4A16, groups of 128": Integers(4, 128, has_zeros=True, quantizes=False),
    "W8A16, channels": Integers(8, 0, quantizes=False),
    "FP8 weights, bf16 inputs": Float8(),
    "FP8, channels": FP8,
    "FP8, blocks of 128": Float8(128, "dynamic"),
}
_ROWS = (1, 64, 1024)
_OPERATIONS = ("linear", "logits", "norm_mlp", "experts", "norm_experts")


def check_quantized() -> Iterator[str | None]:
    """Check linears and experts with weights in each form, at the widths of real models."""
    for model in ("llama-3.1-8b", "qwen3-30b-a3b"):
        config = named_config(model)
        for name, form in FORMS.items():
            yield from problems_of(
                kernels(), f"{model}, {name}", with_weights(config, form), _OPERATIONS
            )


def with_weights(config: ModelConfig, form: WeightFormat) -> ModelConfig:
    """Return the config with all linears of its layers in one form."""
    layers = (replace(layer, formats=layer.formats.quantized(form)) for layer in config.layers)
    return replace(config, layers=tuple(layers))


def time_quantized(limits: Limits) -> Iterator[Row]:
    """Time the linears of a layer of Llama-3-8B: microseconds of all four, and the time of bf16."""
    config, ops = named_config("llama-3-8b"), kernels()
    hidden, size = config.hidden_size, config.intermediate_size
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    attended = config.num_heads * config.head_dim
    shapes = ((qkv, hidden), (hidden, attended), (2 * size, hidden), (hidden, size))
    generator = torch.Generator(CUDA).manual_seed(0)
    dense = [linear_of(rand(*shape, dtype=torch.bfloat16, scale=0.02)) for shape in shapes]
    inputs = {
        (rows, shape[1]): rand(rows, shape[1], dtype=torch.bfloat16)
        for rows in _ROWS
        for shape in shapes
    }

    def seconds(layers: list[Linear], rows: int) -> float:
        def call() -> list[Any]:
            return [ops.linear(inputs[rows, layer.inputs], layer) for layer in layers]

        return seconds_of(partial(call))

    usual = {rows: seconds(dense, rows) for rows in _ROWS}
    for rows, spent in usual.items():
        yield Row(f"bf16, {rows} rows", spent * 1e6, "us")
    for name, form in FORMS.items():
        layers = []
        for outputs, width in shapes:
            weight = form.allocate(ops, (outputs, width))
            form.fill_random(weight, generator)
            layers.append(Linear(width, outputs, False, form, weight=form.finish(ops, weight)))
        moved = sum(form.bytes(shape, 2) for shape in shapes)
        for rows in _ROWS:
            spent = seconds(layers, rows)
            title = f"{name}, {rows} rows"
            yield Row(title, spent * 1e6, "us", usual[rows] / spent, "bf16's speed")
            if rows == 1:
                yield Row(title, moved / spent / 1e12, "TB/s", moved / spent / limits.copy, "copy")
