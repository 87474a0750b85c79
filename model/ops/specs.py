"""Arguments of operations besides activations: parameters of the model, constants of a layer.

The decoder declares parameters with shapes alone, which needs no torch; the loader fills them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

KV_SCALE_BYTES = 4
"""The scale of a vector of the KV cache in int8; see `kv_values.py`."""

COMPRESSED_ROWS = 8  # as in model/ops/cpu/kernels/gemm/compressed.h
"""The most rows of a step on a CPU that are multiplied with compressed copies of weights."""

STEPS_BEFORE_COPIES = 32
"""The steps with so few rows that a run computes before it makes the copies.

All copies take about as long as they save in a hundred such steps, and a run may end after fewer,
as jobs do. Where so few requests run at once, they are made before the first step.
"""


class WeightFormat(Protocol):
    """The part of a weight format that operations use; `model.formats` has the rest."""

    def dense(self, weight: Any, dtype: "torch.dtype") -> "torch.Tensor":
        """Return the values of a weight [out, in] as one tensor of that dtype."""


class IntegerFormat(Protocol):
    """The part of a format of 8-bit or 4-bit integers that the layout in memory depends on."""

    @property
    def bits(self) -> int:
        """8 or 4."""

    def group_of(self, inputs: int) -> int:
        """How many of a weight's inputs share a scale."""

    @property
    def has_zeros(self) -> bool:
        """Whether groups have zeros: values are (code + zero) · scale."""

    @property
    def rows(self) -> str:
        """How the rows that are multiplied become integers: "8" bits, or "16", which is as good as
        exact; "rotated 8" bits, after a rotation of each group that the weights had too.
        """


class Float8Format(Protocol):
    """The part of a format in e4m3 that the layout in memory depends on."""

    @property
    def group(self) -> int:
        """Inputs that share a scale, a multiple of 32; 0: all."""

    @property
    def inputs(self) -> str:
        """How the inputs of linears become e4m3, "dynamic" or "static"; "": they do not."""

    @property
    def quantizes(self) -> bool:
        """Whether dense weights become e4m3."""


@dataclass(frozen=True)
class Parameter:
    """A declared parameter: an attribute of its holder, which the loader sets.

    `format` is None for a plain tensor; otherwise it is the format of a weight [..., out, in]. Its
    outputs consist of `parts` equal parts that are used together: gate and up. A plain tensor has
    the compute dtype, or float32 if `is_float32`; its values are those stored times `factor`, plus
    `offset`.
    """

    holder: Any
    attribute: str
    shape: tuple[int, ...]
    format: WeightFormat | None = None
    parts: int = 1
    is_float32: bool = False
    offset: float = 0.0
    factor: float = 1.0


@dataclass(eq=False)
class Linear:
    """A linear layer: weight [outputs, inputs] in the backend's form, and bias [outputs].

    With `sum_over_ranks` the inputs are this rank's and the results of all ranks are summed, so
    that only rank 0 holds the bias; the others hold zeros.
    """

    inputs: int
    outputs: int
    has_bias: bool
    format: WeightFormat
    sum_over_ranks: bool = False
    weight: Any = None
    bias: "torch.Tensor | None" = None

    def parameters(self) -> Iterator[Parameter]:
        """Declare the weight and the bias."""
        yield Parameter(self, "weight", (self.outputs, self.inputs), self.format)
        if self.has_bias:
            yield Parameter(self, "bias", (self.outputs,))


@dataclass(eq=False)
class HeadLinear:
    """A linear layer of each attention head, without biases: weight [heads, outputs, inputs]."""

    heads: int
    inputs: int
    outputs: int
    format: WeightFormat
    weight: Any = None

    def parameters(self) -> Iterator[Parameter]:
        """Declare the weights."""
        shape = (self.heads, self.outputs, self.inputs)
        yield Parameter(self, "weight", shape, self.format)


@dataclass(frozen=True)
class NormSpec:
    """The kind of a model's norms: RMSNorm, with what differs between families."""

    eps: float  # added to the mean of the squares
    weight_offset: float = 0.0  # added to stored weights: 1 where they are centered on zero (Gemma)
    is_weighted: bool = True  # otherwise weights are 1 and are not stored


@dataclass(eq=False)
class Norm:
    """Root-mean-square normalization with weight float32 [size]; or nothing, in its place."""

    size: int
    spec: NormSpec
    is_identity: bool = False  # has no weight, and its result is what it is given
    factor: float = 1.0  # multiplies stored weights
    weight: Any = None  # torch.Tensor once loaded

    @property
    def is_stored(self) -> bool:
        """Whether checkpoints have its weight."""
        return self.spec.is_weighted and not self.is_identity

    @property
    def eps(self) -> float:
        """What is added to the mean of the squares."""
        return self.spec.eps

    def parameters(self) -> Iterator[Parameter]:
        """Declare the weight."""
        if self.is_identity:
            return
        offset, factor = self.spec.weight_offset, self.factor
        yield Parameter(self, "weight", (self.size,), is_float32=True, offset=offset, factor=factor)


