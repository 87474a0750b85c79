"""The process that tries captures before the engine does: a crash ends only this process.

Run as `python -m engine.execution.capture_child CHECKPOINT DEVICE DTYPE KV_DTYPE BLOCK_SIZE`. It
captures and replays decode steps of a model with the checkpoint's layers, so that its graphs have
as many kernels as the engine's. Weights are random, and layers of the same kind share them. Exits
with status 0 unless it crashes: a capture that raises an error is not a crash.
"""

import sys
from array import array
from collections.abc import Callable
from dataclasses import replace

import torch

import model  # noqa: F401  before torch: see engine
from engine.execution.capture import Capture, GpuCapture
from engine.execution.capture_fallback import capture_if_possible
from engine.execution.model_runner import ModelRunner
from engine.parallel.step_message import StepMessage
from engine.stats import EngineStats
from model import ModelConfig, Transformer, load_config, loader

_ROWS = 4
_MAX_VOCAB = 4096
_POSITIONS = 64


def small_runner(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, block_size: int
) -> ModelRunner:
    """A runner with the layers of the model; layers of the same kind share one set of weights."""
    config = replace(config, vocab_size=min(config.vocab_size, _MAX_VOCAB))
    if config.moe is not None:
        router = config.moe.router
        experts = min(config.moe.num_experts, router.smallest_count(2 * router.top_k))
        config = replace(config, moe=replace(config.moe, num_experts=experts))
    runner = ModelRunner(config, device, dtype)
    config = runner.config
    kinds = tuple(dict.fromkeys(config.layers))
    small = Transformer(replace(config, layers=kinds))
    loader.load_dummy(small, runner.backend)
    layers = dict(zip(kinds, small.layers, strict=True))
    small.layers = [layers[kind] for kind in config.layers]
    runner.model = small
    runner.allocate(-(-_POSITIONS // block_size), block_size, _POSITIONS, _ROWS)
    return runner


def try_captures(runner: ModelRunner, make_capture: Callable[[], Capture]) -> list[int] | None:
    """Capture and replay steps of the runner; returns a step's tokens, None without a capture."""
    if not capture_if_possible(runner, make_capture, lambda text: None, _POSITIONS):
        return None
    tokens: list[int] = []
    chunk = StepMessage(0, [0], [8], [0], [8], [1], [1] * 8, [], all_greedy=True)
    runner.compute(chunk, {}).read()
    for size in range(1, _ROWS + 1):
        rows = list(range(size))
        tables = [(row, [array("i", [0]) for _ in runner.groups]) for row in rows]
        message = StepMessage(size, rows, [1] * size, [], [], [], [], tables, all_greedy=True)
        tokens, _ = runner.compute(message, {}).read()
    return tokens


def main() -> None:
    """Try the captures of the checkpoint that the arguments name."""
    checkpoint, name, dtype, kv_dtype, block_size = sys.argv[1:]
    config, device = replace(load_config(checkpoint), kv_dtype=kv_dtype), torch.device(name)
    torch.cuda.set_device(device)
    runner = small_runner(config, device, getattr(torch, dtype), int(block_size))
    try_captures(runner, lambda: GpuCapture(EngineStats()))


if __name__ == "__main__":
    main()
