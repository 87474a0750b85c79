"""safetensors or GGUF → parameters: checked against the config first, then streamed piece by piece.

A parameter is allocated with its first piece and packed into its final form after its last, so that
at most one parameter is in memory twice. A rank of a split model reads only its own part of each
tensor.
"""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model.adapted_experts import ChangedStack, expert_weights
from model.adapters import AdapterList, Adapters
from model.checkpoint_files import CheckpointFiles
from model.config import CheckpointError, ModelConfig, MoeConfig
from model.families import is_of_another_part, stored_names
from model.families.layer_formats import with_layer_formats
from model.families.tensor_names import ExpertNames, TensorNames, names_by
from model.formats import DENSE, WeightFormat, full_interface
from model.formats.dense import Dense
from model.formats.float8 import Float8
from model.formats.integers import Integers
from model.formats.rules import Rule
from model.gguf.files import GgufFiles, is_gguf
from model.ops.backend import Backend
from model.ops.dense import normalize
from model.ops.specs import Norm, Parameter
from model.stored_weights import StoredMap
from model.tensors.tensor_map import tensor_map
from model.transformer import Transformer

Files = CheckpointFiles | GgufFiles

# Stored by old exports; derived from the config here.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


def load(
    model: Transformer, checkpoint: str | Path, backend: Backend, adapters: AdapterList = ()
) -> None:
    """Fill the model's parameters from a checkpoint: a directory or a GGUF file.

    adapters: changes of the weights, which are added to them.

    Raises CheckpointError for a missing, unexpected or misshapen tensor and for unreadable files,
    before any large read.
    """
    with contextlib.ExitStack() as stack:
        files = _open(model.config, checkpoint, stack)
        found = _checked_map(model, files)
        changes = _checked_adapters(model, files, found, adapters, stack)
        parameters = _parameters(model, backend)
        for stored in found.pieces:
            is_changed = stored.piece.weight.name in changes
            parameters[stored.piece.holder_key].expect(stored.format, is_changed)
        # In file order, so that each file is read once, front to back.
        for stored in sorted(found.pieces, key=lambda stored: files.order(stored.tensors[0].name)):
            piece, parameter = stored.piece, parameters[stored.piece.holder_key]
            tensors = [files.read(tensor) for tensor in stored.tensors]
            try:
                source = stored.format.source(tensors, transposed=piece.weight.transposed)
                source = changes.merged(piece.weight, source)
                piece.write(parameter.storage(), parameter.accepted(source))
            except ValueError as error:
                tensor_names = " and ".join(tensor.name for tensor in stored.tensors)
                raise CheckpointError(f"{checkpoint}: {tensor_names}: {error}") from None
            parameter.pieces_left -= 1
            if not parameter.pieces_left:
                parameter.complete()
            del tensors, source
            files.close_if_large()
        _fill_unstored(parameters)
    _finish(model, backend)


def check(model: Transformer, checkpoint: str | Path, adapters: AdapterList = ()) -> None:
    """Raise CheckpointError as `load` does, from the headers of the files alone."""
    with contextlib.ExitStack() as stack:
        files = _open(model.config, checkpoint, stack)
        _checked_adapters(model, files, _checked_map(model, files), adapters, stack)


def with_adapters(
    config: ModelConfig, checkpoint: str | Path, adapters: AdapterList
) -> ModelConfig:
    """The config with dense formats of the weights that adapters change. Raises CheckpointError."""
    rules = config.stored_formats
    if not (adapters and rules.formats):
        return config
    with contextlib.ExitStack() as stack:
        files = _open(config, checkpoint, stack)
        changes = _adapters(config, files, adapters, stack)
        dense = Rule(DENSE, exact=frozenset(n.removesuffix(".weight") for n in changes.changed))
        changed = replace(config, stored_formats=replace(rules, named=(dense, *rules.named)))
        found = with_layer_formats(changed, _stored_names(config, files))
    return replace(found, stored_formats=rules)


def _open(config: ModelConfig, checkpoint: str | Path, stack: contextlib.ExitStack) -> Files:
    path = Path(checkpoint)
    if is_gguf(path):
        return GgufFiles(path, config, stack)
    return CheckpointFiles(path, stack)


def load_dummy(model: Transformer, backend: Backend, seed: int = 0) -> None:
    """Fill the parameters with random values of a typical magnitude, for timing."""
    generator = torch.Generator(backend.device)
    for number, parameter in enumerate(_parameters(model, backend).values()):
        generator.manual_seed(seed + number)  # parameters that all ranks hold are equal on all
        parameter.fill_random(generator)
        parameter.complete()
    _finish(model, backend)


