"""The measured speeds of a processor's kernels, and the time of a step that follows from them.

Peaks alone predict the time of a step on a CPU badly: a product with few rows reads its weights at
the speed of memory, one with many computes at that of the vector units, and in between both count;
attention reaches neither. `model.cost.measure_rates` therefore measures each kind of kernel on some
sizes, and a step takes the sum of its operations' times, since a CPU runs them one after the other.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from model.config import ModelConfig
from model.cost.operations import operations
from model.cost.workload import (
    DTYPE_BYTES,
    Op,
    Product,
    Workload,
    kv_dtype,
    kv_vector_bytes,
    state_bytes,
)

_BY_NAME = "products", "decode"  # rates that are several
_COPIED = "bfloat16"  # the dtype of weights of which there may be copies

Speeds = Sequence[tuple[float, float, float]]
"""(rows, seconds for each weight, seconds for each product besides) by growing rows."""


KvSpeeds = Sequence[tuple[float, float]]
"""(query heads that share a KV head, seconds for each value of its keys), by growing heads."""


@dataclass(frozen=True)
class Rates:
    """Seconds of each kind of kernel, for steps that are replayed."""

    products: Mapping[str, Speeds]  # by the dtype or the format of the weights
    kernel_s: float  # of each other kernel
    decode: Mapping[str, KvSpeeds]  # of attention of single queries, by the KV cache's dtype
    sequence_s: float  # of it for each sequence besides
    prefill_s: float  # of attention of many queries, for each query head, position and value of it
    moved_byte_s: float  # for each byte that norms, embeddings and rotations read and write
    activated_byte_s: float  # for each byte that activations are counted to read and write
    logit_s: float  # for each logit that is written and compared
    host_s: float  # of each step: scheduling, preparation of the batch and the like
    copied_rows: float = 0.0  # up to so many read copies of weights: see `without_copies`

    def as_json(self) -> dict[str, Any]:
        """Return the values for a file; `parse` reads them."""
        return asdict(self)

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> "Rates":
        """Return the rates in a file's object.

        Raises TypeError, KeyError, ValueError and AttributeError.
        """
        products = {
            str(kind): [(float(rows), float(each), float(more)) for rows, each, more in speeds]
            for kind, speeds in value["products"].items()
        }
        if not products or not all(products.values()):
            raise ValueError("no rates of products")
        decode = {
            str(dtype): [(float(heads), float(each)) for heads, each in speeds]
            for dtype, speeds in value["decode"].items()
        }
        if not decode or not all(decode.values()):
            raise ValueError("no rates of attention")
        others = (field.name for field in fields(cls) if field.name not in _BY_NAME)
        single = {name: float(value[name]) for name in others}
        return cls(products=products, decode=decode, **single)

    def without_copies(self) -> "Rates":
        """Return the rates of a step before there are compressed copies of weights.

        Few rows then take as long as some more: all of them wait for the weights.
        """
        speeds = [one for one in self.products.get(_COPIED, ()) if one[0] > self.copied_rows]
        return replace(self, products={**self.products, _COPIED: speeds}) if speeds else self

    def op_seconds(self, op: Op, config: ModelConfig, work: Workload) -> float:
        """Return the seconds of an operation of a step."""
        if op.products:
            return sum(self._product_seconds(product, work.dtype) for product in op.products)
        seconds = op.layer_count * self.kernel_s
        if op.bytes.kv:
            values = op.flops.matrix / 4  # two products of two FLOPs each
            if work.query > 1:
                return seconds + values * self.prefill_s
            seconds += op.layer_count * work.batch * self.sequence_s
            states = (
                2 * work.batch * state_bytes(config, DTYPE_BYTES[work.dtype], work.tensor_parallel)
            )
            kv = op.bytes.kv - states
            seconds += states * self.moved_byte_s  # those of recurrent layers, read and written
            return seconds + (self._decode_seconds(kv, values, config, work.dtype) if kv else 0.0)
        if op.name == "activation":  # in the same kernel as the product before it
            return op.bytes.activations * self.activated_byte_s
        return seconds + op.bytes.activations * self.moved_byte_s

    def _product_seconds(self, product: Product, dtype: str) -> float:
        """Return the seconds of products."""
        names = product.kind, dtype, "bfloat16", *self.products
        speeds = self.products[next(name for name in names if name in self.products)]
        times = [
            (rows, each * product.weights + besides * product.count)
            for rows, each, besides in speeds
        ]
        return _between(times, product.rows)

    def _decode_seconds(
        self, kv_bytes: int, query_values: float, config: ModelConfig, dtype: str
    ) -> float:
        """Return the seconds of attention of single queries.

        A KV cache whose dtype was not measured takes the time of as many bytes of another.
        query_values: head_dim for each query head and position.
        """
        name, size = kv_dtype(config, dtype), config.head_dim
        if name not in self.decode:
            name = next(iter(self.decode))
        vectors = kv_bytes / kv_vector_bytes(replace(config, kv_dtype=name), size, dtype)
        key_values = vectors / config.kv_vectors * size
        return key_values * _between(self.decode[name], query_values / key_values)


def _between(measured: Sequence[tuple[float, float]], at: float) -> float:
    """Return a time between measured ones, which grows linearly; beyond them in proportion."""
    points = [point for point, _ in measured]
    i = bisect_left(points, at)
    if i == 0:
        return measured[0][1]
    if i == len(points):
        return measured[-1][1] * at / points[-1]
    (before, time), (after, later) = measured[i - 1 : i + 1]
    return time + (at - before) / (after - before) * (later - time)


def step_seconds(config: ModelConfig, work: Workload, rates: Rates) -> float:
    """Return the predicted seconds of a step, with sampling and the host's part."""
    work = replace(work, causal=True, fused=False)
    return ops_seconds(operations(config, work), config, work, rates)


def ops_seconds(ops: Iterable[Op], config: ModelConfig, work: Workload, rates: Rates) -> float:
    """Return the seconds of these operations, one after the other, and of sampling."""
    sampling = work.logits_rows * config.vocab_size * rates.logit_s
    return rates.host_s + sampling + sum(rates.op_seconds(op, config, work) for op in ops)
