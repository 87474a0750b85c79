"""Check and time getp on a GPU: `python benchmarks/gpu.py`, under ten minutes, no network.

Checks come first, then times on dummy weights at true shapes, each with its share of what this
GPU was measured to do. Every section runs in a process of its own with a time limit, so that one
that fails or hangs costs no other; the exit status is 1 if any did, 2 without a GPU. Checks run at
the same time, timed sections alone. Prints a table of each section when it is through, and one JSON
object as its last line; with --results the object is in a file too, written again after each
section. The parity of models needs transformers.
"""

import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.gpu_times import Limits, Row

_NEEDED = ("torch", "triton", "safetensors", "tokenizers", "click", "rich", "jinja2")
_MARK = "section result: "
_Outcome = tuple[str, list[dict[str, Any]], str, float]
"""A section's name, its rows, what went wrong, and seconds."""


@dataclass(frozen=True)
class Section:
    """What is run in one process: a function of the limits that yields rows."""

    run: "Callable[[Limits], Iterator[Row]]"
    limit_s: float
    what: str
    timed: bool = (
        True  # and so alone on the GPU; what is not is compiling, mostly, and runs at once
    )


def _check(name: str) -> "Callable[[Limits], Iterator[Row]]":
    """A section that is one check: all of its comparisons, whatever comes of the first."""

    def run(limits: "Limits") -> "Iterator[Row]":
        from benchmarks import gpu_checks
        from benchmarks.gpu_times import Row

        found = list(getattr(gpu_checks, f"check_{name}")())
        problems = [problem for problem in found if problem is not None]
        yield Row(f"check of {name}", len(found) - len(problems), f"of {len(found)} right")
        if problems:
            raise gpu_checks.CheckError("; ".join(problems))

    return run


def _score(limits: "Limits") -> "Iterator[Row]":
    from benchmarks.gpu_checks import check_score
    from benchmarks.gpu_times import Row

    yield Row("check of the score", check_score(), "of answers right")


def _measured(limits: "Limits") -> "Iterator[Row]":
    from benchmarks.gpu_times import Row, measure_limits

    found = measure_limits()
    yield Row("copy", found.copy / 1e12, "TB/s")
    yield Row("bf16 product", found.product / 1e12, "TFLOP/s")


def _times(function: str) -> "Callable[[Limits], Iterator[Row]]":
    """A section that is one function of gpu_times."""

    def run(limits: "Limits") -> "Iterator[Row]":
        from benchmarks import gpu_times

        yield from getattr(gpu_times, function)(limits)

    return run


def _peer(function: str, *arguments: int) -> "Callable[[Limits], Iterator[Row]]":
    """A section that is one function of gpu_loads."""

    def run(limits: "Limits") -> "Iterator[Row]":
        from benchmarks import gpu_loads

        yield from getattr(gpu_loads, function)(*arguments)

    return run


def _load(
    model: str, load: str, sizes: tuple[int, ...], most_s: float, batch_size: int = 256
) -> "Callable[[Limits], Iterator[Row]]":
    def run(limits: "Limits") -> "Iterator[Row]":
        from benchmarks import gpu_loads

        requests = getattr(gpu_loads, load)(*sizes)
        yield from gpu_loads.time_load(model, requests, limits, most_s, batch_size)

    return run


# The most valuable first: what must be right, then the loads, then kernels alone and peers. The
# limits of all but the peers, which may not be there, fit the budget: each of what is timed, and
# the longest of the others.
BUDGET_S = 570.0
SECTIONS: dict[str, Section] = {
    "limits": Section(_measured, 20, "copy bandwidth and bf16 matrix product"),
    "check-norms": Section(_check("norms"), 70, "norms and SwiGLU as they are defined", False),
    "check-attention": Section(_check("attention"), 70, "attention, rotary and KV", False),
    "check-experts": Section(_check("experts"), 70, "router and experts", False),
    "check-draws": Section(_check("draws"), 70, "top-k and top-p", False),
    "check-fusions": Section(_check("fusions"), 70, "fused norms", False),
    "parity-dense": Section(_check("parity_dense"), 70, "tiny models: the CPU's tokens", False),
    "parity-experts": Section(_check("parity_experts"), 70, "the same, with experts", False),
    "score": Section(_score, 70, "the embedded model's score", False),
    "gpt-oss": Section(
        _load("gpt-oss-20b", "short_load", (4096, 1024), 35, 1024), 80, "4096 short prompts"
    ),
    "nano": Section(_load("qwen3-0.6b", "nano_load", (), 30), 50, "the nano-vllm load"),
    "ragged": Section(
        _load("qwen3-0.6b", "ragged_load", (1536,), 8), 35, "requests that come and go"
    ),
    "gpt-oss-1": Section(
        _load("gpt-oss-20b", "context_load", (1, 500, 400), 10), 40, "gpt-oss-20b, batch 1"
    ),
    "qwen2": Section(
        _load("qwen2-0.5b", "context_load", (1, 1000, 400), 10), 30, "batch 1, context 1000"
    ),
    "llama-1": Section(
        _load("llama-3-8b", "context_load", (1, 1000, 200), 10), 30, "Llama-3-8B, batch 1"
    ),
    "llama": Section(
        _load("llama-3-8b", "context_load", (256, 512, 256), 20), 40, "Llama-3-8B, batch 256"
    ),
    "attention": Section(_times("time_attention"), 30, "attention alone"),
    "experts": Section(_times("time_experts"), 30, "grouped products alone"),
    "tiles": Section(_times("time_tiles"), 45, "experts and one row, other tiles"),
    "fusions": Section(_times("time_fusions"), 35, "norm with linear and MLP, fused and not"),
    "overlap": Section(_times("time_overlap"), 20, "kernels set up early, and not"),
    "draws": Section(_times("time_draws"), 15, "top-k and top-p, beside a sort"),
    "transformers": Section(_peer("time_transformers", 64, 128), 60, "beside it"),
    "vllm": Section(_peer("time_vllm"), 120, "beside it, where installed"),
}