def _parameters(model: Transformer, backend: Backend) -> dict[tuple[int, str], "_Filling"]:
    return {
        (id(declared.holder), declared.attribute): _Filling(declared, backend)
        for declared in model.parameters()
    }


@dataclass
class _Filling:
    """A declared parameter that is being filled."""

    declared: Parameter
    backend: Backend
    pieces_left: int = 0
    _becomes_dense: bool = False
    _storage: Any = None

    @property
    def format(self) -> WeightFormat | None:
        """The weight's format; None for a plain tensor."""
        declared = self.declared.format
        if declared is None or self._becomes_dense:
            return None if declared is None else DENSE
        return full_interface(declared)

    def expect(self, stored: WeightFormat, is_changed: bool) -> None:
        """Count a piece that is stored in this format; is_changed: an adapter changes it."""
        self.pieces_left += 1
        if self.format is None or isinstance(self.format, Dense):
            return
        is_taken = self.format.quantizes if is_changed else self.format.takes(stored)
        if not is_taken:
            self._becomes_dense = True

    def storage(self) -> Any:
        """The parameter's storage, which is allocated at first use."""
        if self._storage is None:
            shape, backend = self.declared.shape, self.backend
            if self.format is None:
                dtype = torch.float32 if self.declared.is_float32 else backend.dtype
                self._storage = torch.empty(shape, dtype=dtype, device=backend.device)
            else:
                self._storage = self.format.allocate(backend, shape, self.declared.parts)
        return self._storage

    def accepted(self, source: Any) -> Any:
        """A weight from the checkpoint in the form that the storage takes.

        Raises ValueError if it is dense and the storage is not.
        """
        is_dense = self.format is None or isinstance(self.format, Dense)
        if isinstance(self.format, Integers | Float8):  # dense if kernels do not take the shape
            is_dense = not getattr(self.storage(), "group", 0)
        if isinstance(source, torch.Tensor | ChangedStack):
            if self.format is not None and not is_dense and not self.format.quantizes:
                raise ValueError(
                    f"stored dense, though by 'quantization_config' it is {self.format.name}: name"
                    " it there as an exception"
                )
            return source
        return source.dense(self.backend.dtype) if is_dense else source

    def fill_random(self, generator: torch.Generator) -> None:
        """Fill matrices with random values, other vectors with 0, and norms so that they have 1."""
        declared, storage = self.declared, self.storage()
        if self.format is not None:
            self.format.fill_random(storage, generator)
        elif len(declared.shape) > 1:
            storage.uniform_(-0.03, 0.03, generator=generator)
        else:
            is_factor = isinstance(declared.holder, Norm) or declared.attribute == "scalar"
            storage.fill_(1.0 - declared.offset if is_factor else 0.0)

    def complete(self) -> None:
        """Set the attribute to the filled storage in the form that the operations take."""
        declared, storage = self.declared, self.storage()
        if self.format is not None:
            storage = self.format.finish(self.backend, storage)
        elif declared.offset or declared.factor != 1:
            storage.mul_(declared.factor).add_(declared.offset)
        setattr(declared.holder, declared.attribute, storage)
        self._storage = None


def _stored_names(config: ModelConfig, files: Files) -> TensorNames:
    """The family's names; of a tied pair, one may be stored under the other's name."""
    if isinstance(files, GgufFiles):
        return files.names
    names = stored_names(config.model_type, files.file_of)
    is_under_head = names.embedding not in files.file_of and names.head in files.file_of
    if config.tie_word_embeddings and is_under_head:
        names = replace(names, embedding=names.head)
    if names.experts.transposed and config.moe is not None:
        names = replace(names, experts=_as_stored(names, config, config.moe, files))
    return names


def _as_stored(
    names: TensorNames, config: ModelConfig, moe: MoeConfig, files: Files
) -> ExpertNames:
    """The names of experts, not transposed if the tensors of the first layer with experts are not.

    Later versions of transformers wrote Qwen3-VL-MoE's experts as [experts, outputs, inputs].
    """
    first = next(i for i, layer in enumerate(config.layers) if layer.sparse)
    hidden, size = config.hidden_size, moe.intermediate_size
    for stem, parts in names.experts.linears:
        outputs, inputs = (hidden, size) if parts == ("down",) else (2 * size, hidden)
        name = names.layer.format(layer=first) + stem
        if outputs != inputs and name in files.file_of:
            shape, _ = files.describe(name)
            return replace(names.experts, transposed=shape[1:] != (outputs, inputs))
    return names.experts


def _fill_unstored(parameters: "dict[tuple[int, str], _Filling]") -> None:
    """Fill the weights of norms that checkpoints do not have."""
    for parameter in parameters.values():
        holder = parameter.declared.holder
        if isinstance(holder, Norm) and not holder.is_stored:
            parameter.storage().fill_(1.0)
            parameter.complete()


