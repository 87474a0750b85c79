"""The sandbox that chat templates run in, with limits on text, collections, numbers and time."""

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

MAX_TEXT = 16 << 20  # characters in the result of one expression, and in the rendered text
_MAX_TOTAL = 256 << 20  # characters created by all expressions of one rendering together
_MAX_ITERATIONS = 1 << 20  # of all loops of one rendering together
_MAX_SECONDS = 10.0  # CPU time of one rendering; real templates take milliseconds
_MAX_INTEGER_BITS = 4096
_COLLECTION_SIZE, _ITEM_SIZE = 256, 8  # characters charged per collection and per item
_JINJA_ARGUMENTS = ("_loop_vars", "_block_vars")  # Jinja passes them with every call
# A field width that is an argument or has at least six digits, in `%` formatting or str.format.
_UNBOUNDED_WIDTH = re.compile(r"%[^a-zA-Z%]*(\*|\d{6})|\{[^{}]*:[^{}]*(\{|\d{6})")


class _Namespace(jinja2.utils.Namespace):
    def __repr__(self) -> str:
        """Omit the content: nested namespaces could make it exponentially long."""
        return "<namespace>"


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits on loop iterations, created text and CPU time.

    A list can refer to the same list many times at almost no cost, so a few nested lists can
    represent exponentially many items. A collection is therefore allowed only if its full written
    form is within the limit; everything that iterates over a collection then terminates.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reset_limits()
        self.globals.pop("lipsum", None)  # can create unlimited text
        self.globals["namespace"] = _Namespace
        for name in ("urlize", "wordwrap", "pprint"):  # slow on long text
            self.filters.pop(name)
        for name in ("center", "indent", "replace", "format"):
            self.filters[name] = self._limited_filter(name, self.filters[name])
        self.filters["join"] = self._join
        for name in ("batch", "slice"):
            self.filters[name] = self._limited_count(self.filters[name])

    def reset_limits(self) -> None:
        """Reset all counters; call it before each rendering."""
        self._iterations_left, self._created = _MAX_ITERATIONS, 0
        self._deadline = time.thread_time() + _MAX_SECONDS
        # Written sizes by id(). Each entry references its collection, so that no id is reused.
        self._sizes: dict[int, tuple[Any, int]] = {}

    def add_limits(self, tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
        """Make every loop of a template count its iterations and every expression its size."""
        for loop in list(tree.find_all(jinja2.nodes.For)):
            if loop.recursive:
                raise jinja2.TemplateError("recursive loops are not supported")
            loop.iter = _call("count_iterations", [loop.iter])
        limited: jinja2.nodes.Template = _LimitInserter().visit(tree)
        return limited

    def count_iterations(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield the values of a loop; raise TemplateError when no iterations are left."""
        for value in values:
            self._iterations_left -= 1
            if self._iterations_left < 0:
                raise TemplateError(f"its loops take more than {_MAX_ITERATIONS} iterations")
            self.checked(value)
            yield value

    def concat(self, pieces: Iterable[str]) -> str:
        """Join the pieces of a block whose text is kept, as in `{% set %}` or a macro."""
        kept = list(pieces)
        self.charge(sum(map(len, kept)))
        return "".join(kept)

    def concatenate(self, *values: Any) -> str:
        """Implement the operator `~`."""
        return self.concat(str(self.checked(value)) for value in values)

    def charge(self, length: int) -> None:
        """Count characters or items about to be created; raise TemplateError if too many."""
        self._created += length
        if length > MAX_TEXT or self._created > _MAX_TOTAL:
            limit = MAX_TEXT if length > MAX_TEXT else _MAX_TOTAL
            raise TemplateError(f"it creates more than {limit} characters of text")

    def checked(self, value: Any) -> Any:
        """Return the result of an operation; raise TemplateError if a limit is exceeded."""
        if time.thread_time() > self._deadline:
            raise TemplateError(f"it takes more than {_MAX_SECONDS:g} seconds")
        if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
            raise TemplateError("it computes a number that is too large")
        if isinstance(value, (list, tuple, dict)) and self._written_size(value) > MAX_TEXT:
            raise TemplateError(f"it creates more than {MAX_TEXT} characters of text")
        return value

    def _written_size(self, value: Any) -> int:
        """Return the approximate number of characters in the full written form of a value."""
        if not isinstance(value, (list, tuple, dict)):
            return _ITEM_SIZE + (len(value) if isinstance(value, str) else 0)
        if id(value) not in self._sizes:
            self.charge(_COLLECTION_SIZE + _ITEM_SIZE * len(value))
            items = [*value, *value.values()] if isinstance(value, dict) else value
            self._sizes[id(value)] = value, _ITEM_SIZE + sum(map(self._written_size, items))
        return self._sizes[id(value)][1]

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Apply a binary operator; raise TemplateError if the result would be too large."""
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if hasattr(one, "__len__") and isinstance(other, int):
                    self.charge(len(one) * max(other, 0))
        elif operator == "**" and not (abs(left) <= 2**32 and abs(right) <= 64):
            raise TemplateError("it computes a power that is too large")
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self.charge(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            parts = right if isinstance(right, tuple) else (right,)
            self.charge(_max_length("format", left, parts, {}))
        return self.checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **named: Any) -> Any:
        """Call a function for a template; raise TemplateError if its result would be too large."""
        text = getattr(function, "__self__", None)
        if text is self:  # a call that `add_limits` inserted
            return super().call(context, function, *args, **named)
        if isinstance(text, str):
            name = getattr(function, "__name__", "")
            if name == "join" and args:
                args = ([*args[0]], *args[1:])  # an iterator can be read only once
            self.charge(_max_length(name, text, args, named))
        for name, value in (*enumerate(args), *named.items()):  # a macro can collect its arguments
            if name not in _JINJA_ARGUMENTS:
                self.checked(value)
        return self.checked(super().call(context, function, *args, **named))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the sandbox's own `str.format` with a limit, or None for any other function."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def limited(*args: Any, **named: Any) -> str:
            self.charge(_max_length("format", value.__self__, args, named))
            return wrapped(*args, **named)

        return limited

    def _limited_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        at = 1 if hasattr(function, "jinja_pass_arg") else 0  # Jinja may pass its context first

        def limited(*args: Any, **named: Any) -> Any:
            self.charge(_max_length(name, str(args[at]), args[at + 1 :], named))
            return function(*args, **named)

        if at:
            limited.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return limited

    def _limited_count(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def limited(value: Any, *args: Any, **named: Any) -> Any:
            self.charge(max(_numbers(args, named), default=0))
            return function(value, *args, **named)

        return limited

    def _join(self, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        if attribute is not None:
            value = map(jinja2.filters.make_attrgetter(self, attribute), value)
        pieces, length = [], 0
        for piece in value:
            pieces.append(str(self.checked(piece)))
            length += len(pieces[-1]) + len(str(d))
            if length > MAX_TEXT:
                break
        self.charge(length)
        return str(d).join(pieces)


class _LimitInserter(jinja2.visitor.NodeTransformer):
    """Wraps expressions in checks where Jinja's operator and call hooks are not invoked."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        """Replace `~` by a call: it takes any number of operands, so Jinja has no hook for it."""
        self.generic_visit(node)
        return _call("concatenate", node.nodes)

    def _checked(self, node: jinja2.nodes.Node) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _call("checked", [node])

    visit_List = visit_Dict = visit_Compare = visit_Test = _checked

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Node:
        """Check a tuple that is created, but not the targets of an unpacking."""
        return self._checked(node) if node.ctx == "load" else node

    def visit_Filter(self, node: jinja2.nodes.Filter) -> jinja2.nodes.Node:
        """Check the result of a filter, except of a block's filter, which has no input value."""
        if _is_block_filter(node):
            return node
        return self._checked(node)


def _is_block_filter(node: jinja2.nodes.Expr | None) -> bool:
    while isinstance(node, jinja2.nodes.Filter):
        node = node.node
    return node is None


def _call(method: str, args: list[Any]) -> jinja2.nodes.Call:
    attribute = jinja2.nodes.EnvironmentAttribute(method)  # templates cannot shadow it
    return jinja2.nodes.Call(attribute, args, [], None, None)


def _max_length(name: str, text: str, args: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Return an upper bound on the length of the result of a str method or filter on `text`."""
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
        if _UNBOUNDED_WIDTH.search(text):
            raise TemplateError("it formats with a width that is an argument or too large")
        longest = max((len(str(value)) for value in given), default=0)
        return len(text) + (text.count("{") + text.count("%")) * (longest + 100_000 * (":" in text))
    if name == "indent":
        lengths = [len(value) for value in given if isinstance(value, str)]
        return len(text) + (text.count("\n") + 1) * max(widest, 4, *lengths)
    if name == "expandtabs":
        return len(text) + text.count("\t") * max(widest, 8)
    if name == "translate":
        raise TemplateError("it calls str.translate, which is not supported")
    return len(text) + widest


def _numbers(args: tuple[Any, ...], named: dict[str, Any]) -> list[int]:
    return [value for value in (*args, *named.values()) if isinstance(value, int)]
