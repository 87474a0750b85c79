"""The kernel of each operation: the default, one with other tiles, or plain torch.

The default tiles (`tiles.py`) were chosen without access to every device. `candidates` lists
alternatives that may be faster on a device, or correct where the default fails.
`model.checks.verify` tries them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from model.ops.backend import OPERATIONS
from model.ops.triton.tiles import SMALL, Target, Tile, Tiles

TORCH = "torch"
"""The choice of an operation that plain torch computes."""

Choice = str | Mapping[str, Any]
"""TORCH, or values of fields of `Tiles` as JSON has them."""

# Where torch computes an operation, it also takes these methods: those that store its weights, and
# what the plain operation calls that runs the same kernel.
TORCH_METHODS: dict[str, tuple[str, ...]] = {
    "activate": ("gated",),
    "experts": ("pack_experts", "pack_mxfp4"),
}

_ONE_ROW = Tile(1, 16, 256, 4, 3)
_ATTENTION = (
    *("decode", "decode_256", "decode_latent"),
    *("prefill", "prefill_wide", "prefill_256", "prefill_latent"),
)


@dataclass(frozen=True)
class Selection:
    """Choices for operations that do not use the default kernel; JSON in reports and journals."""

    choices: Mapping[str, Choice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError for choices that this version does not know."""
        for op, choice in self.choices.items():
            if op not in OPERATIONS:
                raise ValueError(f"{op!r} is not an operation whose kernel can be chosen")
            if choice != TORCH:
                _changes(op, choice)

    def is_torch(self, op: str) -> bool:
        """Whether plain torch computes an operation."""
        return self.choices.get(op) == TORCH

    def without(self, name: str) -> "Selection":
        """Return the same choices, with the default value of one field of Tiles."""
        kept: dict[str, Choice] = {}
        for op, choice in self.choices.items():
            if isinstance(choice, Mapping):
                choice = {field: value for field, value in choice.items() if field != name}
            if choice:
                kept[op] = choice
        return Selection(kept)

    def target(self, op: str, target: Target) -> Target:
        """Return a device with the tiles that an operation uses."""
        choice = self.choices.get(op, TORCH)
        if choice == TORCH:
            return target
        return replace(target, tiles=replace(target.tiles, **_changes(op, choice)))


def candidates(op: str, target: Target) -> list[Choice]:
    """Return alternatives to an operation's default kernel, the most promising first.

    The last one is TORCH. Each changes one thing, so that the best of several can be combined.
    """
    tiles = target.tiles
    found: list[dict[str, Any]] = []
    if op in ("linear", "logits", "norm_qkv", "norm_mlp"):
        found += _few_rows(op, tiles)
    elif op == "attention":
        found.append({"decode": replace(tiles.decode, n=16, warps=1)})
        if target.vendor != "amd":  # where rows are split only with one wave
            found.append({"decode": replace(tiles.decode, n=64, warps=4)})
        for m, warps in ((64, 4), (128, 8)):
            found.append(
                {
                    name: replace(getattr(tiles, name), m=m, warps=warps, max_registers=0)
                    for name in ("prefill", "prefill_wide")
                }
            )
        found.append({name: getattr(SMALL, name) for name in _ATTENTION})
    elif op == "experts":
        packed = ("mxfp4_gate_up", "mxfp4_down")
        for names in (packed, ("experts",)):
            found.append({name: _narrow(getattr(tiles, name)) for name in names})
        found.append({"short": 0 if tiles.short else 32})
        found.append({name: getattr(SMALL, name) for name in (*packed, "experts")})
    elif op == "norm_experts":
        found.append({"fused_router": 0 if tiles.fused_router else 16})
    if op in ("linear", "logits", "experts"):
        quantized = ("quantized", "fp8")
        found += [{name: _narrow(getattr(tiles, name))} for name in quantized]
        found.append({name: getattr(SMALL, name) for name in quantized})
    if tiles.programmatic_launch:
        found.append({"programmatic_launch": False})
    prior = {name: getattr(tiles, name) for each in found for name in each}
    changed = [each for each in found if any(value != prior[n] for n, value in each.items())]
    return [*map(_as_json, changed), TORCH]


