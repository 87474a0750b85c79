"""The measured speeds of a processor's kernels, and the time of a step that follows from them.

Peaks alone predict the time of a step on a CPU badly: a product with few rows reads its weights at
the speed of memory, one with many computes at that of the vector units, and in between both count;
attention reaches neither. `model.cost.measure_rates` therefore measures each kind of kernel on some
sizes, and a step takes the sum of its operations' times, since a CPU runs them one after the other.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from model.config import ModelConfig
from model.cost.operations import operations
from model.cost.workload import Op, Product, Workload, kv_dtype

T = TypeVar("T")
_BY_NAME = "products", "kv_byte_s"  # rates that are several

Speeds = Sequence[tuple[float, float, float]]
"""(rows, seconds for each weight, seconds for each product besides) by growing rows."""


@dataclass(frozen=True)
class Rates:
    """Seconds of each kind of kernel, for steps that are replayed."""

    products: Mapping[str, Speeds]  # by the dtype or the format of the weights
    kernel_s: float  # of each other kernel
    # By the dtype of the KV cache: for each byte of it that attention of single queries reads.
    kv_byte_s: Mapping[str, float]
    decode_s: float  # for each query head, position and value of it; the longer time counts
    sequence_s: float  # of attention for each sequence besides
    prefill_s: float  # of attention of many queries, for each query head, position and value of it
    moved_byte_s: float  # for each byte that norms, embeddings and rotations read and write
    activated_byte_s: float  # for each byte that activations are counted to read and write
    logit_s: float  # for each logit that is written and compared
    host_s: float  # of each step: scheduling, preparation of the batch and the like

    def as_json(self) -> dict[str, Any]:
        """Return the values for a file; `parse` reads them."""
        return asdict(self)

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> "Rates":
        """Return the rates in a file's object. Raises TypeError, KeyError, ValueError."""
        products = {
            str(kind): [(float(rows), float(each), float(more)) for rows, each, more in speeds]
            for kind, speeds in value["products"].items()
        }
        if not products or not all(products.values()):
            raise ValueError("no rates of products")
        kv_byte_s = {str(dtype): float(each) for dtype, each in dict(value["kv_byte_s"]).items()}
        others = (field.name for field in fields(cls) if field.name not in _BY_NAME)
        single = {name: float(value[name]) for name in others}
        return cls(products=products, kv_byte_s=kv_byte_s, **single)

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
            byte_s = _first(self.kv_byte_s, kv_dtype(config, work.dtype), work.dtype)
            return seconds + max(op.bytes.kv * byte_s, values * self.decode_s)
        if op.name == "activation":  # in the same kernel as the product before it
            return op.bytes.activations * self.activated_byte_s
        return seconds + op.bytes.activations * self.moved_byte_s

    def _product_seconds(self, product: Product, dtype: str) -> float:
        """Return the seconds of products.

        Between measured numbers of rows the time grows linearly, and beyond them in proportion.
        """
        speeds = _first(self.products, product.kind, dtype)
        times = [each * product.weights + besides * product.count for _, each, besides in speeds]
        measured = [rows for rows, _, _ in speeds]
        i = bisect_left(measured, product.rows)
        if i == 0:
            return times[0]
        if i == len(speeds):
            return times[-1] * product.rows / measured[-1]
        share = (product.rows - measured[i - 1]) / (measured[i] - measured[i - 1])
        return times[i - 1] + share * (times[i] - times[i - 1])


def _first(measured: Mapping[str, T], *names: str) -> T:
    """Return what was measured for the first of these names, or else for any."""
    return measured[next(name for name in (*names, *measured) if name in measured)]


def step_seconds(config: ModelConfig, work: Workload, rates: Rates) -> float:
    """Return the predicted seconds of a step, sampling included and scheduling excluded."""
    work = replace(work, causal=True, fused=False)
    return ops_seconds(operations(config, work), config, work, rates)


def ops_seconds(ops: Iterable[Op], config: ModelConfig, work: Workload, rates: Rates) -> float:
    """Return the seconds of these operations, one after the other, and of sampling."""
    sampling = work.logits_rows * config.vocab_size * rates.logit_s
    return rates.host_s + sampling + sum(rates.op_seconds(op, config, work) for op in ops)
