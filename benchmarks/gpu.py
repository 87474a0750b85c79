"""Check and time getp on a GPU: `python benchmarks/gpu.py`, under ten minutes, no network.

Checks run first, then timings on dummy weights with the shapes of real models, each with its share
of this GPU's measured limits. Every section runs in a separate process with a time limit, so that
a section that fails or hangs does not affect the others. The exit status is 1 if a section failed
and 2 without a GPU. Checks run concurrently, timed sections one at a time. A table is printed after
each section, and one JSON object as the last line; --results also writes the object to a file after
each section. The parity checks need transformers.
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
RESULT_PREFIX = "section result: "
_Outcome = tuple[str, list[dict[str, Any]], str, float]
"""A section's name, its rows, its problem ("" without one), and its seconds."""


@dataclass(frozen=True)
class Section:
    """One part of the benchmark, run in a separate process.

    `run` yields result rows, given the GPU's measured limits. A timed section has the GPU to
    itself; sections that are not timed mostly compile, so they run concurrently.
    """

    run: "Callable[[Limits], Iterator[Row]]"
    limit_s: float
    description: str
    timed: bool = True


def _check(name: str) -> "Callable[[Limits], Iterator[Row]]":
    """Return a section that makes all comparisons of one check, even if some of them fail."""

    def run(limits: "Limits") -> "Iterator[Row]":
        from benchmarks import gpu_checks
        from benchmarks.gpu_times import Row

        found = list(getattr(gpu_checks, f"check_{name}")())
        problems = [problem for problem in found if problem is not None]
        yield Row(f"check of {name}", len(found) - len(problems), f"of {len(found)} correct")
        if problems:
            raise gpu_checks.CheckError("; ".join(problems))

    return run


def _score(limits: "Limits") -> "Iterator[Row]":
    from benchmarks.gpu_checks import check_score
    from benchmarks.gpu_times import Row

    yield Row("check of the score", check_score(), "of answers correct")


def _measured_limits(limits: "Limits") -> "Iterator[Row]":
    from benchmarks.gpu_times import Row, measure_limits

    found = measure_limits()
    yield Row("copy", found.copy / 1e12, "TB/s")
    yield Row("bf16 product", found.product / 1e12, "TFLOP/s")


def _times(function: str) -> "Callable[[Limits], Iterator[Row]]":
    """Return a section that calls a function of gpu_times."""

    def run(limits: "Limits") -> "Iterator[Row]":
        from benchmarks import gpu_times

        yield from getattr(gpu_times, function)(limits)

    return run


def _peer(function: str, *arguments: int) -> "Callable[[Limits], Iterator[Row]]":
    """Return a section that calls a function of gpu_loads."""

    def run(limits: "Limits") -> "Iterator[Row]":
        from benchmarks import gpu_loads

        yield from getattr(gpu_loads, function)(*arguments)

    return run


def _load(
    model: str, load: str, sizes: tuple[int, ...], max_s: float, batch_size: int = 256
) -> "Callable[[Limits], Iterator[Row]]":
    """Return a section that times a load on dummy weights of a well-known model."""

    def run(limits: "Limits") -> "Iterator[Row]":
        from benchmarks import gpu_loads

        requests = getattr(gpu_loads, load)(*sizes)
        yield from gpu_loads.time_load(model, requests, limits, max_s, batch_size)

    return run