def _finish(model: Transformer, backend: Backend) -> None:
    """Tie the head and normalize the embedding, if the config says so."""
    if model.config.embedding_norm:
        assert model.embedding is not None  # it was just filled
        for rows in model.embedding.split(1 << 12):  # bounds the memory of the float32 copy
            rows.copy_(normalize(rows, model.config.norm.eps))
    if model.config.tie_word_embeddings:
        assert model.embedding is not None  # it was just filled
        model.head.weight = full_interface(model.head.format).tied(backend, model.embedding)


def _checked_map(model: Transformer, files: Files) -> StoredMap:
    """The map of the model's tensors, all of which are in the files."""
    _check_count(model.config, files)
    names = _stored_names(model.config, files)

    def find(name: str) -> tuple[tuple[int, ...], str] | None:
        return files.describe(name) if name in files.file_of else None

    try:
        found = StoredMap.of(tensor_map(model, names), model.config.stored_formats, find)
    except ValueError as error:
        raise CheckpointError(f"{files.folder}: {error}") from None
    _check(found, files, model.config, names)
    return found


def _checked_adapters(
    model: Transformer,
    files: Files,
    found: StoredMap,
    given: AdapterList,
    stack: contextlib.ExitStack,
) -> Adapters:
    """The adapters, which fit the model."""
    changes = _adapters(model.config, files, given, stack)
    names = _stored_names(model.config, files)
    tied = (names.embedding, names.head) if model.config.tie_word_embeddings else ()
    changes.check((stored.piece.weight for stored in found.pieces), found.expected, tied)
    return changes


def _adapters(
    config: ModelConfig, files: Files, given: AdapterList, stack: contextlib.ExitStack
) -> Adapters:
    """The adapters with the names that the checkpoint has for what they change."""
    if not given:
        return Adapters((), stack)
    names, theirs = _stored_names(config, files), stored_names(config.model_type, ())
    others = names_by(theirs, names, len(config.layers))
    return Adapters(given, stack, others, expert_weights(config, names, theirs))


def _check_count(config: ModelConfig, files: Files) -> None:
    """Refuse a config with far more layers or experts than are stored before they are mapped."""
    source = files.config_name
    stored, needed, experts = len(files.file_of), len(config.layers), ""
    names = _stored_names(config, files)
    stems = [stem for stem, _ in names.experts.linears]
    if config.moe is not None and any("{expert}" in stem for stem in stems):
        needed += config.moe.num_experts * sum(layer.sparse for layer in config.layers)
        experts = f" with {config.moe.num_experts} experts"
    if needed > stored:
        raise CheckpointError(
            f"{files.folder}: {source} requires {len(config.layers)} layers{experts}, but only "
            f"{stored} tensors are stored: it belongs to another model, or files are missing"
        )


def _unused_projections(config: ModelConfig, names: TensorNames) -> list[str]:
    """Names of unused keys and values, stored with layers that attend to those of others."""
    stems = [stem for stem, parts in names.attention if set(parts) <= {"k", "v"}]
    stems += [names.k_norm, names.k_norm.replace("k_norm", "v_norm")]
    layers = (i for i, layer in enumerate(config.layers) if layer.kv_source is not None)
    return [names.layer.format(layer=i) + stem for i in layers for stem in stems]


def _check(found: StoredMap, files: Files, config: ModelConfig, names: TensorNames) -> None:
    expected = found.expected
    for name, stored in expected.items():
        if name not in files.file_of:
            raise CheckpointError(
                f"{files.folder}: tensor {name!r} of shape {list(stored.shape)} is missing"
            )
        shape, dtype = files.describe(name)
        if shape != stored.shape:
            raise CheckpointError(
                f"{files.path(name)}: tensor {name!r} has shape {list(shape)},"
                f" but {files.config_name} requires {list(stored.shape)}"
            )
        if dtype not in stored.dtypes:
            raise CheckpointError(
                f"{files.path(name)}: tensor {name!r} has dtype {dtype},"
                f" expected {' or '.join(stored.dtypes)}"
            )
    beyond = range(len(config.layers), len(config.layers) + config.mtp_layers)
    unused = (*(names.layer.format(layer=i) for i in beyond), *_unused_projections(config, names))
    for name in files.file_of:
        spare_head = name == names.head and config.tie_word_embeddings
        ignored = name.endswith(_IGNORED_SUFFIXES) or is_of_another_part(config.model_type, name)
        ignored = ignored or found.is_unused(name) or name.startswith(unused)
        if name not in expected and not spare_head and not ignored:
            raise CheckpointError(
                f"{files.path(name)}: tensor {name!r} is not part of a {config.model_type} model"
                f" with {files.config_name.replace('its', 'this')}"
            )
