"""Time a step without its model: `python -m benchmarks.overhead [--checkpoint DIR]`.

The engine is the real one, but its model returns prepared logits, so that the time is that of
scheduling, batch preparation, sampling (greedy, over a tiny vocabulary) and bookkeeping. Each batch
size is timed on a new engine, and again after many requests have finished. Prints microseconds per
sequence and step as a table, then one JSON object as the last line. With the checkpoint of a real
model, it instead prints the share of the ragged load's time that is spent outside the model.
"""

import argparse
import json
import platform
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.loads import make_load
from engine import Engine, EngineConfig, Request, SamplingParams
from model.ops.forward_batch import ForwardBatch
from model.ops.step_parts import OTHER, observe

_VOCAB = 16  # so small that argmax takes no time
_PROMPT, _OUTPUT = 32, 400
_CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": _VOCAB,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
_PARTS = ("scheduling", "batch_preparation", "sampling")


class PreparedLogits:
    """Replaces the model; returns logits that were computed in advance."""

    def __init__(self, rows: int):
        self._logits = torch.randn(rows, _VOCAB)

    def __call__(self, backend: object, batch: ForwardBatch, *_: object) -> torch.Tensor:
        return self._logits[: len(batch.logits_rows)]


class Stopwatch:
    """Seconds spent in each part of the steps, while `observe` calls it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._part, self._since = OTHER, time.perf_counter()

    def __call__(self, part: str) -> None:
        """Charge the time so far to the previous part and start the next one."""
        now = time.perf_counter()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now


def measure(folder: Path, size: int, finished: int) -> dict[str, float]:
    """Microseconds per sequence and step, by part, after `finished` requests."""
    engine = Engine(
        folder,
        EngineConfig(
            device="cpu",
            dummy_weights=True,
            max_batch_size=size,
            max_batch_tokens=max(512, size),
            kv_memory=1 << 30,
        ),
    )
    watch = Stopwatch()
    with engine:
        engine.runner.model = PreparedLogits(size)  # type: ignore[assignment]
        _run(engine, max(size, finished), 2)
        before = engine.stats.batch_sum
        start = time.perf_counter()
        with observe(watch):
            _run(engine, size, _OUTPUT)
        whole = time.perf_counter() - start
        steps = engine.stats.batch_sum - before
    found = {name: watch.seconds[name] for name in _PARTS}
    found["bookkeeping"] = whole - sum(found.values())
    return {"total": whole * 1e6 / steps} | {
        name: value * 1e6 / steps for name, value in found.items()
    }


def share(checkpoint: str) -> dict[str, float]:
    """Shares of the ragged load's time: the model and the other parts."""
    prompts, outputs = make_load("ragged")
    watch, model_s = Stopwatch(), 0.0
    with Engine(checkpoint, EngineConfig(device="cpu", prefix_cache=False)) as engine:
        engine.runner.uncapture()  # so that every step calls `forward`
        forward = engine.runner.forward

        def timed(batch: ForwardBatch) -> torch.Tensor:
            nonlocal model_s
            started = time.perf_counter()
            logits = forward(batch)
            model_s += time.perf_counter() - started
            return logits

        engine.runner.forward = timed  # type: ignore[method-assign]
        requests = [
            Request(prompt, SamplingParams(max_new_tokens=count, ignore_eos=True), i)
            for i, (prompt, count) in enumerate(zip(prompts, outputs, strict=True))
        ]
        start = time.perf_counter()
        with observe(watch):
            for _ in engine.generate(requests):
                pass
        whole = time.perf_counter() - start
    parts = {"model": model_s} | {name: watch.seconds[name] for name in _PARTS}
    parts["bookkeeping"] = whole - sum(parts.values())
    found = {name: round(seconds / whole, 5) for name, seconds in parts.items()}
    return {"seconds": round(whole, 2), "outside": round(1 - found["model"], 5)} | found


def _run(engine: Engine, requests: int, output: int) -> None:
    params = SamplingParams(max_new_tokens=output, ignore_eos=True)
    prompts = ([i % _VOCAB, i // _VOCAB % _VOCAB] * (_PROMPT // 2) for i in range(requests))
    for _ in engine.generate(Request(prompt, params, i) for i, prompt in enumerate(prompts)):
        pass


def main() -> None:
    """Measure each size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument(
        "--finished", type=int, default=20_000, help="requests before the second time"
    )
    parser.add_argument("--rounds", type=int, default=3, help="the fastest one is shown")
    parser.add_argument("--checkpoint", help="time the ragged load on this model instead")
    options = parser.parse_args()
    if options.checkpoint:
        print(json.dumps({"ragged": share(options.checkpoint)}))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(_CONFIG))
        for size in options.sizes:
            for finished in (0, options.finished):
                best = min(
                    (measure(folder, size, finished) for _ in range(options.rounds)),
                    key=lambda found: found["total"],
                )
                rounded = {name: round(value, 2) for name, value in best.items()}
                rows.append({"sequences": size, "finished": finished, **rounded})
    table = Table(*rows[0], title="us per sequence and step")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({"overhead": rows, **versions, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
