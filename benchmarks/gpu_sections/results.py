"""The results of a run: a file that can be continued, tables, and rows for RESULTS.md."""

import json
import os
import platform
import sys
import threading
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_sections.processes import Outcome
from benchmarks.gpu_sections.sections import SECTIONS

if TYPE_CHECKING:
    from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE_HEAD = "| load | tok/s | share of the GPU's limit | published tok/s |\n|---|---|---|---|"


class ResultsError(Exception):
    """A file of results cannot be continued; the message says why."""


def source_hash() -> str:
    """Return the start of the hash of the source files that results depend on."""
    files = [path for folder in ("engine", "model") for path in (ROOT / folder).rglob("*.py")]
    found = sha256()
    for path in sorted(files):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


class Results:
    """All outcomes so far, in memory and, if there is one, in the file.

    Raises ResultsError if the file has the results of another GPU or of other code.
    """

    def __init__(self, file: Path | None):
        import torch
        import triton

        self._file, self._lock = file, threading.Lock()
        self._data: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "source": source_hash(),
        }
        sections = dict[str, Any]()
        if file is not None and file.exists():
            sections = self._read(file)
        self._data["sections"] = sections

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            data = json.loads(file.read_text())
            sections = dict(data["sections"])
        except (ValueError, KeyError, TypeError):
            raise ResultsError(f"{file} is not a file of results of this program") from None
        for key, own in self._data.items():
            if data.get(key) != own:
                raise ResultsError(
                    f"{file} has results of another {key} ({data.get(key)}, now {own}); choose "
                    "another file"
                )
        return sections

    @property
    def limits(self) -> dict[str, float]:
        """The GPU's measured limits in bytes/s and FLOP/s; empty as long as they are unknown."""
        rows = self._data["sections"].get("limits", {"rows": []})["rows"]
        if len(rows) < 2:
            return {}
        return {"copy": rows[0]["value"] * 1e12, "product": rows[1]["value"] * 1e12}

    def is_done(self, name: str) -> bool:
        """Whether the section has ended without a problem, in this run or an earlier one."""
        section = self._data["sections"].get(name)
        return section is not None and section["seconds"] is not None and not section["problem"]

    def failed(self, names: list[str]) -> bool:
        """Whether any of these sections has not succeeded."""
        return not all(map(self.is_done, names))

    def save(self, outcome: Outcome) -> None:
        """Keep what a section has found so far."""
        if outcome.variant:
            return  # of interest only together with the other variants
        with self._lock:
            self._data["sections"][outcome.name] = {
                "rows": list(outcome.rows),
                "problem": outcome.problem or None,
                "seconds": outcome.seconds,
            }
            if self._file is not None:
                new = self._file.with_name(self._file.name + ".new")
                new.write_text(json.dumps(self._data))
                os.replace(new, self._file)

    def show(self, outcome: Outcome) -> None:
        """Print the table of a section."""
        from rich.console import Console

        Console(width=140).print(_table(outcome))
        sys.stdout.flush()

    def finish(self) -> None:
        """Print the rows for the table in RESULTS.md, and the JSON object as the last line."""
        rows = [row for each in self._data["sections"].values() for row in each["rows"]]
        print("\n".join([TABLE_HEAD, *(table_row(row) for row in rows if row["unit"] == "tok/s")]))
        print(json.dumps(self._data))


def table_row(row: dict[str, Any]) -> str:
    """Return a row of the table in RESULTS.md."""
    share = "" if row["share"] is None else f"{row['share']:.0%} of {row['of']}"
    return f"| {row['name']} | {row['value']:,.0f} | {share} | {row['published']} |"


def _figure(row: dict[str, Any]) -> str:
    value = row["value"]
    return f"{value:,.0f} {row['unit']}" if value >= 1000 else f"{value:.4g} {row['unit']}"


def _table(outcome: Outcome) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    title = f"{outcome.name}, {outcome.seconds} s"
    table = Table("measurement", "value", "share of the limit", title=title, title_justify="left")
    for row in outcome.rows:
        share = "" if row["share"] is None else f"{row['share']:.1%} of {row['of']}"
        value = _figure(row) if row["value"] == row["value"] else ""  # a note has no value
        table.add_row(escape(row["name"]), value, share)
    if outcome.problem:
        description = SECTIONS[outcome.name].description if outcome.name in SECTIONS else ""
        table.add_row(description, "FAILED", escape(outcome.problem))
    return table
