"""safetensors → parameters: checked against the config first, then streamed piece by piece.

Each tensor of the checkpoint is a piece of one parameter (q, k and v of one fused weight, an
expert of a stack). A parameter is allocated at its first piece and packed for its device at its
last, so that never more than one parameter stands twice. Where ranks share the model, each reads
its own part of every tensor and no more.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.attention import Attention
from model.config import CheckpointError, ModelConfig, conversion, read_json
from model.mlp import Moe
from model.ops.backend import Backend
from model.ops.mxfp4 import MXFP4_BLOCK, Mxfp4
from model.ops.specs import Linear, Norm, Parameter
from model.sharding import Shard
from model.transformer import Transformer

_FLOATS = ("BF16", "F16", "F32")
# Mapped pages count as resident until the file is closed: close it about this often.
_REOPEN_BYTES = 512 << 20
# Stored by old exports, derived from the config here.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


@dataclass
class _Parameter:
    """A declared parameter that is being filled."""

    declared: Parameter
    backend: Backend
    storage: Any = None
    pieces_left: int = 0

    def begin(self) -> Any:
        """Return the parameter's storage, which is allocated at first use."""
        if self.storage is None:
            declared, backend = self.declared, self.backend
            if declared.format is not None:
                self.storage = declared.format.allocate(backend, declared.shape, declared.parts)  # type: ignore[attr-defined]
            else:
                self.storage = torch.empty(
                    declared.shape, dtype=backend.dtype, device=backend.device
                )
        return self.storage

    def complete(self) -> None:
        """Set the attribute to the filled storage in the form its operations are fastest with."""
        declared, storage = self.declared, self.storage
        if declared.format is not None:
            storage = declared.format.finish(self.backend, storage)  # type: ignore[attr-defined]
        setattr(declared.holder, declared.attribute, storage)
        self.storage = None


_Sources = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]  # name → shape, allowed dtypes
_Cut = tuple[slice, ...]  # of a tensor's first dimensions; none: all of it
_ALL = slice(None)


@dataclass(frozen=True)
class _Piece:
    """Tensors of the checkpoint that together fill a part of one parameter."""

    sources: _Sources
    parameter: _Parameter
    write: Callable[..., None]  # (parameter storage, *source tensors)
    cut: _Cut = ()  # the part of each source tensor that is read


def load(model: Transformer, checkpoint: str | Path, backend: Backend) -> None:
    """Fill the model's parameters from a checkpoint directory.

    Raises CheckpointError for a missing, extra or misshapen tensor and for unreadable files,
    before any large read.
    """
    builder = _pieces(model, backend)
    pieces = builder.pieces
    with contextlib.ExitStack() as stack:
        files = _Files(Path(checkpoint), stack)
        _check(builder, files, model.config)
        # In file order, so that a file is read once, front to back.
        pieces.sort(key=lambda piece: files.order(next(iter(piece.sources))))
        for piece in pieces:
            tensors = [files.read(name, piece.cut) for name in piece.sources]
            try:
                piece.write(piece.parameter.begin(), *tensors)
            except ValueError as error:
                raise CheckpointError(
                    f"{checkpoint}: {' and '.join(piece.sources)}: {error}"
                ) from None
            piece.parameter.pieces_left -= 1
            if not piece.parameter.pieces_left:
                piece.parameter.complete()
            del tensors
            files.relax()
        _tie_head(model, backend)


def load_dummy(model: Transformer, backend: Backend, seed: int = 0) -> None:
    """Fill the parameters with random values of a usual size, for timing."""
    generator = torch.Generator(backend.device)
    for number, declared in enumerate(model.parameters()):
        parameter = _Parameter(declared, backend)
        generator.manual_seed(seed + number)  # parameters that all ranks hold are equal on all
        value = parameter.begin()
        if not isinstance(value, torch.Tensor):
            value.random_(generator)
        elif value.dim() > 1:
            value.uniform_(-0.03, 0.03, generator=generator)
        else:
            value.fill_(1.0 if isinstance(declared.holder, Norm) else 0.0)
        parameter.complete()
    _tie_head(model, backend)


def _tie_head(model: Transformer, backend: Backend) -> None:
    if model.config.tie_word_embeddings:
        assert model.embedding is not None
        model.head.weight = backend.pack_embedding(model.embedding)


