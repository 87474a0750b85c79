"""Count what compiled GPU kernels use: `python benchmarks/kernel_counts.py sm_90`, without a GPU.

One line for each kernel that the layers of the configs launch for the numbers of rows: registers of
a thread, bytes of spilled registers (AMD: registers), bytes of shared memory, programs that fit
into a processor at a time, and machine instructions, barriers, global loads by the bytes that a
thread loads, and matrix instructions. "a/b" is the whole kernel / its innermost loop. These are
counts of code, not times. With --against REF, only the kernels whose counts differ from those of
that git revision, each with both lines.

    python benchmarks/kernel_counts.py sm_90 --only decode --config gpt-oss-20b --rows 1 --rows 64
    python benchmarks/kernel_counts.py gfx942 --only experts --against HEAD~1
    python benchmarks/kernel_counts.py sm_90 --only quantized --config llama-3-8b --rows 1
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import click
from rich.console import Console
from rich.table import Table

from benchmarks.compiled_kernels import Kernel
from tests.model.machine_code import Instruction, disassemble, innermost_loop
from tests.model.occupancy import PROCESSORS

_ROOT = Path(__file__).resolve().parent.parent
_CONFIGS = ("gpt-oss-20b", "qwen3-0.6b", "llama-3-8b", "qwen2-0.5b", "qwen3-30b-a3b")
_ROWS = (1, 16, 64, 512, 4096)
_COLUMNS = "registers spills shared programs instructions barriers loads matrix".split()
_Line = tuple[str, str, tuple["Counts", ...]]
"""A kernel's name, the configs and rows that launch it, and its counts, before and after."""


@dataclass(frozen=True)
class Counts:
    """What one compiled kernel uses, ready to print: a value for each column."""

    constants: str
    values: tuple[str, ...]


def _loads(code: Sequence[Instruction]) -> str:
    """Return the numbers of loads by their bytes, such as "12x16 3x4"."""
    sizes = Counter(x.loaded_bytes for x in code if x.loaded_bytes)
    return " ".join(f"{count}x{size}" for size, count in sorted(sizes.items(), reverse=True)) or "0"


def count(kernel: Kernel, code: Sequence[Instruction], architecture: str) -> Counts:
    """Return the counts of a kernel from its machine code."""
    loop = innermost_loop(code)
    usage = kernel.registers, kernel.shared, kernel.warps
    programs = PROCESSORS[architecture].programs_at_once(*usage)
    values = (
        kernel.registers,
        kernel.spills,
        kernel.shared,
        programs,
        f"{len(code)}/{len(loop)}",
        f"{sum(x.is_barrier for x in code)}/{sum(x.is_barrier for x in loop)}",
        f"{_loads(code)} / {_loads(loop)}",
        f"{sum(x.is_matrix for x in code)}/{sum(x.is_matrix for x in loop)}",
    )
    return Counts(kernel.constants, tuple(map(str, values)))


def compiled_kernels(
    tree: Path, architecture: str, only: str, configs: Sequence[str], rows: Sequence[int]
) -> list[tuple[Kernel, Counts]]:
    """Compile and count the kernels of a checked-out revision. Raises ClickException."""
    script = str(_ROOT / "benchmarks" / "compiled_kernels.py")
    arguments = [architecture, only, " ".join(configs), " ".join(map(str, rows))]
    run = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        check=False,
    )
    if run.returncode:
        problem = run.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise click.ClickException(f"cannot compile the kernels of {tree}: {problem}")
    kernels = [Kernel(*values) for values in pickle.loads(run.stdout)]
    codes = disassemble([x.code for x in kernels], architecture)
    return [
        (kernel, count(kernel, code, architecture))
        for kernel, code in zip(kernels, codes, strict=True)
    ]


@contextmanager
def _worktree(revision: str) -> Iterator[Path]:
    """Check a git revision out into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(_ROOT), "worktree"]
        try:
            added = [*git, "add", "--quiet", "--detach", str(tree), revision]
            subprocess.run(added, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as e:
            raise click.ClickException(e.stderr.strip()) from e
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def _grouped(items: Sequence[tuple[Kernel, tuple[Counts, ...]]]) -> list[_Line]:
    """Merge launches with equal constants and counts into one line."""
    groups: dict[tuple[str, tuple[Counts, ...]], dict[str, list[str]]] = {}
    for kernel, counts in items:
        rows = groups.setdefault((kernel.name, counts), {}).setdefault(kernel.config, [])
        if str(kernel.rows) not in rows:
            rows.append(str(kernel.rows))
    return [
        (name, "; ".join(f"{config} {','.join(rows)}" for config, rows in found.items()), counts)
        for (name, counts), found in groups.items()
    ]


def _changes(
    new: list[tuple[Kernel, Counts]], old: list[tuple[Kernel, Counts]]
) -> list[tuple[Kernel, tuple[Counts, ...]]]:
    """Pair the launches of two revisions by config, rows, kernel and number; keep differences."""
    absent = Counts("", ("-",) * len(_COLUMNS))
    before, after = ({x[:4]: (x, counts) for x, counts in side} for side in (old, new))
    pairs: list[tuple[Kernel, tuple[Counts, ...]]] = []
    for key in before | after:
        kernel = (after.get(key) or before[key])[0]
        was = before[key][1] if key in before else absent
        now = after[key][1] if key in after else absent
        if was.values != now.values:
            pairs.append((kernel, (was, now)))
    return pairs


@click.command(help=__doc__)
@click.argument("architecture", type=click.Choice(sorted(PROCESSORS)))
@click.option("--only", default="", help="Only kernels with this text in their names.")
@click.option("--config", "configs", multiple=True, default=_CONFIGS, help="A known model's name.")
@click.option("--rows", multiple=True, type=click.IntRange(1), default=_ROWS, show_default=True)
@click.option("--against", metavar="REF", help="Compare with this git revision.")
@click.option("--constants", is_flag=True, help="Also print the kernels' constants.")
def main(
    architecture: str,
    only: str,
    configs: tuple[str, ...],
    rows: tuple[int, ...],
    against: str | None,
    constants: bool,
) -> None:
    """Count, compare and print."""
    chosen = architecture, only, configs, rows
    new = compiled_kernels(_ROOT, *chosen)
    if against is None:
        lines = _grouped([(kernel, (counts,)) for kernel, counts in new])
    else:
        with _worktree(against) as tree:
            old = compiled_kernels(tree, *chosen)
        lines = _grouped(_changes(new, old))
        if not lines:
            print(f"{len(new)} launches, all with the same counts as at {against}")
            return
    table = Table(title=architecture, box=None, header_style="bold")
    for name in ("kernel", "config and rows", *_COLUMNS):
        table.add_column(name, justify="left" if name[0] in "kc" else "right", overflow="fold")
    for name, where, both in lines:
        for i, counts in enumerate(both):
            first = name if len(both) == 1 else f"{name} {('before', 'after')[i]}"
            table.add_row(first, where if i == 0 else "", *counts.values)
            if constants and counts.constants:
                table.add_row("", counts.constants)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    main()
