"""ModelConfig: the properties of a model, in fields that all families share."""

import json
import os
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from model.formats import DENSE, FP8, HEAD, INT4, INT8, FormatRules, WeightFormat
from model.ops.specs import Activation, DeltaRuleSpec, NormSpec, RouterSpec

if TYPE_CHECKING:
    from model.ops.backend import Backend

DTYPES = ("bfloat16", "float16", "float32")
"""Names of the supported compute dtypes."""

KV_DTYPES = (*DTYPES, "fp8", "int8")
"""Names of the supported dtypes of the KV cache, see `model.ops.kv_values`."""

QUANTIZED: dict[str, WeightFormat] = {"int8": INT8, "int4": INT4, "fp8": FP8}
"""Formats into which weights of 16 or 32 bits can be converted as they are loaded."""

_MAX_JSON_BYTES = 64 << 20  # far above any config


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message names the file and the problem."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base frequency and its scaling beyond the original context."""

    theta: float
    # default, linear, llama3, yarn, longrope, proportional, or none: no rotation
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    # Multiplies cos and sin (yarn, longrope); None: derived from `factor`.
    attention_factor: float | None = None
    attn_factor: float = 1.0  # yarn: multiplies the derived attention_factor (DeepSeek-R1-0528)
    # longrope: divisors of the frequencies within and beyond the original context.
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    is_reversed: bool = False  # rotates in the other direction
    rotated_share: float = 1.0  # proportional: of the pairs of values; the others stay
    # Queries at position p are multiplied by 1 + query_beta · ln(1 + ⌊p / original_max_positions⌋).
    query_beta: float = 0.0

    def first_row(self, length: int) -> int:
        """The row of `rope_table` for position 0 of a sequence of `length` tokens.

        Row 0, except where longrope uses its long factors: for every position of a sequence that
        is longer than the original context. Their rows follow those of the short factors.
        """
        is_long = self.kind == "longrope" and length > self.original_max_positions
        return self.original_max_positions if is_long else 0

    @property
    def recompute_length(self) -> int:
        """The length beyond which a sequence needs the long factors at every position; 0: never."""
        return self.original_max_positions if self.kind == "longrope" else 0

    def table_rows(self, positions: int) -> int:
        """Rows of `rope_table` for sequences of up to `positions` tokens."""
        return self.first_row(positions) + positions


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, 2.1).

    The keys and values of all heads are linear in one latent vector of each token, which the KV
    cache has in their place, with one rotated key for all heads behind it.
    """

    rank: int  # size of the latent of keys and values
    query_rank: int | None  # size of the latent of queries; None: they have none
    plain_dim: int  # values of a head's query and key that are not rotated
    value_dim: int  # of a head's value
    norm: NormSpec  # of latents
    has_interleaved_pairs: bool = True  # stored rows of rotated pairs are next to each other
    bias: bool = False  # of the projections to latents


@dataclass(frozen=True)
class MoeConfig:
    """Sparse mixture-of-experts MLP."""

    num_experts: int
    intermediate_size: int
    router: RouterSpec
    biases: bool  # router and experts have biases
    shared_size: int = 0  # inner size of the MLP that all tokens share beside them; 0: none
    shared_gate: bool = False  # its result is multiplied by a learned sigmoid
    # Beside the experts, sparse layers have the dense MLP. Both, their sum, the router and what the
    # experts read have a norm of their own.
    beside_mlp: bool = False


@dataclass(frozen=True)
class LayerFormats:
    """The formats of a layer's weights in memory, as they would be kept with every kernel.

    A weight that consists of tensors of several formats is dense.
    """

    qkv: WeightFormat = DENSE
    out: WeightFormat = DENSE
    gate_up: WeightFormat = DENSE  # of a dense MLP, or of the expert that all tokens share
    down: WeightFormat = DENSE
    experts: WeightFormat = DENSE

    def held(self, backend: "Backend") -> "LayerFormats":
        """The formats on a backend, which may have no kernels for these."""
        return LayerFormats(
            *(
                getattr(self, field.name).held(backend, stacked=field.name == "experts")
                for field in fields(self)
            )
        )

    def quantized(self, form: WeightFormat) -> "LayerFormats":
        """These formats, with `form` in place of dense."""
        forms = (getattr(self, field.name) for field in fields(self))
        return LayerFormats(*(form if own == DENSE else own for own in forms))


@dataclass(frozen=True)
class HeadSizes:
    """The keys and values of a layer, and the size of its heads."""

    num_kv_heads: int
    head_dim: int
    rotary_dim: int  # the first values of each query and key head, which are rotated
    values_are_keys: bool = False  # projected alike; keys then have a norm and are rotated


@dataclass(frozen=True)
class LayerConfig:
    """Properties that differ from layer to layer."""

    window: int | None  # sliding attention window in tokens, the token itself included
    sparse: bool  # MoE instead of a dense MLP
    rope: RopeConfig | None = None  # the layer's own rotary embedding; None: the model's
    recurrent: bool = False  # the gated delta rule with its state instead of attention
    formats: LayerFormats = LayerFormats()
    heads: HeadSizes | None = None  # the layer's own; None: the model's
    # An earlier layer with equal heads and window, to whose keys and values this one attends. It
    # has none of its own.
    kv_source: int | None = None
    intermediate_size: int | None = None  # of its dense MLP; None: the model's


@dataclass(frozen=True)
class ModelConfig:
    """Properties of a model that the decoder, the loader, the cost model and the engine use."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of dense MLPs
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int  # the first values of each query and key head, which are rotated
    layers: tuple[LayerConfig, ...]
    rope: RopeConfig  # of layers that have none of their own
    max_positions: int
    norm: NormSpec
    tie_word_embeddings: bool
    dtype: str  # the checkpoint's own: bfloat16, float16 or float32
    stop_ids: frozenset[int]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    pre_norms: bool = True  # norms of what attention and MLP read from the residual stream
    post_norms: bool = False  # norms of what attention and MLP add to the residual stream
    qk_norm: bool = False  # RMSNorm on each query and key head before the rotation
    whole_qk_norm: bool = False  # if qk_norm: one over all query heads, one over all key heads
    rotates_before_qk_norm: bool = False  # if qk_norm: the rotation comes first
    value_norm: bool = False  # if qk_norm: values have a norm without weights
    embedding_norm: bool = False  # the embedding of each token has a norm without weights
    # If it is there, num_kv_heads is 1 and head_dim the size of what the KV cache has of a token.
    latent: LatentConfig | None = None
    sinks: bool = False  # a learned logit of each query head joins the softmax
    embedding_scale: float = 1.0  # multiplies the embedding of each token
    residual_scale: float = 1.0  # multiplies what attention and MLP add to the residual stream
    attention_scale: float | None = None  # multiplies the scores; None: head_dim ** -0.5
    attention_softcap: float | None = None  # scores s become softcap · tanh(s / softcap)
    logits_scale: float = 1.0  # multiplies the logits
    logits_softcap: float | None = None  # as attention_softcap, of the scaled logits
    activation: Activation = field(default_factory=Activation)
    per_layer_size: int = 0  # of what each layer reads of a token's own embedding; 0: nothing
    layer_scalars: bool = False  # the residual stream after a layer has a learned factor
    moe: MoeConfig | None = None
    output_gate: bool = False  # attention's output is multiplied by a sigmoid of its input
    delta_rule: DeltaRuleSpec | None = None  # of recurrent layers
    mtp_layers: int = (
        0  # stored after the other layers: they predict further tokens, and do not run
    )
    head_format: WeightFormat = HEAD
    quantization: str | None = None  # of QUANTIZED: what dense weights become as they are loaded
    kv_dtype: str = "auto"  # of the KV cache: one of KV_DTYPES; auto: the compute dtype
    # Of the checkpoint; see also LayerFormats.
    stored_formats: FormatRules = field(default_factory=FormatRules)

    def heads(self, layer: LayerConfig) -> HeadSizes:
        """The sizes of a layer's heads."""
        return layer.heads or HeadSizes(self.num_kv_heads, self.head_dim, self.rotary_dim)

    def mlp_size(self, layer: LayerConfig) -> int:
        """The inner size of a layer's dense MLP."""
        return layer.intermediate_size or self.intermediate_size

    def has_mlp(self, layer: LayerConfig) -> bool:
        """Whether a layer has a dense MLP, instead of experts or beside them."""
        return not layer.sparse or (self.moe is not None and self.moe.beside_mlp)

    def rope_of(self, layer: LayerConfig) -> tuple[RopeConfig, int]:
        """A layer's rotary embedding, and how many values of each head it rotates."""
        return layer.rope or self.rope, self.heads(layer).rotary_dim

    @cached_property
    def ropes(self) -> tuple[tuple[RopeConfig, int], ...]:
        """The different results of `rope_of`, in the order of their first layers."""
        return tuple(dict.fromkeys(map(self.rope_of, self.layers)))

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """The layers that have a state for each sequence, and no keys and values."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.recurrent)

    @property
    def kv_vectors(self) -> int:
        """Vectors of a token and KV head in the cache: key and value, or a latent that is both."""
        return 2 if self.latent is None else 1

    def held(self, backend: "Backend") -> "ModelConfig":
        """This config with the formats of the weights on a backend.

        Stored formats of which it has no kernel are quantized like dense weights, if these are.
        """
        kinds = {
            layer: replace(layer, formats=self._held(layer, backend)) for layer in set(self.layers)
        }
        layers = tuple(kinds[layer] for layer in self.layers)
        head = self.head_format.held(backend, stacked=False)
        return replace(self, layers=layers, head_format=head)

    def _held(self, layer: LayerConfig, backend: "Backend") -> LayerFormats:
        formats = layer.formats.held(backend)
        if self.quantization is None:
            return formats
        return formats.quantized(QUANTIZED[self.quantization]).held(backend)

    def quantized(self, name: str) -> "ModelConfig":
        """This config with the dense weights of linears in a format of `QUANTIZED`.

        The head becomes fp8 with fp8, else int8. Embedding, router, norms and biases stay as they
        are, and so do weights that the checkpoint stores in fewer bits, where a kernel reads them.
        """
        form = QUANTIZED[name]
        layers = (replace(layer, formats=layer.formats.quantized(form)) for layer in self.layers)
        head = FP8 if form == FP8 else INT8
        return replace(self, layers=tuple(layers), head_format=head, quantization=name)


def conversion_hint(folder: Path) -> str:
    """What to do about weights in another format than safetensors; empty if there are none."""
    files = sorted(folder.glob("*.gguf"))
    if files:
        return f"; give the GGUF file itself: {files[0]}"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        return (
            "; PyTorch's pickle files are not supported, because loading them can run code."
            ' Convert them once: python -c "from transformers import AutoModelForCausalLM as M;'
            f" M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}')\""
        )
    return ""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Anything else, such as a named pipe or a link to a device, might never end. Raises
    CheckpointError.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: not a regular file or a link to one")
        # It may have become a named pipe in the meantime.
        return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint. Raises CheckpointError."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: too large for a configuration file")
            value = json.loads(file.read(size).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: does not contain a JSON object")
    return value
