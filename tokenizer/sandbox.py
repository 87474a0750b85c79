"""The sandbox that chat templates run in, with limits on what an expression can make."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.filters
import jinja2.nodes
import jinja2.visitor
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokenizer.errors import TemplateError

_LONGEST_TEXT = 64 << 20  # characters of what one expression makes, and of the whole
_MOST_MADE = 256 << 20  # of what all expressions of one rendering make together
_MOST_TURNS = 1 << 20  # of all loops of one rendering together
_WIDE = re.compile(r"%[^a-zA-Z%]*(\*|\d{6})|\{[^{}]*:[^{}]*(\{|\d{6})")  # of % and of format


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox that counts the turns of loops and the characters that are made."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.begin()
        self.globals.pop("lipsum", None)  # makes as much text as it is told to
        for name in ("center", "indent", "replace", "format"):
            self.filters[name] = self._limited_filter(name, self.filters[name])
        self.filters["join"] = self._join
        for name in ("batch", "slice"):
            self.filters[name] = self._limited_count(self.filters[name])

    def begin(self) -> None:
        """Begin a rendering: everything is counted anew."""
        self._turns_left, self._made = _MOST_TURNS, 0

    def limit(self, tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
        """Let every loop of a template count its turns and every `~` what it makes."""
        for loop in list(tree.find_all(jinja2.nodes.For)):
            if loop.recursive:
                raise jinja2.TemplateError("recursive loops are not supported")
            loop.iter = _call("count_turns", [loop.iter])
        limited: jinja2.nodes.Template = _Concatenations().visit(tree)
        return limited

    def count_turns(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield the values of a loop while turns are left."""
        for value in values:
            self._turns_left -= 1
            if self._turns_left < 0:
                raise TemplateError(f"its loops go round more than {_MOST_TURNS} times")
            yield value

    def concat(self, pieces: Iterable[str]) -> str:
        """Join the pieces of a block that is kept, as in `{% set %}` or a macro."""
        kept = list(pieces)
        self.make(sum(map(len, kept)))
        return "".join(kept)

    def concatenate(self, *values: Any) -> str:
        """Do what `~` does."""
        return self.concat(map(str, values))

    def make(self, length: int) -> None:
        """Note that so many characters or items are about to be made, if that is allowed."""
        self._made += length
        if length > _LONGEST_TEXT or self._made > _MOST_MADE:
            most = _LONGEST_TEXT if length > _LONGEST_TEXT else _MOST_MADE
            raise TemplateError(f"it makes a text of more than {most} characters")

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Apply an operator unless the result would be enormous."""
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if hasattr(one, "__len__") and isinstance(other, int):
                    self.make(len(one) * max(other, 0))
        elif operator == "**" and not (abs(left) <= 2**32 and abs(right) <= 64):
            raise TemplateError("a power in it is too large")
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self.make(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            parts = right if isinstance(right, tuple) else (right,)
            self.make(_most("format", left, parts, {}))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **named: Any) -> Any:
        """Call what a template calls; a text's own methods make no enormous text."""
        text = getattr(function, "__self__", None)
        if isinstance(text, str):
            name = getattr(function, "__name__", "")
            if name == "join" and args:
                args = ([*args[0]], *args[1:])  # what can be gone through only once
            self.make(_most(name, text, args, named))
        return super().call(context, function, *args, **named)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a text's `format` as the sandbox has it, limited, and None for all else."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def limited(*args: Any, **named: Any) -> str:
            self.make(_most("format", value.__self__, args, named))
            return wrapped(*args, **named)

        return limited

    def _limited_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        passed = 1 if hasattr(function, "jinja_pass_arg") else 0  # what jinja puts before the text

        def limited(*args: Any, **named: Any) -> Any:
            self.make(_most(name, str(args[passed]), args[passed + 1 :], named))
            return function(*args, **named)

        if passed:
            limited.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return limited

    def _limited_count(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def limited(value: Any, *args: Any, **named: Any) -> Any:
            self.make(max(_numbers(args, named), default=0))
            return function(value, *args, **named)

        return limited

    def _join(self, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        if attribute is not None:
            value = map(jinja2.filters.make_attrgetter(self, attribute), value)
        pieces = [*map(str, value)]
        self.make(_most("join", str(d), (pieces,), {}))
        return str(d).join(pieces)


class _Concatenations(jinja2.visitor.NodeTransformer):
    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        """Let the environment do it, since no operator is intercepted that takes many."""
        self.generic_visit(node)
        return _call("concatenate", node.nodes)


def _call(method: str, args: list[Any]) -> jinja2.nodes.Call:
    attribute = jinja2.nodes.EnvironmentAttribute(method)  # no template can shadow it
    return jinja2.nodes.Call(attribute, args, [], None, None)


def _most(name: str, text: str, args: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Return the most characters that a text's method, or the filter of that name, can make."""
    given = [*args, *named.values()]
    widest = max(_numbers(args, named), default=0)
    if name == "replace":
        texts = [named.get("s", named.get("old")), named.get("new")]
        old, new = [*map(str, args[:2]), *(str(t) for t in texts if t is not None)][:2]
        return len(text) + text.count(old) * len(new)
    if name == "join":
        pieces = args[0] if args else ()
        return sum(len(str(piece)) + len(text) for piece in pieces)
    if name in ("format", "format_map"):
        if _WIDE.search(text):
            raise TemplateError("it formats to a width that is given elsewhere, or enormous")
        longest = max((len(str(value)) for value in given), default=0)
        return len(text) + (text.count("{") + text.count("%")) * (longest + 100_000 * (":" in text))
    if name == "indent":
        words = [len(value) for value in given if isinstance(value, str)]
        return len(text) + (text.count("\n") + 1) * max(widest, 4, *words)
    if name == "expandtabs":
        return len(text) + text.count("\t") * max(widest, 8)
    if name == "translate":
        raise TemplateError("it translates characters, which is not supported")
    return len(text) + widest


def _numbers(args: tuple[Any, ...], named: dict[str, Any]) -> list[int]:
    return [value for value in (*args, *named.values()) if isinstance(value, int)]