# Ordered by importance: correctness, loads, single kernels, peers. The time limits of all timed
# sections plus the longest limit of the others fit the budget. Peers are not counted: they may not
# be installed.
BUDGET_S = 570.0
SECTIONS: dict[str, Section] = {
    "limits": Section(_measured_limits, 20, "copy bandwidth and bf16 matrix product"),
    "check-norms": Section(_check("norms"), 70, "norms and SwiGLU against the reference", False),
    "check-attention": Section(_check("attention"), 70, "attention, rotary and KV", False),
    "check-experts": Section(_check("experts"), 70, "router and experts", False),
    "check-sampling": Section(_check("sampling"), 70, "top-k and top-p", False),
    "check-fusions": Section(_check("fusions"), 70, "fused norms", False),
    "parity-dense": Section(_check("parity_dense"), 70, "tiny models: same tokens as CPU", False),
    "parity-experts": Section(_check("parity_experts"), 70, "the same, with experts", False),
    "score": Section(_score, 70, "the embedded model's score", False),
    "gpt-oss": Section(
        _load("gpt-oss-20b", "short_load", (4096, 1024), 35, 1024), 80, "4096 short prompts"
    ),
    "nano": Section(_load("qwen3-0.6b", "nano_load", (), 30), 50, "the nano-vllm load"),
    "ragged": Section(
        _load("qwen3-0.6b", "ragged_load", (1536,), 8), 35, "more requests than a batch holds"
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
    "attention": Section(_times("time_attention"), 30, "attention kernels"),
    "experts": Section(_times("time_experts"), 30, "grouped matrix products"),
    "tiles": Section(_times("time_tiles"), 45, "other tiles for experts and single rows"),
    "fusions": Section(_times("time_fusions"), 35, "norm with linear and MLP, fused or not"),
    "overlap": Section(_times("time_overlap"), 20, "programmatic launch on or off"),
    "sampling": Section(_times("time_sampling"), 15, "top-k and top-p, compared with a sort"),
    "transformers": Section(_peer("time_transformers", 64, 128), 60, "peer: transformers"),
    "vllm": Section(_peer("time_vllm"), 120, "peer: vLLM, if installed"),
}


def missing_packages() -> list[str]:
    """Return the required packages that are not installed."""
    return [name for name in _NEEDED if find_spec(name) is None]


def run_section(name: str, limits: dict[str, float]) -> None:
    """Run a section in this process and print each row as soon as it is measured."""
    from benchmarks.gpu_times import Limits

    for row in SECTIONS[name].run(Limits(**limits)):
        print(RESULT_PREFIX + json.dumps(asdict(row)), flush=True)


def start_section(
    name: str, limits: dict[str, float], limit_s: float
) -> tuple[list[dict[str, Any]], str | None]:
    """Run a section in a separate process; return its rows and its problem, or None."""
    command = [sys.executable, __file__, "--run", name, json.dumps(limits)]
    problem = None
    # Output goes to files and the section gets its own session, because processes started by the
    # section can outlive it and would keep pipes open.
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
        output, errors = out.read(), log.read().strip()
    if problem:
        print(errors[-3000:], file=sys.stderr)
        if errors:
            problem += f": {errors.splitlines()[-1][:1000]}"
    rows = [
        json.loads(line.removeprefix(RESULT_PREFIX))
        for line in output.splitlines()
        if line.startswith(RESULT_PREFIX)
    ]
    return rows, problem


def main() -> None:
    """Run the chosen sections and print their results, or one section in this process (--run)."""
    if sys.argv[1:2] == ["--run"]:
        run_section(sys.argv[2], json.loads(sys.argv[3]))
        return
    missing = missing_packages()
    if missing:
        print(
            f"gpu.py needs packages that are not installed: {', '.join(missing)}", file=sys.stderr
        )
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
        help="Run only this section (can be repeated); limits are always measured.",
    )
    @click.option(
        "--budget",
        default=BUDGET_S,
        show_default=True,
        help="Time limit in seconds for all sections.",
    )
    @click.option(
        "--results",
        type=click.Path(path_type=Path),
        help="Also write the JSON object to this file.",
    )
    def command(chosen: tuple[str, ...], budget: float, results: Path | None) -> None:
        import torch

        if not torch.cuda.is_available():
            print("gpu.py: torch does not find a GPU", file=sys.stderr)
            raise SystemExit(2)
        end = started + budget  # the time of the imports counts
        raise SystemExit(run_all(chosen or tuple(SECTIONS), end, results))

    command()


def _figure(row: dict[str, Any]) -> str:
    value = row["value"]
    return f"{value:,.0f} {row['unit']}" if value >= 1000 else f"{value:.4g} {row['unit']}"


def run_all(chosen: tuple[str, ...], end: float, file: Path | None = None) -> int:
    """Run the sections until time.monotonic() reaches `end`; return the exit status."""
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

    for outcome in _run_in_order(list(dict.fromkeys(("limits", *chosen))), run):
        name, rows, problem, seconds = outcome
        failed |= bool(problem)
        if name == "limits" and len(rows) == 2:
            limits = {"copy": rows[0]["value"] * 1e12, "product": rows[1]["value"] * 1e12}
        results["sections"][name] = {"rows": rows, "problem": problem or None, "seconds": seconds}
        title = f"{name}, {seconds} s"
        Console(width=140).print(_table(title, SECTIONS[name].description, rows, problem))
        sys.stdout.flush()
        if file is not None:
            file.write_text(json.dumps(results))
    print(json.dumps(results))
    return 1 if failed else 0


def _run_in_order(names: list[str], run: Callable[[str], _Outcome]) -> Iterator[_Outcome]:
    """Yield the outcome of each section in order; adjacent untimed sections run concurrently."""
    for timed, group in itertools.groupby(names, lambda name: SECTIONS[name].timed):
        if timed:
            yield from map(run, group)
        else:
            untimed = list(group)
            with ThreadPoolExecutor(len(untimed)) as pool:
                yield from pool.map(run, untimed)


def _table(title: str, description: str, rows: list[dict[str, Any]], problem: str) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table("measurement", "value", "share of the limit", title=title, title_justify="left")
    for row in rows:
        share = "" if row["share"] is None else f"{row['share']:.1%} of {row['of']}"
        table.add_row(escape(row["name"]), _figure(row), share)
    if problem:
        table.add_row(description, "FAILED", escape(problem))
    return table


if __name__ == "__main__":
    main()
