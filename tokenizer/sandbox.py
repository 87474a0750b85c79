"""The sandbox that chat templates run in, with limits on what an expression can make."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.filters
import jinja2.nodes
import jinja2.visitor
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokenizer.errors import TemplateError

LONGEST_TEXT = 16 << 20  # characters of what one expression makes, and of the whole
_MOST_MADE = 256 << 20  # of what all expressions of one rendering make together
_MOST_TURNS = 1 << 20  # of all loops of one rendering together
_MOST_SECONDS = 10.0  # of the processor's time for a rendering; real templates take milliseconds
_MOST_BITS = 4096  # of a number that is made
_LIST, _ITEM = 256, 8  # bytes that a list takes until the end of the rendering, and each item
_JINJAS_OWN = ("_loop_vars", "_block_vars")  # which it passes with every call
_WIDE = re.compile(r"%[^a-zA-Z%]*(\*|\d{6})|\{[^{}]*:[^{}]*(\{|\d{6})")  # of % and of format


class _Namespace(jinja2.utils.Namespace):
    def __repr__(self) -> str:
        """Say nothing of what it holds: namespaces may hold each other, twice each."""
        return "<namespace>"


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox that counts the turns of loops, what is made and the time it takes.

    A list may hold another many times over at no cost, so each is made only if all that it holds
    could be written out: then whatever goes through a list comes to an end.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.begin()
        self.globals.pop("lipsum", None)  # makes as much text as it is told to
        self.globals["namespace"] = _Namespace
        for name in ("urlize", "wordwrap", "pprint"):  # slow with much text
            self.filters.pop(name)
        for name in ("center", "indent", "replace", "format"):
            self.filters[name] = self._limited_filter(name, self.filters[name])
        self.filters["join"] = self._join
        for name in ("batch", "slice"):
            self.filters[name] = self._limited_count(self.filters[name])

    def begin(self) -> None:
        """Begin a rendering: everything is counted anew."""
        self._turns_left, self._made = _MOST_TURNS, 0
        self._ends = time.thread_time() + _MOST_SECONDS
        self._weights: dict[int, tuple[Any, int]] = {}  # by id, with what has it: ids stay theirs

    def limit(self, tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
        """Let every loop of a template count its turns and every expression what it makes."""
        for loop in list(tree.find_all(jinja2.nodes.For)):
            if loop.recursive:
                raise jinja2.TemplateError("recursive loops are not supported")
            loop.iter = _call("count_turns", [loop.iter])
        limited: jinja2.nodes.Template = _Limited().visit(tree)
        return limited

    def count_turns(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield the values of a loop while turns are left."""
        for value in values:
            self._turns_left -= 1
            if self._turns_left < 0:
                raise TemplateError(f"its loops go round more than {_MOST_TURNS} times")
            self.checked(value)
            yield value

    def concat(self, pieces: Iterable[str]) -> str:
        """Join the pieces of a block that is kept, as in `{% set %}` or a macro."""
        kept = list(pieces)
        self.make(sum(map(len, kept)))
        return "".join(kept)

    def concatenate(self, *values: Any) -> str:
        """Do what `~` does."""
        return self.concat(str(self.checked(value)) for value in values)

    def make(self, length: int) -> None:
        """Note that so many characters or items are about to be made, if that is allowed."""
        self._made += length
        if length > LONGEST_TEXT or self._made > _MOST_MADE:
            most = LONGEST_TEXT if length > LONGEST_TEXT else _MOST_MADE
            raise TemplateError(f"it makes a text of more than {most} characters")

    def checked(self, value: Any) -> Any:
        """Return what an operation has made, unless it is too much or has taken too long."""
        if time.thread_time() > self._ends:
            raise TemplateError(f"it takes more than {_MOST_SECONDS:g} seconds")
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise TemplateError("a number in it is too large")
        if isinstance(value, (list, tuple, dict)) and self._weight(value) > LONGEST_TEXT:
            raise TemplateError(f"it makes a text of more than {LONGEST_TEXT} characters")
        return value

    def _weight(self, value: Any) -> int:
        """Return about how many characters a value has when all that it holds is written out."""
        if not isinstance(value, (list, tuple, dict)):
            return _ITEM + (len(value) if isinstance(value, str) else 0)
        if id(value) not in self._weights:
            self.make(_LIST + _ITEM * len(value))
            held = [*value, *value.values()] if isinstance(value, dict) else value
            self._weights[id(value)] = value, _ITEM + sum(map(self._weight, held))
        return self._weights[id(value)][1]

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
        return self.checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **named: Any) -> Any:
        """Call what a template calls; a text's own methods make no enormous text."""
        text = getattr(function, "__self__", None)
        if text is self:  # a limit of ours
            return super().call(context, function, *args, **named)
        if isinstance(text, str):
            name = getattr(function, "__name__", "")
            if name == "join" and args:
                args = ([*args[0]], *args[1:])  # what can be gone through only once
            self.make(_most(name, text, args, named))
        for name, value in (*enumerate(args), *named.items()):  # a macro may make lists of them
            if name not in _JINJAS_OWN:
                self.checked(value)
        return self.checked(super().call(context, function, *args, **named))

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
        pieces, length = [], 0
        for piece in value:
            pieces.append(str(self.checked(piece)))
            length += len(pieces[-1]) + len(str(d))
            if length > LONGEST_TEXT:
                break
        self.make(length)
        return str(d).join(pieces)


class _Limited(jinja2.visitor.NodeTransformer):
    """Puts calls of the environment's limits around what no operator or call leads to."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        """Let the environment do it, since no operator is intercepted that takes many."""
        self.generic_visit(node)
        return _call("concatenate", node.nodes)

    def _checked(self, node: jinja2.nodes.Node) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _call("checked", [node])

    visit_List = visit_Dict = visit_Compare = visit_Test = _checked

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Node:
        """Check a tuple that is made, not the names that one is taken apart to."""
        return self._checked(node) if node.ctx == "load" else node

    def visit_Filter(self, node: jinja2.nodes.Filter) -> jinja2.nodes.Node:
        """Check what a filter makes; a block's filter, which stands for no value, makes text."""
        if _of_a_block(node):
            return node
        return self._checked(node)


def _of_a_block(node: jinja2.nodes.Expr | None) -> bool:
    while isinstance(node, jinja2.nodes.Filter):
        node = node.node
    return node is None


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
        return sum(len(piece) + len(text) for piece in pieces if isinstance(piece, str))
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
