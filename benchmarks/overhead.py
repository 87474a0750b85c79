"""What a step costs outside the model: `python -m benchmarks.overhead [--checkpoint DIR]`.

The engine is the real one, its model returns ready logits: what is left is scheduling, batch
preparation, sampling (greedy, over a tiny vocabulary) and bookkeeping. Each size is timed on a
fresh engine and once more after many requests have finished. Prints microseconds a sequence a
step as a table, then one JSON object as its last line. With a checkpoint, a real one, it prints
instead what share of the ragged load's time is not the model's.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.loads import make_load
from engine import Engine, EngineConfig, Request, SamplingParams

_VOCAB = 16  # so that looking for the likeliest token takes no time
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
_PARTS = ("scheduling", "batch_preparation", "sampling", "bookkeeping")


class ReadyLogits:
    """In the model's place: logits made beforehand, as many rows as are asked for."""

    def __init__(self, rows: int):
        self._logits = torch.randn(rows, _VOCAB)

    def __call__(self, batch: Any, *_: object) -> torch.Tensor:
        return self._logits[: len(batch.logits_rows)]


class Stopwatch:
    """Seconds spent in callables, each under its own name."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(_PARTS, 0.0)

    def watch(self, owner: object, attribute: str, name: str) -> None:
        """Count the time of a callable from now on."""
        inner: Callable[..., Any] = getattr(owner, attribute)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        setattr(owner, attribute, timed)


def measure(folder: Path, size: int, finished: int) -> dict[str, float]:
    """Microseconds a sequence a step in `size` sequences, by part, after so many requests."""
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
    with engine:
        engine._runner._model = ReadyLogits(size)  # type: ignore[assignment]
        watch = _watch(engine)
        _run(engine, max(size, finished), 2)
        before = dict(watch.seconds)
        steps = engine.stats.batch_sum
        start = time.perf_counter()
        _run(engine, size, _OUTPUT)
        whole = time.perf_counter() - start
        steps = engine.stats.batch_sum - steps
    found = {name: watch.seconds[name] - before[name] for name in _PARTS}
    found["bookkeeping"] = whole - sum(found.values())
    return {"total": whole * 1e6 / steps} | {
        name: value * 1e6 / steps for name, value in found.items()
    }


def share(checkpoint: str) -> dict[str, float]:
    """Shares of the ragged load's time: the model's, and the others by part."""
    prompts, outputs = make_load("ragged")
    with Engine(checkpoint, EngineConfig(device="cpu", prefix_cache=False)) as engine:
        watch = _watch(engine)
        watch.watch(engine._runner, "_forward", "model")
        requests = [
            Request(prompt, SamplingParams(max_new_tokens=count, ignore_eos=True), i)
            for i, (prompt, count) in enumerate(zip(prompts, outputs, strict=True))
        ]
        start = time.perf_counter()
        for _ in engine.generate(requests):
            pass
        whole = time.perf_counter() - start
    watch.seconds["bookkeeping"] = whole - sum(watch.seconds.values())
    found = {name: round(seconds / whole, 5) for name, seconds in watch.seconds.items()}
    return {"seconds": round(whole, 2), "outside": round(1 - found["model"], 5)} | found


def _watch(engine: Engine) -> Stopwatch:
    watch = Stopwatch()
    watch.watch(engine._scheduler, "schedule", "scheduling")
    watch.watch(engine._runner, "_batch", "batch_preparation")
    watch.watch(engine._runner._sampler, "sample", "sampling")
    return watch


def _run(engine: Engine, requests: int, output: int) -> None:
    params = SamplingParams(max_new_tokens=output, ignore_eos=True)
    prompts = ([i % _VOCAB, i // _VOCAB % _VOCAB] * (_PROMPT // 2) for i in range(requests))
    for _ in engine.generate(Request(prompt, params, i) for i, prompt in enumerate(prompts)):
        pass


def main() -> None:
    """Measure each size, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--finished", type=int, default=20_000, help="requests before the second")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest one counts")
    parser.add_argument("--checkpoint", help="a real model, on the ragged load")
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
    table = Table(*rows[0], title="us a sequence a step")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({"overhead": rows, **versions, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