class _Files:
    """The safetensors files of a checkpoint and which tensor is in which."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        self.folder, self._stack = folder, stack
        self._open: dict[str, Any] = {}
        self._unmapped = 0
        index = folder / "model.safetensors.index.json"
        if (folder / "model.safetensors").is_file():
            names = dict.fromkeys(self._keys("model.safetensors"), "model.safetensors")
        elif index.is_file():
            names = self._read_index(index)
        else:
            raise CheckpointError(
                f"{folder}: holds neither model.safetensors nor model.safetensors.index.json"
                f"{conversion(folder)}"
            )
        self.file_of = names
        self._order = {name: i for i, name in enumerate(sorted(names, key=lambda n: (names[n], n)))}

    def _read_index(self, index: Path) -> dict[str, str]:
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
            raise CheckpointError(f"{index}: 'weight_map' must map tensor names to file names")
        for name in sorted(set(names.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index}: {name!r} is not a file of this directory")
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{self.folder / name}: missing, but the index names it")
        stored = {tensor: file for file in set(names.values()) for tensor in self._keys(file)}
        for tensor, file in names.items():
            if stored.get(tensor) != file:
                raise CheckpointError(f"{self.folder / file}: tensor {tensor!r} is missing")
        # A shard may hold a tensor that the index forgot: it is reported as extra.
        return stored

    def _keys(self, file: str) -> list[str]:
        return list(self._handle(file).keys())

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            with self._clear_errors(file):
                self._open[file] = self._stack.enter_context(
                    safe_open(self.folder / file, framework="pt")
                )
        return self._open[file]

    @contextlib.contextmanager
    def _clear_errors(self, file: str) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder / file}: damaged or truncated ({error}); fetch it again"
            ) from None

    def order(self, name: str) -> int:
        """Where a tensor stands when files are read one after the other."""
        return self._order[name]

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a tensor, from the file's header."""
        file = self.file_of[name]
        with self._clear_errors(file):
            view = self._handle(file).get_slice(name)
            return tuple(view.get_shape()), view.get_dtype()

    def read(self, name: str, cut: _Cut = ()) -> torch.Tensor:
        """The tensor, mapped from its file; of a part, that part alone is read."""
        file = self.file_of[name]
        with self._clear_errors(file):
            handle = self._handle(file)
            tensor: torch.Tensor = handle.get_slice(name)[cut] if cut else handle.get_tensor(name)
        self._unmapped += tensor.numel() * tensor.element_size()
        return tensor

    def relax(self) -> None:
        """Let go of what has been mapped, once it is much."""
        if self._unmapped > _REOPEN_BYTES:
            self._stack.close()
            self._open.clear()
            self._unmapped = 0


def _check(builder: "_Builder", files: _Files, config: ModelConfig) -> None:
    expected = dict(builder.elsewhere)
    for piece in builder.pieces:
        expected |= piece.sources
    for name, (shape, dtypes) in expected.items():
        if name not in files.file_of:
            raise CheckpointError(
                f"{files.folder}: tensor {name!r} of shape {list(shape)} is missing"
            )
        found, dtype = files.describe(name)
        if found != shape:
            raise CheckpointError(
                f"{files.folder / files.file_of[name]}: tensor {name!r} has shape {list(found)},"
                f" config.json makes it {list(shape)}"
            )
        if dtype not in dtypes:
            raise CheckpointError(
                f"{files.folder / files.file_of[name]}: tensor {name!r} has dtype {dtype},"
                f" expected {' or '.join(dtypes)}"
            )
    for name in files.file_of:
        spare_head = name == "lm_head.weight" and config.tie_word_embeddings
        if name not in expected and not spare_head and not name.endswith(_IGNORED_SUFFIXES):
            raise CheckpointError(
                f"{files.folder / files.file_of[name]}: tensor {name!r} is not part of a"
                f" {config.model_type} model of this config.json"
            )


