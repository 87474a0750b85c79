"""LoRA adapters in PEFT's format, which are added to the weights as these are loaded.

A low-rank adapter (Hu et al. 2021, https://arxiv.org/abs/2106.09685) changes a weight W to
W + scale · B · A, with scale = alpha / rank, or alpha / √rank with `use_rslora` (Kalajdzievski
2023, https://arxiv.org/abs/2312.03732). Sums are computed in float32, before any quantization.
"""

import contextlib
import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.adapted_experts import ChangedStack, ExpertWeight, as_float32
from model.config import CheckpointError, open_regular, read_json
from model.families.config_keys.keys import Keys
from model.formats.rules import checked
from model.tensors.pieces import NamedWeight

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter."""
_PICKLED = "adapter_model.bin"  # what PEFT wrote in their place

AdapterList = Sequence[tuple[str, float]]
"""Directories of adapters, each with the factor of its changes."""

_PREFIX = "base_model.model."
_UNDERSTOOD = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("target_parameters",),
    *("layers_pattern", "init_lora_weights", "lora_dropout", "task_type", "inference_mode"),
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "runtime_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying", "eva_config"),
)
# Ways of initialization that change the weights of the base model.
_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KINDS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "embedding A",
    "lora_embedding_B": "embedding B",
    "base_layer.weight": "base",  # of an embedding, which PEFT stores with its change
    "weight": "whole",
}


@dataclass(frozen=True)
class _Change:
    """What an adapter changes in one module."""

    adapter: "_Adapter"
    module: str
    tensors: Mapping[str, str]  # kind → name in the adapter's file

    @property
    def is_of_experts(self) -> bool:
        """Whether it changes a parameter of all experts of a layer."""
        return self.module.replace(".base_layer", "").endswith(".experts") and "A" in self.tensors

    @property
    def shapes(self) -> str:
        """The shapes of A and B, for errors."""
        return " and ".join(str([*self.adapter.shape(self.tensors[kind])]) for kind in ("A", "B"))

    @property
    def replaces(self) -> bool:
        """Whether the result does not depend on the checkpoint's weight."""
        return not self.tensors.keys().isdisjoint(("whole", "base"))

    def apply(self, weight: NamedWeight, values: torch.Tensor) -> torch.Tensor:
        """Change this rank's part of a weight, float32. Raises CheckpointError."""
        part = [*weight.part, slice(None), slice(None)]
        rows, columns = part[:2]
        if "whole" in self.tensors:
            return self.adapter.tensor(self.tensors["whole"], weight.shape)[rows, columns]
        outputs, inputs = weight.shape
        if "A" in self.tensors:
            first = self.adapter.tensor(self.tensors["A"], (None, inputs))
            second = self.adapter.tensor(self.tensors["B"], (outputs, len(first)))
        else:  # of embeddings they are transposed
            second = self.adapter.tensor(self.tensors["embedding A"], (None, outputs)).T
            first = self.adapter.tensor(self.tensors["embedding B"], (inputs, second.shape[1])).T
        if "base" in self.tensors:
            values = self.adapter.tensor(self.tensors["base"], weight.shape)[rows, columns]
        scale = self.adapter.scale(self.module, len(first))
        return values + second[rows] @ first[:, columns] * scale

    def fits(self, part: ExpertWeight, weight: NamedWeight) -> bool:
        """Whether this is a change of the experts' parameter that a weight is a part of."""
        a, b = (self.adapter.shape(self.tensors[kind]) for kind in ("A", "B"))
        return len(a) == len(b) == 2 and (b[0], a[1]) == part.shape(weight)

    def of_expert(self, part: ExpertWeight, weight: NamedWeight, expert: int) -> torch.Tensor:
        """What is added to a weight of one expert, float32. Raises CheckpointError."""
        outputs, inputs = part.shape(weight)
        first = self.adapter.tensor(self.tensors["A"], (None, inputs))
        second = self.adapter.tensor(self.tensors["B"], (outputs, len(first)))
        module = f"{self.module.replace('.base_layer', '')}.{part.parameter}"
        scale = self.adapter.scale(module, len(first) / part.count)
        return part.change(first, second, expert) * scale


