"""Check and time getp on a GPU, without a network. Two calls, with one file of results:

\b
    python benchmarks/gpu.py --quick --results RESULTS.json    90 seconds: correct, and how fast?
    python benchmarks/gpu.py --results RESULTS.json            8 minutes: what is slow, what helps?

The first stands alone: the GPU's limits, every kernel against the reference, tiny models against
the CPU, and a few seconds of each load, on dummy weights with the shapes of real models. If a check
fails, it is repeated with variants of the kernels, to find those that help. The second times whole
loads, single kernels, other tiles, features on and off, and other engines.

Every section runs in a separate process with a time limit, so that a section that fails or hangs
does not affect the others. Checks run concurrently, timed sections one at a time. A table is
printed after each section; the last lines are rows for the table in RESULTS.md and one JSON object.
With --results a run that was interrupted continues: sections that succeeded are not repeated. The
exit status is 1 if a section failed and 2 without a GPU. The parity checks need transformers.

Compiling takes most of the first minute. Kernels can be compiled beforehand on a machine without a
GPU that has the same Triton wheel (version and Python version), and the folder copied:

\b
    python benchmarks/gpu.py --compile-for sm_90 FOLDER
    python benchmarks/gpu.py --quick --kernels FOLDER
"""

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_sections.processes import Outcome, run_section, start_section
from benchmarks.gpu_sections.results import Results, ResultsError
from benchmarks.gpu_sections.sections import FULL, FULL_BUDGET_S, QUICK, QUICK_BUDGET_S, SECTIONS

_NEEDED = ("torch", "triton", "safetensors", "tokenizers", "click", "rich", "jinja2")
VARIANTS_LIMIT_S = 40.0
_LEAST_S = 5.0  # a section is not started with less time than this


def missing_packages() -> list[str]:
    """Return the required packages that are not installed."""
    return [name for name in _NEEDED if find_spec(name) is None]


