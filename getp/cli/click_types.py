"""How our options differ from click's: they come in groups, and belong to modes."""

import math
import re
from typing import Any

import click
from click.core import ParameterSource

from getp.errors import UsageProblem
from model.cost.devices import is_device

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Option(click.Option):
    """An option that knows its heading in the help and the modes it means something in."""

    def __init__(self, *args: Any, group: str, modes: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group
        self.modes = modes  # none: every mode


class Command(click.Command):
    """A command whose help lists the options by group, and whose --gpu takes several names."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read `--gpu A10 V100` as two: a word after a GPU that is one itself."""
        spread: list[str] = []
        for word in args:
            if spread[-2:-1] == ["--gpu"] and not word.startswith("-") and is_device(word):
                spread.append("--gpu")
            spread.append(word)
        return super().parse_args(ctx, spread)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each group, in the order in which they were declared."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                group = parameter.group if isinstance(parameter, Option) else "Help"
                groups.setdefault(group, []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


def refuse_other_modes(ctx: click.Context, mode: str) -> None:
    """Raise UsageProblem if an option was given that does nothing in this mode."""
    for parameter in ctx.command.params:
        if not isinstance(parameter, Option) or not parameter.modes or mode in parameter.modes:
            continue
        if ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE:
            raise UsageProblem(
                f"{'/'.join(parameter.opts)} does nothing in mode {mode}, "
                f"only in {', '.join(parameter.modes)}"
            )


class Number(click.FloatRange):
    """A number in a range, which infinity and NaN are not."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Size(click.ParamType):
    """Bytes: `4GiB`, `512MiB`, `2GB` or a plain number."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", str(value).strip().lower())
        if match is None or match[2] not in _UNITS or (size := float(match[1])) <= 0:
            self.fail(
                f"{value!r} is not a size: a number of bytes, or one with KiB, MiB, GiB, "
                "KB, MB or GB behind it, such as 4GiB",
                param,
                ctx,
            )
        return int(size * _UNITS[match[2]])


class Device(click.ParamType):
    """`auto`, `cpu`, `cuda` or `cuda:1` (torch calls AMD's GPUs cuda too)."""

    name = "DEVICE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the value as it is."""
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            self.fail(f"{value!r} is not one of auto, cpu, cuda, cuda:0, cuda:1, …", param, ctx)
        return str(value)


class Replicas(click.ParamType):
    """A number of replicas, or `auto`, which is 0 here."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        if value == "auto":
            return 0
        if not re.fullmatch(r"0*[1-9]\d{0,4}", str(value)):
            self.fail(f"{value!r} is neither a number from 1 to 99999 nor auto", param, ctx)
        return int(value)


class Dtype(click.Choice[str]):
    """A number format by torch's name or the usual short one; float8 for plans alone."""

    _SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(["auto", "bfloat16", "float16", "float32", "float8"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return torch's name."""
        return super().convert(self._SHORT.get(str(value), value), param, ctx)
