"""Workload: the step to cost. Op: the cost of an operation, in integers."""

from dataclasses import dataclass, replace
from typing import Literal

from model.config import ModelConfig
from model.cost.flops import Flops
from model.ops.specs import KV_SCALE_BYTES

Phase = Literal["prefill", "decode", "backward"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
_KV_DTYPE_BYTES = DTYPE_BYTES | {"fp8": 1, "int8": 1}


def kv_dtype(config: ModelConfig, dtype: str) -> str:
    """Return the name of the KV cache's dtype with a compute dtype."""
    return dtype if config.kv_dtype == "auto" else config.kv_dtype


def kv_vector_bytes(config: ModelConfig, head_dim: int, dtype: str) -> int:
    """Return the bytes of a token's key or value of one head in the KV cache."""
    name = kv_dtype(config, dtype)
    scale = KV_SCALE_BYTES if name == "int8" else 0
    return head_dim * _KV_DTYPE_BYTES[name] + scale


def state_bytes(config: ModelConfig, item: int, tensor_parallel: int = 1) -> int:
    """Return the bytes of a sequence's states on one GPU; item: of a value in the compute dtype."""
    if config.delta_rule is None:
        return 0
    part = config.delta_rule.part(tensor_parallel)
    return len(config.recurrent_layers) * part.state_bytes(item)


@dataclass(frozen=True)
class Bytes:
    """Bytes moved between memory and chip, by their content."""

    weights: int = 0
    activations: int = 0
    kv: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(
            self.weights + other.weights,
            self.activations + other.activations,
            self.kv + other.kv,
        )

    def __mul__(self, times: int) -> "Bytes":
        return Bytes(self.weights * times, self.activations * times, self.kv * times)

    @property
    def total(self) -> int:
        """Return the sum of all three."""
        return self.weights + self.activations + self.kv


@dataclass(frozen=True)
class Product:
    """Products of rows with weights that are read once for all of these rows."""

    kind: str  # the format of the weights in memory; "dense": in the dtype of the step
    rows: float  # for each weight; experts: the mean of those that are read
    weights: float  # the number of their values
    count: int = 1  # products with different weights
    is_float8: bool = False  # of e4m3 with e4m3, on devices that have such products

    @property
    def flops(self) -> float:
        """Return the FLOPs of all of them."""
        return 2 * self.rows * self.weights


@dataclass(frozen=True)
class Op:
    """The cost of one operation, summed over all layers that have it."""

    name: str
    layer_count: int
    flops: Flops
    bytes: Bytes
    launches: int
    products: tuple[Product, ...] = ()  # of which its matrix FLOPs consist; none for attention

    @property
    def intensity(self) -> float:
        """Return matrix FLOPs per byte; 0 where no bytes are counted."""
        return self.flops.matrix / self.bytes.total if self.bytes.total else 0.0

    def repeated(self, layers: int) -> "Op":
        """Return this operation of one layer over that many equal layers."""
        products = tuple(
            replace(each, weights=each.weights * layers, count=each.count * layers)
            for each in self.products
        )
        flops, moved = self.flops * layers, self.bytes * layers
        return Op(self.name, layers, flops, moved, self.launches * layers, products)

    def plus(self, other: "Op", layers: int | None = None) -> "Op":
        """Return the sum with another operation; layers None: the sum of their layers."""
        return Op(
            self.name,
            self.layer_count + other.layer_count if layers is None else layers,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.launches + other.launches,
            self.products + other.products,
        )


@dataclass(frozen=True)
class Workload:
    """One step: `batch` sequences with `query` new tokens each, ending at length `context`.

    causal: count only the attention pairs that a causal mask keeps, and the last MLP only for the
    rows that need logits. Raises ValueError for invalid sizes.
    """

    phase: Phase
    batch: int
    query: int
    context: int
    dtype: str
    tensor_parallel: int = 1
    fused: bool = False
    causal: bool = False

    def __post_init__(self) -> None:
        if min(self.batch, self.query, self.context, self.tensor_parallel) < 1:
            raise ValueError("batch, query, context and tensor parallelism must be 1 or more")
        if self.query > self.context:
            raise ValueError(f"query {self.query} is more than the context {self.context}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")

    @property
    def tokens(self) -> int:
        """Return the number of new tokens in the step."""
        return self.batch * self.query

    @property
    def logits_rows(self) -> int:
        """Return the number of tokens for which the head computes logits."""
        return self.batch if self.phase == "prefill" else self.tokens

    @property
    def backward(self) -> bool:
        """Return whether this is the backward pass, for which only FLOPs are counted."""
        return self.phase == "backward"

    def attended(self, window: int | None) -> int:
        """Return the attended positions, summed over all query tokens of the batch."""
        limit = min(window or self.context, self.context)
        if not self.causal:
            return self.tokens * limit
        first = self.context - self.query + 1  # positions that the first query token attends
        below = min(max(limit - first, 0), self.query)  # tokens that attend fewer than the limit
        attended = below * first + below * (below - 1) // 2 + (self.query - below) * limit
        return self.batch * attended

    def kv_positions(self, window: int | None) -> int:
        """Return the positions of which keys and values are written or read, over the batch."""
        cached = self.context - self.query
        return self.batch * (self.query + (cached if window is None else min(cached, window - 1)))