def main() -> None:
    """Run the chosen sections and print their results, or one section in this process (--run)."""
    if sys.argv[1:2] == ["--run"]:
        run_section(sys.argv[2], sys.argv[3])
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
    @click.option("--quick", is_flag=True, help="Run the sections of the 90-second call.")
    @click.option(
        "--section",
        "chosen",
        type=click.Choice(list(SECTIONS)),
        multiple=True,
        help="Run only this section (can be repeated); limits are always measured.",
    )
    @click.option(
        "--budget",
        type=float,
        help=f"Time limit in seconds for all sections [default: {FULL_BUDGET_S:.0f}; with --quick "
        f"{QUICK_BUDGET_S:.0f}].",
    )
    @click.option(
        "--time-factor",
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        help="Multiply all time limits, for a slower machine.",
    )
    @click.option(
        "--results",
        type=click.Path(path_type=Path),
        help="Write the JSON object to this file as results come, and continue if it exists.",
    )
    @click.option(
        "--kernels",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Use the kernels in this folder, and add those that it lacks.",
    )
    @click.option(
        "--compile-for",
        type=(str, click.Path(path_type=Path)),
        metavar="ARCHITECTURE FOLDER",
        help="Compile the kernels of checks and loads into a folder; needs no GPU.",
    )
    def command(
        quick: bool,
        chosen: tuple[str, ...],
        budget: float | None,
        time_factor: float,
        results: Path | None,
        kernels: Path | None,
        compile_for: tuple[str, Path] | None,
    ) -> None:
        if compile_for is not None:
            from benchmarks.gpu_sections.triton_cache import compile_for as compile_all

            compile_all(*compile_for)
            return
        import torch

        if not torch.cuda.is_available():
            print("gpu.py: torch does not find a GPU", file=sys.stderr)
            raise SystemExit(2)
        default = time_factor * (QUICK_BUDGET_S if quick else FULL_BUDGET_S)
        end = started + (default if budget is None else budget)  # the time of the imports counts
        names = chosen or tuple(QUICK if quick else FULL)
        try:
            with _kernels_of(kernels):
                status = run_all(names, end, results, time_factor)
        except ResultsError as error:
            print(f"gpu.py: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        raise SystemExit(status)

    command()


@contextmanager
def _kernels_of(folder: Path | None) -> Iterator[None]:
    """Use the kernels in a folder, and say at the end how many of those needed it lacked."""
    if folder is None:
        yield
        return
    from benchmarks.gpu_sections.triton_cache import compiled_kernels, use_kernels

    use_kernels(folder)
    before = compiled_kernels(folder)
    print(f"{before} kernels in {folder}")
    yield
    print(f"{compiled_kernels(folder) - before} more kernels were compiled", file=sys.stderr)


def run_all(
    chosen: tuple[str, ...], end: float, file: Path | None = None, time_factor: float = 1.0
) -> int:
    """Run the sections until time.monotonic() reaches `end`; return the exit status.

    time_factor: multiplies the sections' own time limits.
    """
    results = Results(file)
    names = list(dict.fromkeys(("limits", *chosen)))

    def run(name: str, variant: str = "", limit_s: float | None = None) -> Outcome:
        started, left = time.monotonic(), end - time.monotonic()
        own = SECTIONS[name].limit_s if limit_s is None else limit_s
        most = min(left, time_factor * own)
        outcome = Outcome(name, variant)
        if left < _LEAST_S:
            outcome.problem = "no time left"
        else:
            # Rows are saved as they come, so a run that is killed loses nothing.
            start_section(outcome, results.limits, most, lambda: results.save(outcome))
        outcome.seconds = round(time.monotonic() - started, 1)
        return outcome

    def show(outcome: Outcome) -> None:
        results.save(outcome)
        results.show(outcome)

    for name in filter(results.is_done, names):
        print(f"{name}: already measured")

    def try_variants(failed: list[str]) -> None:
        if failed and end - time.monotonic() > _LEAST_S:
            for outcome in find_variants(failed, run):
                show(outcome)

    left_names = [name for name in names if not results.is_done(name)]
    stopped = list[str]()  # for their variants there is time when everything else has run
    for group in _groups(left_names):
        wrong = list[str]()
        for outcome in _run_group(group, run):
            show(outcome)
            if outcome.problem and SECTIONS[outcome.name].operations:
                (stopped if outcome.is_stopped else wrong).append(outcome.name)
        try_variants(wrong)
    try_variants(stopped)
    results.finish()
    return 1 if results.failed(names) else 0


def _groups(names: list[str]) -> Iterator[list[str]]:
    """Yield the sections that run together: neighbours that are not timed, or a timed one."""
    for timed, group in itertools.groupby(names, lambda name: SECTIONS[name].timed):
        together = list(group)
        yield from ([name] for name in together) if timed else [together]


def _run_group(names: list[str], run: Callable[[str], Outcome]) -> Iterator[Outcome]:
    with ThreadPoolExecutor(len(names)) as pool:
        yield from pool.map(run, names)


def find_variants(
    failed: list[str], run: Callable[[str, str, float], Outcome]
) -> Iterator[Outcome]:
    """Repeat failed checks with each variant of the kernels; yield which variants help each."""
    from benchmarks.gpu_sections.variants import VARIANTS

    cases = list(itertools.product(failed, VARIANTS))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda case: run(case[0], case[1], VARIANTS_LIMIT_S), cases))
    for name in failed:
        yield judge(name, [outcome for outcome in found if outcome.name == name])


def judge(name: str, outcomes: list[Outcome]) -> Outcome:
    """Return which of the variants make a failed check succeed, as the outcome of one section."""
    from benchmarks.gpu_sections.measure import note
    from benchmarks.gpu_sections.variants import BY_TORCH

    found = Outcome(f"variants of {name}", seconds=max(each.seconds or 0.0 for each in outcomes))
    for each in outcomes:
        result = f"fails: {each.problem[:200]}" if each.problem else "succeeds"
        found.rows.append(asdict(note(f"{name} {each.variant}: {result}")))
    helping = [each.variant for each in outcomes if not each.problem]
    if not helping:
        verdict = "no variant helps, not even torch: look at the check, torch and the GPU"
    elif helping == [BY_TORCH]:
        verdict = "only torch helps: the kernel itself is at fault"
    else:
        verdict = f"{name} succeeds {', '.join(helping)}"
    found.rows.append(asdict(note(verdict)))
    return found


if __name__ == "__main__":
    main()
