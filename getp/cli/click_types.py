"""Option, command and parameter types that click lacks."""

import json
import math
import os
import re
from collections.abc import Callable
from typing import Any

import click
import cloup
from click.core import ParameterSource

from engine.config import DEVICE
from getp.cli.modes import MODES, Subject
from getp.errors import UsageProblem

Decorator = Callable[[Any], Any]

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_MIN_BYTES_WITHOUT_UNIT = 1024  # a smaller number is taken for a forgotten unit


class Option(cloup.Option):
    """An option with a subject, which determines the modes to which it applies."""

    def __init__(self, *args: Any, subject: Subject = Subject.ANY, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.subject = subject

    @property
    def modes(self) -> list[str]:
        """The modes to which the option applies."""
        return [
            name
            for name, mode in MODES.items()
            if not self.subject or self.subject in mode.subjects
        ]


def in_group(group: cloup.OptionGroup, subject: Subject = Subject.ANY) -> Callable[..., Decorator]:
    """Return a function like click.option for the options of a group and a subject."""

    def option(*names: str, **attributes: Any) -> Decorator:
        return group.option(*names, cls=Option, **{"subject": subject, **attributes})

    return option


class Command(cloup.Command):
    """A command that accepts several names after one `--gpu`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; `--gpu A10 V100` is read as `--gpu A10 --gpu V100`."""
        return super().parse_args(ctx, _repeat_gpu(args) if "--gpu" in args else args)


def _repeat_gpu(args: list[str]) -> list[str]:
    """Insert `--gpu` before each name of a GPU that follows another one."""
    from model.cost.devices import is_device

    found: list[str] = []
    for word in args:
        if found[-2:-1] == ["--gpu"] and not word.startswith("-") and is_device(word):
            found.append("--gpu")
        found.append(word)
    return found


def refuse_other_modes(ctx: click.Context, mode: str) -> None:
    """Raise UsageProblem for an option on the command line that does not apply to this mode."""
    for parameter in ctx.command.params:
        if not isinstance(parameter, Option) or mode in parameter.modes:
            continue
        if ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE:
            modes = [f"-m {name}" for name in parameter.modes]
            listed = " and ".join(filter(None, [", ".join(modes[:-1]), modes[-1]]))
            raise UsageProblem(f"{'/'.join(parameter.opts)} applies only to {listed}")


class Number(click.FloatRange):
    """A finite number in a range."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number.", param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        in_range: float = super().convert(number, param, ctx)
        return in_range


class Integer(click.IntRange):
    """An integer in a range."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the integer."""
        try:
            number = int(value)
        except ValueError:
            self.fail(f"{value!r} is not an integer.", param, ctx)
        in_range: int = super().convert(number, param, ctx)
        return in_range


class Size(click.ParamType):
    """Bytes: `4GiB`, `512MiB`, `2GB` or a plain number."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", str(value).strip().lower())
        if match is None or match[2] not in _UNITS or (size := float(match[1])) <= 0:
            self.fail(
                f"{value!r} is not a size: give a number of bytes, or a number with the unit KiB, "
                "MiB, GiB, KB, MB or GB, such as 4GiB",
                param,
                ctx,
            )
        if not match[2] and size < _MIN_BYTES_WITHOUT_UNIT:
            self.fail(f"{value} means {value} bytes; did you mean {value}GiB?", param, ctx)
        return int(size * _UNITS[match[2]])


class Device(click.ParamType):
    """`auto`, `cpu`, `cuda` or `cuda:1` (torch calls AMD's GPUs cuda too)."""

    name = "DEVICE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the value unchanged."""
        if not DEVICE.fullmatch(value):
            self.fail(f"{value!r} is not one of auto, cpu, cuda, cuda:0, cuda:1, …", param, ctx)
        return str(value)


class Replicas(click.ParamType):
    """A number of replicas, or `auto`, which is returned as 0."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        if value == "auto":
            return 0
        if not re.fullmatch(r"0*[1-9]\d{0,4}", str(value)):
            self.fail(f"{value!r} is neither a number from 1 to 99999 nor auto", param, ctx)
        return int(value)


class Shard(click.ParamType):
    """A part of the input: its number, from 1, and the number of parts."""

    name = "I/N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Return both numbers."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is not I/N with I from 1 to N, such as 1/8", param, ctx)
        return int(match[1]), int(match[2])


class JsonObject(click.ParamType):
    """A JSON object."""

    name = "JSON"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, Any]:
        """Return the object."""
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError) as error:
            self.fail(f"{value!r} is not JSON: {error}", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{value!r} is not a JSON object, such as '{{\"name\": 1}}'", param, ctx)
        return found


class Adapter(click.ParamType):
    """The directory of an adapter, which is returned as it is, and its weight after a colon."""

    name = "DIR[:WEIGHT]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        """Return the absolute path and the weight."""
        if isinstance(value, tuple):
            return value
        folder, colon, weight = str(value).rpartition(":")
        if not colon or os.path.isdir(value):
            return os.path.abspath(value), 1.0
        try:
            number = float(weight)
        except ValueError:
            self.fail(f"{value!r} is neither a directory nor DIRECTORY:WEIGHT", param, ctx)
        if not math.isfinite(number):
            self.fail(f"the weight of {folder} must be a number, not {weight}", param, ctx)
        return os.path.abspath(folder), number


class Dtype(click.Choice[str]):
    """A number format by torch's name or its common abbreviation; float8 only for plans."""

    _SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(["auto", "bfloat16", "float16", "float32", "float8"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return torch's name."""
        return super().convert(self._SHORT.get(str(value), value), param, ctx)