def _few_rows(op: str, tiles: Tiles) -> list[dict[str, Any]]:
    """Candidates of the operations that a single row or few rows go through."""
    found: list[dict[str, Any]] = []
    if op == "norm_qkv":
        found.append({"fused_qkv": 0 if tiles.fused_qkv else 1})
    if op == "norm_mlp":
        found.append({"fused_gate_up": 0 if tiles.fused_gate_up else 1})
    if tiles.one_row is None:
        found.append({"one_row": _ONE_ROW})
    else:
        found.append({"one_row": replace(tiles.one_row, n=8, k=512)})
        if op in ("linear", "logits"):
            found.append({"one_row": None})  # torch's library
    if op in ("norm_qkv", "norm_mlp"):
        found.append({"fused": SMALL.fused, "one_row": None})
    return found


def _narrow(tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
    """Return tiles of which those for few rows have half as many columns."""
    few, *more = tiles
    return (replace(few, n=few.n // 2, warps=max(1, few.warps // 2)), *more)


def _as_json(changes: Mapping[str, Any]) -> dict[str, Any]:
    def value_of(value: Any) -> Any:
        if isinstance(value, Tile):
            return {name: v for name, v in asdict(value).items() if v or name in _SHAPE}
        return [value_of(one) for one in value] if isinstance(value, tuple) else value

    return {name: value_of(value) for name, value in changes.items()}


_SHAPE = ("m", "n", "k", "warps", "stages")
_TILE_FIELDS = {f.name for f in fields(Tile)}
_KINDS = {f.name: f.type for f in fields(Tiles)}


def _changes(op: str, choice: Any) -> dict[str, Any]:
    """Return a choice as fields of Tiles. Raises ValueError."""
    if not isinstance(choice, Mapping):
        raise ValueError(f"{op}: {choice!r} is not a choice of kernels")
    return {name: _value(op, name, value) for name, value in choice.items()}


def _value(op: str, name: str, value: Any) -> Any:
    kind = _KINDS.get(name)
    if kind == "Tile | None" or kind == Tile | None:
        return None if value is None else _tile(op, name, value)
    if kind is Tile:
        return _tile(op, name, value)
    if kind == tuple[Tile, ...] and isinstance(value, list | tuple) and value:
        return tuple(_tile(op, name, one) for one in value)
    if (kind is int or kind is bool) and type(value) is kind:
        return value
    raise ValueError(f"{op}: {name} {value!r} is not a choice of kernels")


def _tile(op: str, name: str, value: Any) -> Tile:
    known = isinstance(value, Mapping) and set(_SHAPE) <= set(value) <= _TILE_FIELDS
    if known and all(type(number) is int and number >= 0 for number in value.values()):
        powers = all(number & (number - 1) == 0 for number in map(value.__getitem__, "mnk"))
        warps, stages = value["warps"], value["stages"]
        if powers and warps and warps & (warps - 1) == 0 and stages:
            return Tile(**value)
    raise ValueError(f"{op}: {name} {value!r} is not a tile")


def describe(op: str, choice: Choice) -> str:
    """Return a choice as reports show it: "attention: decode 16×32, 1 warp, 5 stages"."""
    if choice == TORCH:
        return f"{op}: plain torch"
    assert isinstance(choice, Mapping)
    return f"{op}: " + "; ".join(_text(name, value) for name, value in choice.items())


def _text(name: str, value: Any) -> str:
    name = name.replace("_", " ")
    if isinstance(value, list | tuple):
        return f"{name} " + " and ".join(_text("", one).strip() for one in value)
    if not isinstance(value, Mapping):
        return f"{name} {'off' if value in (None, False, 0) else value}"
    size = "×".join(str(value[axis]) for axis in "mnk" if value[axis])
    warps = f"{value['warps']} warp" + ("s" if value["warps"] > 1 else "")
    return f"{name} {size}, {warps}, {value['stages']} stages"