class _Builder:
    """Collects the pieces of every parameter."""

    def __init__(self, model: Transformer, backend: Backend) -> None:
        self.pieces: list[_Piece] = []
        self.elsewhere: _Sources = {}  # tensors that other ranks read
        self.rank = model.shard.rank
        self._parameters = {
            (id(declared.holder), declared.attribute): _Parameter(declared, backend)
            for declared in model.parameters()
        }

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        owner: Any,
        attribute: str,
        write: Callable[..., None] | None = None,
        cut: _Cut = (),
    ) -> None:
        """One floating-point tensor that fills (a part of) an attribute of owner.

        cut: the part of it that is this rank's; none: all of it.
        """
        self.add_sources({name: (shape, _FLOATS)}, owner, attribute, write or _whole, cut)

    def add_sources(
        self,
        sources: _Sources,
        owner: Any,
        attribute: str,
        write: Callable[..., None],
        cut: _Cut = (),
    ) -> None:
        """Several tensors that fill it together, each of them cut."""
        parameter = self._parameters[id(owner), attribute]
        parameter.pieces_left += 1
        # A cut that cuts nothing away is none: a whole tensor is mapped and not copied.
        shape, _ = next(iter(sources.values()))
        if all(part.indices(n) == (0, n, 1) for part, n in zip(cut, shape, strict=False)):
            cut = ()
        self.pieces.append(_Piece(sources, parameter, write, cut))

    def linear(
        self,
        prefix: str,
        owner: Linear,
        outputs: int,
        inputs: int,
        first: int = 0,
        rows: slice = _ALL,
        columns: slice = _ALL,
    ) -> None:
        """These rows and columns of a linear of the checkpoint, which are ours from `first` on."""
        start, stop, _ = rows.indices(outputs)
        write = _rows(first, stop - start)
        self.add(f"{prefix}.weight", (outputs, inputs), owner, "weight", write, (rows, columns))
        if owner.has_bias:
            bias = write
            if owner.sum_over_ranks and self.rank:
                bias = _zeros  # rank 0 adds the bias
            self.add(f"{prefix}.bias", (outputs,), owner, "bias", bias, (rows,))


def _zeros(target: torch.Tensor, source: torch.Tensor) -> None:
    target.zero_()