class _Adapter:
    """One adapter's files."""

    def __init__(self, folder: Path, factor: float, stack: contextlib.ExitStack):
        self.folder, self._factor = folder, factor
        if not folder.is_dir():
            raise CheckpointError(f"the directory of the adapter {folder} does not exist")
        if not (folder / CONFIG).exists():
            raise CheckpointError(
                f"{folder} is not an adapter in PEFT's format: it has no {CONFIG}"
            )
        self._keys = _read_config(folder / CONFIG)
        if (folder / _PICKLED).exists() and not (folder / WEIGHTS).exists():
            raise CheckpointError(
                f"{folder}: contains {_PICKLED}, which is not supported, because loading it can run"
                f" code: convert it to {WEIGHTS} with PEFT's save_pretrained"
            )
        open_regular(folder / WEIGHTS).close()  # the library would open anything
        with self._worded_errors():
            self._file: Any = stack.enter_context(safe_open(folder / WEIGHTS, framework="pt"))
            self._names = list(self._file.keys())
        self._last: dict[str, torch.Tensor] = {}  # tensors, of which experts read parts

    def changes(self) -> dict[str, _Change]:
        """What it changes, by module. Raises CheckpointError for a tensor that is not known."""
        modules: dict[str, dict[str, str]] = {}
        for name in self._names:
            ending = next((ending for ending in _KINDS if name.endswith(f".{ending}")), None)
            if ending is None or not name.startswith(_PREFIX):
                raise CheckpointError(
                    f"{self.folder / WEIGHTS}: tensor {name!r} is not supported: only LoRA of "
                    "linear layers and embeddings, and whole modules"
                )
            module = name[len(_PREFIX) : -len(ending) - 1]
            modules.setdefault(module, {})[_KINDS[ending]] = name
        for module, tensors in modules.items():
            if tensors.keys() - {"base"} not in (
                {"A", "B"},
                {"embedding A", "embedding B"},
                {"whole"},
            ):
                raise CheckpointError(
                    f"{self.folder / WEIGHTS}: of {module!r} it contains {' and '.join(tensors)}"
                )
            if "whole" in tensors and self._factor != 1:
                raise CheckpointError(
                    f"{self.folder / WEIGHTS}: replaces {module!r} as a whole, so that its weight "
                    f"can only be 1, not {self._factor:g}"
                )
        return {module: _Change(self, module, own) for module, own in modules.items()}

    def tensor(self, name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
        """A tensor in float32; None in its shape is any size. Raises CheckpointError."""
        own = self.shape(name)
        fits = len(own) == len(shape) and all(
            size in (None, each) for size, each in zip(shape, own, strict=True)
        )
        if fits and name in self._last:
            return self._last[name]
        with self._worded_errors():
            if not fits:
                wanted = ", ".join("rank" if size is None else str(size) for size in shape)
                raise CheckpointError(
                    f"{self.folder / WEIGHTS}: tensor {name!r} has shape {list(own)}, but the "
                    f"model requires [{wanted}]"
                )
            values: torch.Tensor = self._file.get_tensor(name)
        if not values.is_floating_point():
            raise CheckpointError(f"{self.folder / WEIGHTS}: tensor {name!r} is not floating-point")
        self._last = {**dict([*self._last.items()][-3:]), name: values.float()}
        return self._last[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        with self._worded_errors():
            return tuple(self._file.get_slice(name).get_shape())

    def scale(self, module: str, rank: float) -> float:
        """The factor of B · A. Raises CheckpointError."""
        stated = self._by_pattern("rank_pattern", module, self._keys.integer("r", 8))
        if stated != rank:
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: the rank of {module!r} is {rank:g}, but {CONFIG} states "
                f"{stated}"
            )
        alpha = self._by_pattern("alpha_pattern", module, self._keys.number("lora_alpha", 8))
        own = math.sqrt(rank) if self._keys.boolean("use_rslora", False) else rank
        return self._factor * alpha / own

    def _by_pattern(self, key: str, module: str, default: float) -> float:
        """The value of the first pattern that matches the end of a module's name."""
        patterns = self._keys.get(key, {})
        if not isinstance(patterns, dict):
            raise self._keys.fail(f"'{key}' must be an object, not {patterns!r:.60}")
        for pattern, value in patterns.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < 1e9:
                raise self._keys.fail(f"'{key}' must have numbers above 0, not {value!r:.60}")
            if re.match(rf"(.*\.)?({checked(self._keys, pattern)})$", module):
                return float(value)
        return default

    @contextlib.contextmanager
    def _worded_errors(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: damaged or truncated ({error}); download it again"
            ) from None


class Adapters:
    """Several adapters of one model; files stay open until the stack is closed.

    names: the tensors' names in the checkpoint, by their names in transformers, where they differ.
    experts: the weights of experts, by their names in the checkpoint. Raises CheckpointError for an
    adapter that cannot be read or is of another kind.
    """

    def __init__(
        self,
        given: AdapterList,
        stack: contextlib.ExitStack,
        names: Mapping[str, str] | None = None,
        experts: Mapping[str, ExpertWeight] | None = None,
    ):
        self._changes: dict[str, list[_Change]] = {}
        self._experts = experts or {}
        self._of_experts: dict[str, list[_Change]] = {}  # by layer, as ExpertWeight has it
        layers = dict.fromkeys(part.layer for part in self._experts.values())
        for folder, factor in given:
            for module, change in _Adapter(Path(folder), factor, stack).changes().items():
                layer = next((layer for layer in layers if module.startswith(layer)), None)
                if layer is not None and change.is_of_experts:
                    self._of_experts.setdefault(layer, []).append(change)
                    continue
                name = f"{module}.weight"
                self._changes.setdefault((names or {}).get(name, name), []).append(change)
        for name, changes in self._changes.items():
            if len(changes) > 1 and any(change.replaces for change in changes):
                raise CheckpointError(
                    f"{changes[-1].adapter.folder}: several adapters change {name!r}, and one of "
                    "them replaces it as a whole"
                )

    @property
    def changed(self) -> list[str]:
        """The names of the weights that change; of a layer whose experts change, of all experts."""
        experts = (name for name, part in self._experts.items() if part.layer in self._of_experts)
        return [*self._changes, *experts]

    def __contains__(self, name: object) -> bool:
        """Whether a weight is one of `changed`."""
        part = self._experts.get(str(name))
        return name in self._changes or (part is not None and part.layer in self._of_experts)

    def check(
        self, weights: Iterable[NamedWeight], elsewhere: Container[str], tied: Container[str]
    ) -> None:
        """Raise CheckpointError if an adapter does not fit the model with these weights.

        elsewhere: names of tensors that other ranks read. tied: the names of an embedding that is
        also the head, and of the head.
        """
        known = {weight.name: weight for weight in weights}
        for name, changes in self._changes.items():
            folder = changes[0].adapter.folder
            if name in tied:
                raise CheckpointError(
                    f"{folder}: changes {name!r}, which the model uses both as embedding and as "
                    "head; that is not supported: merge it with PEFT's merge_and_unload"
                )
            weight = known.get(name)
            if weight is None and name in elsewhere:
                continue
            if weight is None or weight.module is None or len(weight.shape) != 2:
                raise CheckpointError(
                    f"{folder}: changes {name!r}, which is not a linear or embedding of this model"
                )
            for change in changes:
                none = NamedWeight(name, weight.shape, (slice(0, 0), slice(0, 0)))
                change.apply(none, torch.zeros(0, 0))  # the shapes
        fitting = []
        for name, part in self._experts.items():
            if name in known:
                own = self._changes_of(part, known[name])
                fitting += own
                for change in own[: part.expert in (None, 0)]:
                    change.of_expert(part, known[name], 0)  # the rank
        for change in (each for changes in self._of_experts.values() for each in changes):
            if change not in fitting:
                raise CheckpointError(
                    f"{change.adapter.folder}: changes {change.module!r} with tensors of shapes "
                    f"{change.shapes}, which are not those of this model's experts"
                )

    def _changes_of(self, part: ExpertWeight, weight: NamedWeight) -> list[_Change]:
        """The changes of the parameter of experts that a weight is a part of."""
        return [c for c in self._of_experts.get(part.layer, ()) if c.fits(part, weight)]

    def merged(self, weight: NamedWeight, source: Any) -> Any:
        """A weight with all changes, in float32; as it is without any."""
        part = self._experts.get(weight.name)
        of_experts = [] if part is None else self._changes_of(part, weight)
        if part is not None and of_experts:
            return self._merged_experts(part, of_experts, weight, source)
        changes = self._changes.get(weight.name, ())
        if not changes:
            return source
        values = as_float32(source)
        for change in changes:
            values = change.apply(weight, values)
        return values

    def _merged_experts(
        self, part: ExpertWeight, changes: list[_Change], weight: NamedWeight, source: Any
    ) -> Any:
        def change(expert: int, values: torch.Tensor) -> torch.Tensor:
            for each in changes:
                values = values + each.of_expert(part, weight, expert)
            return values

        if part.expert is not None:
            return change(part.expert, as_float32(source))
        numbers = range(part.count)[weight.part[0]]
        return ChangedStack(source, lambda index, values: change(numbers[index], values))


def _read_config(path: Path) -> Keys:
    """adapter_config.json. Raises CheckpointError for what is not understood."""
    keys = Keys(path, read_json(path))
    if keys.get("peft_type") != "LORA":
        raise keys.fail(
            f"peft_type {keys.get('peft_type')!r:.60} is not supported; supported: LORA"
        )
    try:
        keys.refuse_unknown(_UNDERSTOOD, {"bias": "none", "fan_in_fan_out": False})
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; what is not supported here, PEFT's merge_and_unload merges into the model"
        ) from None
    start = keys.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASES):
        raise keys.fail(
            f"'init_lora_weights' {start!r:.60} changes the base model: convert the adapter with "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    return keys
