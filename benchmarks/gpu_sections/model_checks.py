"""Checks of whole models on a GPU: the same tokens as on the CPU, in every run, in every mode."""

import gc
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_sections.inputs import COMPUTES
from benchmarks.gpu_sections.loads import dummy_engine, ragged_load, run_load
from benchmarks.gpu_sections.measure import Limits, Row
from benchmarks.gpu_sections.sections import PARITY_PARTS
from benchmarks.gpu_sections.variants import WITHOUT_OVERLAP, changed_kernels
from engine import Engine, EngineConfig, Request, SamplingParams

ROOT = Path(__file__).resolve().parent.parent.parent


_KV = 4 << 30  # bytes: checks run concurrently, so none may take all of the memory


class CheckError(Exception):
    """A result is wrong. The message says which one and how large the error is."""


QUICK_DENSE, QUICK_EXPERTS = ("qwen2", "qwen3"), ("mxfp4", "gpt_oss-wide")


def check_parity_dense() -> Iterator[str | None]:
    """Check tiny models of two dense families."""
    return _parity(QUICK_DENSE)


def check_parity_experts() -> Iterator[str | None]:
    """Check tiny models of two families with experts."""
    return _parity(QUICK_EXPERTS)


def check_parity_others(part: int) -> Iterator[str | None]:
    """Check tiny models of all other families, of which each of PARITY_PARTS takes some."""
    from tests.checkpoints import FAMILIES

    others = [name for name in FAMILIES if name not in QUICK_DENSE + QUICK_EXPERTS]
    return _parity(others[part - 1 :: PARITY_PARTS])


def _parity(families: Iterable[str]) -> Iterator[str | None]:
    """Compare greedy tokens with the CPU's, in float32 with captured decode steps.

    Also checks that an engine frees all of its GPU memory.
    """
    from tests.checkpoints import write_checkpoint, write_mxfp4_pair

    rng = random.Random(0)
    prompts = [rng.choices(range(1, 512), k=size) for size in (100, 3, 40)]
    params = SamplingParams(max_new_tokens=32, ignore_eos=True)
    requests = [Request(prompt, params, i) for i, prompt in enumerate(prompts)]
    with tempfile.TemporaryDirectory() as folder:
        for name in families:
            print(name, file=sys.stderr, flush=True)
            path, tokens = Path(folder) / name, list[Any]()
            try:
                if name == "mxfp4":
                    write_mxfp4_pair(path, Path(folder) / "dense")
                else:
                    write_checkpoint(path, name)
                for device in ("cpu", "cuda"):
                    with Engine(
                        path,
                        EngineConfig(
                            device=device,
                            dtype="float32",
                            kv_memory=16 << 20,
                            max_batch_size=4,
                            trust_kernels=True,
                        ),
                        # Weights may become dense on the CPU, which only gives the tokens.
                        notice=_refuse if device == "cuda" else lambda notice: None,
                    ) as engine:
                        tokens.append(
                            {c.request_id: c.token_ids for c in engine.generate(requests)}
                        )
                equal = tokens[0] == tokens[1] or not COMPUTES
                yield None if equal else f"{name}: the tokens differ from the CPU's"
                # The engine's backend has buffers of its own; tracebacks can hold tensors.
                del engine
                gc.collect()
                left = torch.cuda.memory_allocated()
                yield f"{name}: {left} bytes were not freed" if left else None
            except Exception as error:
                yield f"{name}: {type(error).__name__}: {str(error)[:300]}"


def _refuse(notice: str) -> None:
    """Raise an engine's notices: with a fallback the check would not test the GPU's path."""
    raise CheckError(notice)


def check_tokens() -> Iterator[str | None]:
    """Check that a load of unequal requests always gives the same tokens.

    A race in a kernel at full load leaves plausible tokens, but not the same ones in every run.
    """
    load = ragged_load(160)
    with dummy_engine("qwen3-0.6b", 64, kv_memory=_KV) as engine:
        tokens = {
            "with programmatic launch": _hash(run_load(engine, load)),
            "once more": _hash(run_load(engine, load)),
        }
        engine.runner.uncapture()
        tokens["without graphs"] = _hash(run_load(engine, load))
    with changed_kernels(WITHOUT_OVERLAP), dummy_engine("qwen3-0.6b", 64, kv_memory=_KV) as engine:
        tokens[WITHOUT_OVERLAP] = _hash(run_load(engine, load))
    first = tokens["with programmatic launch"]
    for kind, found in tokens.items():
        yield None if found == first else f"{kind}: tokens {found}, at first {first}"


def _hash(tokens: dict[int, list[int]]) -> str:
    """Return the start of the hash of all requests' tokens."""
    return sha256(repr(sorted(tokens.items())).encode()).hexdigest()[:12]


def score_rows(limits: Limits) -> Iterator[Row]:
    """Yield the share of questions that the embedded model answers correctly, run as a job."""
    with tempfile.TemporaryDirectory() as folder:
        output, report = Path(folder) / "output.txt", Path(folder) / "eval.json"
        data = ROOT / "data"
        options = ("--device", "cuda", "--trust-kernels", "--kv-memory", "1GiB")
        _getp("-m", "getp", "-i", data / "input.txt", "-o", output, *options)
        _getp("-m", "eval", "-i", output, "--expected", data / "answers.txt", "--report", report)
        share = float(json.loads(report.read_text())["expected"]["share_right"])
    if share < 0.95 and COMPUTES:
        raise CheckError(f"the embedded model answers {share:.1%} correctly, expected 95%")
    yield Row("score of the embedded model", share, "of answers correct")


def _getp(*arguments: Any) -> None:
    result = subprocess.run(
        [sys.executable, "run.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    if result.returncode:
        raise CheckError(result.stderr.strip()[-500:])
