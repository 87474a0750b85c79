"""Which weight of a checkpoint has which format, by the names of modules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from model.formats.dense import DENSE
from model.formats.format import WeightFormat

if TYPE_CHECKING:
    from model.families.config_keys.keys import Keys

# Most steps of matching one pattern with a name of _NAME characters: a fraction of a second.
_MAX_STEPS = 10_000_000
_NAME = 64
_MAX_PATTERN = 1000  # characters
_TOKENS = re.compile(r"\\.|\[\^?\]?[^]]*\]|\(\?[:=!]|.", re.DOTALL)


@dataclass(frozen=True)
class Rule:
    """The format of the modules that any of the names or patterns describes."""

    format: WeightFormat
    exact: frozenset[str] = frozenset()
    inside: frozenset[str] = frozenset()  # modules with all that is inside them
    endings: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()  # regular expressions, compared with a name's beginning

    def describes(self, module: str) -> bool:
        """Whether a module has this format."""
        if module in self.exact or module.endswith(self.endings):
            return True
        if self.inside and any(end in self.inside for end in _containers(module)):
            return True
        return any(pattern.match(module) for pattern in self._compiled)

    @cached_property
    def _compiled(self) -> list[re.Pattern[str]]:
        return [re.compile(pattern) for pattern in self.patterns]


def _containers(module: str) -> Iterator[str]:
    """A module's name, and the names of the modules around it."""
    while module:
        yield module
        module = module.rpartition(".")[0]


@dataclass(frozen=True)
class FormatRules:
    """The formats of a checkpoint's modules; without rules, all are dense."""

    named: tuple[Rule, ...] = ()  # the first that describes a module decides
    linears: WeightFormat = DENSE  # of other linears
    embeddings: WeightFormat = DENSE  # of the embedding, if no rule describes it
    # How the config quantizes activations, as a notice shows it; they are not quantized here.
    activations: str = ""

    def of(self, module: str, *, embedding: bool = False) -> WeightFormat:
        """The format of a module's weight, such as that of "model.layers.0.mlp.up_proj"."""
        for rule in self.named:
            if rule.describes(module):
                return rule.format
        return self.embeddings if embedding else self.linears

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """The formats that occur, other than dense."""
        every = (self.linears, self.embeddings, *(rule.format for rule in self.named))
        return tuple(form for form in dict.fromkeys(every) if form != DENSE)


def names(keys: Keys, key: str) -> list[str]:
    """A list of names in the settings; null is an empty one. Raises CheckpointError."""
    value = keys.get(key, [])
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise keys.fail(f"'{key}' must be a list of names, not {value!r:.60}")
    return value


HEAD_IS_DENSE = Rule(DENSE, exact=frozenset({"lm_head"}))
"""The exception that most methods make without saying so."""


def checked(keys: Keys, pattern: str) -> str:
    """A regular expression from a config. Raises CheckpointError for one that may match slowly."""
    try:
        is_quick = len(pattern) <= _MAX_PATTERN and _steps(pattern) <= _MAX_STEPS
        re.compile(pattern if is_quick else "")
    except (re.error, RecursionError, OverflowError) as error:
        raise keys.fail(f"{pattern!r:.60} is not a regular expression: {error}") from None
    if not is_quick:
        raise keys.fail(f"the regular expression {pattern!r:.60} may take long: simplify it")
    return pattern


def _steps(pattern: str) -> float:
    """An upper bound of the steps in which a pattern without matches is compared with a name."""
    loops, choices, alternatives, previous = 0, 1.0, [1], ""
    for token in _TOKENS.findall(pattern):
        if token.startswith("("):
            alternatives.append(1)
        elif token == "|":
            alternatives[-1] += 1
        elif token == ")" and len(alternatives) > 1:
            choices *= alternatives.pop()
        elif token in ("*", "+", "{"):
            if previous == ")":
                return math.inf  # a repeated group
            loops += 1
        elif token == "?" and not previous.startswith("("):
            choices *= 2
        previous = token
    return (
        choices
        * math.prod(alternatives)
        * float(_NAME) ** min(loops, 99)
        / math.factorial(min(loops, 9))
    )


def excluded(keys: Keys, key: str) -> Rule:
    """The rule for `modules_to_not_convert` and its like, as transformers reads them.

    An entry is the name of a module, with what is inside it; the end of names; or a pattern.
    """
    entries = names(keys, key)
    plain = [name for name in entries if re.fullmatch(r"[\w.-]*", name)]
    patterns = [checked(keys, name) for name in entries if name not in plain]
    return Rule(
        DENSE,
        inside=frozenset(name.removesuffix(".") for name in plain),
        endings=tuple(plain),
        patterns=tuple(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))" for pattern in patterns),
    )


def refuse_kv_cache(keys: Keys, key: str = "kv_cache_scheme") -> None:
    """Raise CheckpointError if the settings quantize keys and values."""
    value: Any = keys.get(key)
    if value not in (None, {}, False):
        raise keys.fail(
            f"'{key}' is not supported: set it to null; keys and values are then kept in the dtype"
            " of the activations, which is more precise"
        )