def missing() -> list[str]:
    """What is needed and cannot be imported."""
    return [name for name in _NEEDED if find_spec(name) is None]


def run_section(name: str, limits: dict[str, float]) -> None:
    """In a process of its own: print each row as it is known."""
    from benchmarks.gpu_times import Limits

    for row in SECTIONS[name].run(Limits(**limits)):
        print(_MARK + json.dumps(asdict(row)), flush=True)


def start_section(
    name: str, limits: dict[str, float], limit_s: float
) -> tuple[list[dict[str, Any]], str | None]:
    """Run a section in a process → (its rows, what went wrong)."""
    command = [sys.executable, __file__, "--run", name, json.dumps(limits)]
    problem = None
    # Files, and a session of its own: what a section has started may outlive it, and hold pipes.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=out, stderr=log, start_new_session=True)
        try:
            status = process.wait(limit_s)
            problem = f"status {status}" if status else None
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        log.seek(0)
        output, said = out.read(), log.read().strip()
    if problem:
        print(said[-3000:], file=sys.stderr)
        if said:
            problem += f": {said.splitlines()[-1][:1000]}"
    rows = [json.loads(line[len(_MARK) :]) for line in output.splitlines() if _MARK in line[:20]]
    return rows, problem


def main() -> None:
    """Choose sections, run them, print what came of them."""
    if sys.argv[1:2] == ["--run"]:
        run_section(sys.argv[2], json.loads(sys.argv[3]))
        return
    absent = missing()
    if absent:
        print(f"gpu.py needs {', '.join(absent)}: not installed here", file=sys.stderr)
        raise SystemExit(2)
    _command()


def _command() -> None:
    started = time.monotonic()
    import click

    @click.command(help=__doc__)
    @click.option(
        "--section",
        "chosen",
        type=click.Choice(list(SECTIONS)),
        multiple=True,
        help="Only this one (may be given again); limits are always measured.",
    )
    @click.option("--budget", default=BUDGET_S, show_default=True, help="Seconds for all of it.")
    @click.option("--results", type=click.Path(path_type=Path), help="File for the JSON object.")
    def command(chosen: tuple[str, ...], budget: float, results: Path | None) -> None:
        import torch

        if not torch.cuda.is_available():
            print("gpu.py: torch finds no GPU here", file=sys.stderr)
            raise SystemExit(2)
        # What the imports took counts, too.
        end = started + budget
        raise SystemExit(_run_all(chosen or tuple(SECTIONS), end, results))

    command()


def _figure(row: dict[str, Any]) -> str:
    value = row["value"]
    return f"{value:,.0f} {row['unit']}" if value >= 1000 else f"{value:.4g} {row['unit']}"


def _run_all(chosen: tuple[str, ...], end: float, file: Path | None = None) -> int:
    """The sections, until time.monotonic() is `end` → the exit status."""
    import torch
    import triton
    from rich.console import Console

    limits = {"copy": math.nan, "product": math.nan}
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "sections": {},
    }
    failed = False

    def run(name: str) -> _Outcome:
        started, left = time.monotonic(), end - time.monotonic()
        rows, problem = list[dict[str, Any]](), "no time left"
        if left > 5:
            found = start_section(name, limits, min(left, SECTIONS[name].limit_s))
            rows, problem = found[0], found[1] or ""
        return name, rows, problem, round(time.monotonic() - started, 1)

    for outcome in _in_turn(list(dict.fromkeys(("limits", *chosen))), run):
        name, rows, problem, spent = outcome
        failed |= bool(problem)
        if name == "limits" and len(rows) == 2:
            limits = {"copy": rows[0]["value"] * 1e12, "product": rows[1]["value"] * 1e12}
        results["sections"][name] = {"rows": rows, "problem": problem or None, "seconds": spent}
        Console(width=140).print(_table(f"{name}, {spent} s", SECTIONS[name].what, rows, problem))
        sys.stdout.flush()
        if file is not None:
            file.write_text(json.dumps(results))
    print(json.dumps(results))
    return 1 if failed else 0


def _in_turn(names: list[str], run: Callable[[str], _Outcome]) -> Iterator[_Outcome]:
    """What comes of each section, in order; those that are not timed run at the same time."""
    for timed, group in itertools.groupby(names, lambda name: SECTIONS[name].timed):
        if timed:
            yield from map(run, group)
        else:
            together = list(group)
            with ThreadPoolExecutor(len(together)) as pool:
                yield from pool.map(run, together)


def _table(title: str, what: str, rows: list[dict[str, Any]], problem: str) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table("what", "figure", "share of the limit", title=title, title_justify="left")
    for row in rows:
        share = "" if row["share"] is None else f"{row['share']:.1%} of {row['of']}"
        table.add_row(escape(row["name"]), _figure(row), share)
    if problem:
        table.add_row(what, "FAILED", escape(problem))
    return table


if __name__ == "__main__":
    main()