@dataclass(eq=False)
class SharedExpert:
    """The MLP that all tokens share beside their experts, split over ranks by its inner size.

    The result is multiplied by the sigmoid of `gate`, if there is one: a linear with one output.
    """

    gate_up: Linear
    down: Linear
    gate: Linear | None = None


@dataclass(eq=False)
class Experts:
    """The experts of one layer on this rank, stacked: gate_up [count, 2 · size, hidden] with all
    gate rows first, down [count, hidden, size], and their biases; and the shared expert, if any.
    """

    count: int
    hidden: int
    size: int
    has_bias: bool
    format: WeightFormat
    gate_up: Any = None
    gate_up_bias: "torch.Tensor | None" = None
    down: Any = None
    down_bias: "torch.Tensor | None" = None
    shared: SharedExpert | None = None

    def parameters(self) -> Iterator[Parameter]:
        """Declare the biases and the weights, without those of the shared expert."""
        if self.has_bias:
            yield Parameter(self, "gate_up_bias", (self.count, 2 * self.size))
            yield Parameter(self, "down_bias", (self.count, self.hidden))
        gate_up, down = (2 * self.size, self.hidden), (self.hidden, self.size)
        yield Parameter(self, "gate_up", (self.count, *gate_up), self.format, parts=2)
        yield Parameter(self, "down", (self.count, *down), self.format)


@dataclass(eq=False)
class Heads:
    """The attention heads of one layer on this rank, with the norms of queries and keys if any.

    The norms are of each head, or if their size is that of all heads together, of all at once.
    Without KV heads the layer attends to the keys and values of another.
    """

    heads: int
    kv_heads: int
    head_dim: int
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    rotates_before_norm: bool = False
    norms_values: bool = False  # if q_norm: values have a norm as well, without weights
    values_are_keys: bool = False  # projected alike; the norm and the rotation of keys come later

    @property
    def parts(self) -> tuple[int, ...]:
        """Heads of the projection: queries, keys and, unless they are projected alike, values."""
        return (self.heads, self.kv_heads, *([] if self.values_are_keys else [self.kv_heads]))

    @property
    def has_whole_norms(self) -> bool:
        """Whether there are norms over all heads at once."""
        return self.q_norm is not None and self.q_norm.size != self.head_dim


class RopeArgs(NamedTuple):
    """Arguments that turn a QKV projection into queries and KV cache entries."""

    heads: Heads
    cos_sin: "torch.Tensor"  # float32 [tokens, rotary_dim], cos in the first half
    kv: "torch.Tensor"  # as `Backend.empty_cache` returns it
    slot_mapping: "torch.Tensor"  # int64 [tokens]: block · block_size + offset
    query_scale: "torch.Tensor | None" = None  # float32 [tokens, 1]: multiplies rotated queries


@dataclass(frozen=True)
class DeltaRuleSpec:
    """Sizes of a gated delta rule (Gated DeltaNet), of the model or of one rank's part.

    Each key head serves value_heads / key_heads consecutive value heads. Queries, keys and values
    pass through a causal convolution over the last `kernel` tokens, each channel by itself.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys, then values of all heads."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def conv_shape(self) -> tuple[int, int]:
        """The state of the convolution: the inputs of the last tokens [kernel - 1, channels]."""
        return self.kernel - 1, self.channels

    @property
    def recurrent_shape(self) -> tuple[int, int, int]:
        """The state of the rule, float32 [value heads, key_dim, value_dim]."""
        return self.value_heads, self.key_dim, self.value_dim

    def part(self, ranks: int) -> "DeltaRuleSpec":
        """The sizes of one of `ranks` equal parts."""
        return replace(
            self, key_heads=self.key_heads // ranks, value_heads=self.value_heads // ranks
        )

    def state_bytes(self, item: int) -> int:
        """Bytes of a sequence's state in one layer; item: of a value of the convolution's."""
        return item * math.prod(self.conv_shape) + 4 * math.prod(self.recurrent_shape)


class LayerState(NamedTuple):
    """The states of a recurrent layer by row; a sequence has the same row in every layer."""

    conv: "torch.Tensor"  # [rows, kernel - 1, channels], the oldest token first
    recurrent: "torch.Tensor"  # float32 [rows, value heads, key_dim, value_dim]


@dataclass(eq=False)
class DeltaRuleGates:
    """Parameters of the gates of a gated delta rule, float32 [value heads] each."""

    spec: DeltaRuleSpec
    decay_log: "torch.Tensor | None" = None  # ln A
    bias: "torch.Tensor | None" = None  # added to the input of softplus

    def parameters(self) -> Iterator[Parameter]:
        """Declare both."""
        for name in ("decay_log", "bias"):
            yield Parameter(self, name, (self.spec.value_heads,), is_float32=True)


@dataclass(frozen=True)
class AttentionSpec:
    """Constants of a layer's attention."""

    scale: float  # of the scores
    window: int | None  # sliding window in tokens, the token itself included
    softcap: float | None = None  # scores s become softcap · tanh(s / softcap)
    # Values are the first so many values of keys, and the cache has keys alone; None: it has both.
    latent_dim: int | None = None