def _whole(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


def _rows(first: int, count: int) -> Callable[..., None]:
    def write(target: torch.Tensor, source: torch.Tensor) -> None:
        target[first : first + count].copy_(source)

    return write


def _expert_rows(expert: int, first: int, count: int) -> Callable[..., None]:
    def write(target: torch.Tensor, source: torch.Tensor) -> None:
        target[expert][first : first + count].copy_(source)

    return write


def _pieces(model: Transformer, backend: Backend) -> _Builder:
    """Every tensor that a Hugging Face checkpoint of this config holds, and where it goes."""
    config, shard, builder = model.config, model.shard, _Builder(model, backend)
    hidden, vocab = config.hidden_size, config.vocab_size
    own = (shard.vocab_part(vocab),)
    builder.add("model.embed_tokens.weight", (vocab, hidden), model, "embedding", cut=own)
    builder.add("model.norm.weight", (hidden,), model.final_norm, "weight")
    if not config.tie_word_embeddings:
        builder.add("lm_head.weight", (vocab, hidden), model.head, "weight", cut=own)
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}"
        for name, norm in (
            ("input_layernorm", layer.attention.norm),
            ("post_attention_layernorm", layer.mlp.norm),
        ):
            builder.add(f"{prefix}.{name}.weight", (hidden,), norm, "weight")
        _attention_pieces(builder, f"{prefix}.self_attn", layer.attention, config, shard)
        if isinstance(layer.mlp, Moe):
            _expert_pieces(builder, prefix, layer.mlp, config)
        else:
            size, part = config.intermediate_size, shard.part(config.intermediate_size)
            gate_up, mlp = layer.mlp.gate_up, f"{prefix}.mlp"
            builder.linear(f"{mlp}.gate_proj", gate_up, size, hidden, 0, part)
            builder.linear(f"{mlp}.up_proj", gate_up, size, hidden, size // shard.size, part)
            builder.linear(f"{mlp}.down_proj", layer.mlp.down, hidden, size, columns=part)
    return builder


def _attention_pieces(
    builder: _Builder, prefix: str, attention: Attention, config: ModelConfig, shard: Shard
) -> None:
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads = shard.part(config.num_heads), shard.kv_part(config.num_kv_heads)
    q_width, kv_width = config.num_heads * head_dim, config.num_kv_heads * head_dim
    own = attention.heads
    q_own, kv_own = own.heads * head_dim, own.kv_heads * head_dim
    queries = slice(heads.start * head_dim, heads.stop * head_dim)
    keys = slice(kv_heads.start * head_dim, kv_heads.stop * head_dim)
    qkv = attention.qkv
    builder.linear(f"{prefix}.q_proj", qkv, q_width, hidden, 0, queries)
    builder.linear(f"{prefix}.k_proj", qkv, kv_width, hidden, q_own, keys)
    builder.linear(f"{prefix}.v_proj", qkv, kv_width, hidden, q_own + kv_own, keys)
    builder.linear(f"{prefix}.o_proj", attention.out, hidden, q_width, columns=queries)
    if own.q_norm is not None and own.k_norm is not None:
        builder.add(f"{prefix}.q_norm.weight", (head_dim,), own.q_norm, "weight")
        builder.add(f"{prefix}.k_norm.weight", (head_dim,), own.k_norm, "weight")
    if attention.has_sinks:
        builder.add(f"{prefix}.sinks", (config.num_heads,), attention, "sinks", cut=(heads,))


def _expert_pieces(builder: _Builder, prefix: str, moe: Moe, config: ModelConfig) -> None:
    assert config.moe is not None
    hidden, size, count = config.hidden_size, config.moe.intermediate_size, config.moe.num_experts
    experts, own = moe.experts, moe.shard.part(count)
    if config.model_type == "gpt_oss":
        builder.linear(f"{prefix}.mlp.router", moe.router, count, hidden)
        stack = f"{prefix}.mlp.experts"
        builder.add(
            f"{stack}.gate_up_proj_bias",
            (count, 2 * size),
            experts,
            "gate_up_bias",
            lambda target, source: _split_gate_up(target.t(), source.t()),
            (own,),
        )
        builder.add(f"{stack}.down_proj_bias", (count, hidden), experts, "down_bias", cut=(own,))
        for name, outputs, inputs, attribute in (
            ("gate_up_proj", 2 * size, hidden, "gate_up"),
            ("down_proj", hidden, size, "down"),
        ):
            if config.mxfp4_experts:
                groups = inputs // MXFP4_BLOCK
                sources: _Sources = {
                    f"{stack}.{name}_blocks": ((count, outputs, groups, 16), ("U8",)),
                    f"{stack}.{name}_scales": ((count, outputs, groups), ("U8",)),
                }
                builder.add_sources(sources, experts, attribute, _from_mxfp4(attribute), (own,))
            else:
                builder.add(
                    f"{stack}.{name}",
                    (count, inputs, outputs),
                    experts,
                    attribute,
                    _from_transposed(attribute),
                    (own,),
                )
        return
    if config.model_type == "mixtral":
        block, gate, up, down = f"{prefix}.block_sparse_moe", "w1", "w3", "w2"
    else:
        block, gate, up, down = f"{prefix}.mlp", "gate_proj", "up_proj", "down_proj"
    builder.linear(f"{block}.gate", moe.router, count, hidden)
    for e in range(count):
        for name, shape, attribute, first in (
            (gate, (size, hidden), "gate_up", 0),
            (up, (size, hidden), "gate_up", size),
            (down, (hidden, size), "down", 0),
        ):
            tensor = f"{block}.experts.{e}.{name}.weight"
            if own.start <= e < own.stop:
                write = _expert_rows(e - own.start, first, shape[0])
                builder.add(tensor, shape, experts, attribute, write)
            else:
                builder.elsewhere[tensor] = (shape, _FLOATS)


def _split_gate_up(target: Any, source: Any) -> None:
    """gpt-oss alternates gate and up rows; ours are all gate rows, then all up rows."""
    size = len(target) // 2
    target[:size].copy_(source[0::2])
    target[size:].copy_(source[1::2])


def _from_transposed(attribute: str) -> Callable[..., None]:
    """gpt-oss's dense experts are stored [expert, in, out]."""

    def write(target: torch.Tensor, source: torch.Tensor) -> None:
        for expert in range(len(source)):
            if attribute == "gate_up":
                _split_gate_up(target[expert], source[expert].t())
            else:
                target[expert].copy_(source[expert].t())

    return write


def _from_mxfp4(attribute: str) -> Callable[..., None]:
    def write(target: Any, blocks: torch.Tensor, scales: torch.Tensor) -> None:
        source = Mxfp4(blocks, scales)
        for expert in range(len(source)):
            if attribute == "gate_up":
                _split_gate_up(target[expert], source[expert])
            else:
                target[expert].copy_(source[expert])

    return write