@dataclass(frozen=True)
class Activation:
    """SwiGLU of a gate and an up: silu(gate) · up; or gelu(gate) · up, by tanh ("gelu_tanh").

    With a limit (gpt-oss) the gate is clamped from above and up on both sides, and the result is
    gate · sigmoid(alpha · gate) · (up + 1). "relu" is max(0, gate) · up. Without `is_gated` one
    value takes the place of both, so that this is its square where it is positive.
    """

    limit: float | None = None
    alpha: float = 1.0
    kind: Literal["silu", "gelu_tanh", "relu"] = "silu"
    is_gated: bool = True

    @property
    def parts(self) -> int:
        """Values of the first linear for each of the second."""
        return 2 if self.is_gated else 1


@dataclass(frozen=True)
class ExpertGroups:
    """Equal groups of neighbouring experts, to the best of which a token's experts are limited."""

    count: int
    chosen: int  # groups that a token's experts may come from
    best: int  # a group's score is the sum of as many of its highest scores


@dataclass(frozen=True)
class RouterSpec:
    """How router logits select experts and their weights."""

    top_k: int
    softmax_after_top_k: bool  # gpt-oss: softmax over the chosen logits; else over all experts
    normalize: bool  # divide the chosen weights by their sum
    sigmoid: bool = False  # a score is the sigmoid of its logit, instead of a softmax
    has_correction: bool = False  # a learned bias of the scores for the choice, not for the weights
    groups: ExpertGroups | None = None
    scale: float = 1.0  # multiplies the weights
    scales_experts: bool = False  # a learned factor of each expert multiplies its weights

    @property
    def ranks_scores(self) -> bool:
        """Whether the order of experts is not that of their logits."""
        return self.sigmoid or self.has_correction or self.groups is not None

    def smallest_count(self, experts: int) -> int:
        """The smallest number of experts from `experts` on that the groups can divide."""
        if self.groups is None:
            return experts
        count, chosen, best = self.groups.count, self.groups.chosen, self.groups.best
        return count * max(-(-experts // count), -(-self.top_k // chosen), best)


class Router(NamedTuple):
    """The router of a layer: the linear that gives an expert's logit each, and what follows."""

    linear: Linear
    spec: RouterSpec
    # float32 [experts]: what RouterSpec.has_correction or scales_experts says.
    correction: "torch.Tensor | None" = None


class ExpertShard(NamedTuple):
    """Which of `size` equal shares of the experts a rank holds."""

    rank: int = 0
    size: int = 1


class SamplingTables(NamedTuple):
    """Sampling parameters by row, on the device, where kernels read those of a step's rows.

    Temperature 0 is greedy, top-k 0 keeps all tokens; the seed and a token's position determine its
    random number.
    """

    temperature_and_top_p: "torch.Tensor"  # float32 [rows, 2]
    top_k_and_seed: "torch.Tensor"  # int64 [rows, 2]


class AdjustmentTables(NamedTuple):
    """How logits change before temperature, top-k and top-p apply, by row, on the device.

    Columns of `factors`: the repetition, frequency and presence penalties, then how far below the
    largest logit min-p removes tokens (-inf: nowhere). Columns of `starts`: how many tokens of the
    sequence were counted when its row was set, the number of its entries, whether it has penalties,
    and whether it has a mask. An element of `counts` is twice the token's occurrences in the
    output, plus 1 if it is in the prompt. Columns of `entries`: a token, the positions from the
    first to before the second at which its bias applies, and the token before it that is needed
    (-1: any). A bit of `masks` is 1 if the token may be sampled; token 0 has the lowest bit of the
    first word.
    """

    factors: "torch.Tensor"  # float32 [rows, 4]
    starts: "torch.Tensor"  # int32 [rows, 4]
    counts: "torch.Tensor"  # int16 [rows, vocab]
    entries: "torch.Tensor"  # int32 [rows, entries, 4]
    biases: "torch.Tensor"  # float32 [rows, entries], -inf for a token that must not be sampled
    masks: "torch.Tensor"  # int32 [rows, ⌈vocab / 32⌉]
