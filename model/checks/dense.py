"""Cases of the embedding, norms, linear layers and the head, alone and fused."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from model.checks.case import Case, Tensors
from model.checks.inputs import Inputs, Weights
from model.config import ModelConfig
from model.formats import DENSE
from model.layers.attention import Attention
from model.layers.mlp import Mlp
from model.ops.backend import Backend
from model.ops.specs import Activation, Heads, Linear, Norm, RopeArgs

_EMBEDDED = 1000  # tokens of the table


def _row_counts(inputs: Inputs) -> tuple[int, ...]:
    """A single row, few, and as many as a batch has, none of them a multiple of a tile."""
    return 1, 3, min(33, inputs.size.tokens), inputs.size.rows


def embed_cases(config: ModelConfig, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of the embedding; a rank's table does not have all tokens."""
    table = inputs.normal(min(config.vocab_size, _EMBEDDED), config.hidden_size)
    for rows in _row_counts(inputs):
        ids = inputs.integers(len(table) + 20, rows)

        def prepare(backend: Backend, ids: torch.Tensor = ids) -> Callable[[], Tensors]:
            own = table.to(backend.dtype)
            return lambda: (backend.embed(own, ids, config.embedding_scale, 10),)

        moved = rows * config.hidden_size * (4 + inputs.dtype.itemsize)
        yield Case("embed", f"{rows} rows", prepare, moved, 0)


def norm_cases(declared: Norm, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of the residual sum and its norm."""
    norm, item = inputs.norm(declared), inputs.dtype.itemsize
    for rows in _row_counts(inputs):
        for with_delta in (False, True):
            x = inputs.normal(rows, norm.size, dtype=torch.float32, scale=3.0)
            delta = inputs.normal(rows, norm.size) if with_delta else None

            def prepare(
                backend: Backend, x: torch.Tensor = x, delta: torch.Tensor | None = delta
            ) -> Callable[[], Tensors]:
                own = None if delta is None else delta.to(backend.dtype)
                return lambda: backend.add_rms_norm(x, own, norm)

            moved = rows * norm.size * (4 + item + (4 + item) * with_delta)
            label = f"{rows} rows" + ("" if with_delta else ", no delta")
            yield Case("add_rms_norm", label, prepare, moved, 0)


def linear_cases(name: str, declared: Linear, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of a linear layer."""
    weights, item = Weights(declared, inputs), inputs.dtype.itemsize
    for rows in _row_counts(inputs):
        x = inputs.normal(rows, declared.inputs)

        def prepare(backend: Backend, x: torch.Tensor = x) -> Callable[[], Tensors]:
            own, linear = x.to(backend.dtype), weights.on(backend)
            return lambda: (backend.linear(own, linear),)

        moved = weights.bytes(item) + rows * (declared.inputs + declared.outputs) * item
        flops = 2 * rows * declared.inputs * declared.outputs
        # A product with packed weights has tiles of its own for many rows.
        is_timed = rows == 1 or (rows == inputs.size.rows and declared.format != DENSE)
        label = f"{name}, {rows} rows"
        yield Case("linear", label, prepare, moved, flops, is_timed, weights.tolerance)


def logits_cases(name: str, head: Linear, scale: float, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of the head or a router, with as many outputs as the inputs' size allows."""
    item = inputs.dtype.itemsize
    outputs = min(head.outputs, max(64, inputs.size.weight_bytes // (head.inputs * item)))
    weights = Weights(replace(head, outputs=outputs), inputs)
    for rows in _row_counts(inputs):
        x = inputs.normal(rows, head.inputs)

        def prepare(backend: Backend, x: torch.Tensor = x) -> Callable[[], Tensors]:
            own, linear = x.to(backend.dtype), weights.on(backend)
            return lambda: (backend.logits(own, linear, scale),)

        moved = weights.bytes(item) + rows * (head.inputs * item + 4 * outputs)
        flops = 2 * rows * head.inputs * outputs
        is_timed = rows == 1 and name == "head"
        label = f"{name}, {rows} rows"
        yield Case("logits", label, prepare, moved, flops, is_timed, weights.tolerance)


class _Cache:
    """New keys and values: their angles, slots and cache."""

    def __init__(
        self, heads: Heads, config: ModelConfig, rows: int, block_size: int, inputs: Inputs
    ):
        blocks = -(-rows // block_size) + 2
        self.heads, self._dtype = heads, inputs.dtype
        whole = config.rotary_dim == config.head_dim
        rotary_dim = heads.head_dim if whole else config.rotary_dim
        self.cos_sin = inputs.angles(rows, rotary_dim)
        self.query_scale = inputs.factors(rows) if config.rope.query_beta else None
        self.slots = inputs.order(blocks * block_size)[:rows]
        self.shape = (2, blocks, block_size, heads.kv_heads, heads.head_dim)

    def on(self, backend: Backend) -> RopeArgs:
        """Return the arguments with a cache whose values show where nothing was written."""
        kv = backend.empty_cache(self.shape)
        kv.copy_(torch.full_like(kv, 0.5, dtype=torch.float32))
        return RopeArgs(self.heads, self.cos_sin, kv, self.slots, self.query_scale)


def _normed_heads(heads: Heads, inputs: Inputs) -> Heads:
    norms = [None if norm is None else inputs.norm(norm) for norm in (heads.q_norm, heads.k_norm)]
    return replace(heads, q_norm=norms[0], k_norm=norms[1])


def rotate_cases(
    layer: Attention, config: ModelConfig, block_size: int, inputs: Inputs
) -> Iterator[Case]:
    """Yield the cases of norms of heads, rotation and the write of keys and values."""
    heads = _normed_heads(layer.heads, inputs)
    width = sum(heads.parts)
    for rows in _row_counts(inputs):
        qkv = inputs.normal(rows, width, heads.head_dim)
        cache = _Cache(heads, config, rows, block_size, inputs)

        def prepare(
            backend: Backend, qkv: torch.Tensor = qkv, cache: _Cache = cache
        ) -> Callable[[], Tensors]:
            own, rope = qkv.to(backend.dtype), cache.on(backend)
            return lambda: (backend.rotate_and_write(own, rope), rope.kv)

        moved = 2 * qkv.numel() * inputs.dtype.itemsize
        yield Case("rotate_and_write", f"{rows} rows", prepare, moved, 0)


def norm_qkv_cases(
    layer: Attention, config: ModelConfig, block_size: int, inputs: Inputs
) -> Iterator[Case]:
    """Yield the cases of the norm with QKV, rotation and the write of keys and values."""
    heads, norm = _normed_heads(layer.heads, inputs), inputs.norm(layer.norm)
    weights, hidden, item = Weights(layer.qkv, inputs), norm.size, inputs.dtype.itemsize
    for rows in _row_counts(inputs):
        x = inputs.normal(rows, hidden, dtype=torch.float32)
        change = inputs.normal(rows, hidden) if rows > 1 else None
        for delta in (change, inputs.normal(rows, hidden)) if change is None else (change,):
            cache = _Cache(heads, config, rows, block_size, inputs)

            def prepare(
                backend: Backend,
                x: torch.Tensor = x,
                delta: torch.Tensor | None = delta,
                cache: _Cache = cache,
            ) -> Callable[[], Tensors]:
                own = None if delta is None else delta.to(backend.dtype)
                linear, rope = weights.on(backend), cache.on(backend)
                return lambda: (*backend.norm_qkv(x, own, norm, linear, rope), rope.kv)

            moved = weights.bytes(item) + rows * (8 * hidden + 2 * layer.qkv.outputs * item)
            flops = 2 * rows * hidden * layer.qkv.outputs
            label = f"{rows} rows" + (", no delta" if delta is None else "")
            is_timed = rows == 1 and delta is not None
            yield Case("norm_qkv", label, prepare, moved, flops, is_timed, weights.tolerance)


def norm_mlp_cases(layer: Mlp, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of the norm with a dense MLP."""
    norm, item = inputs.norm(layer.norm), inputs.dtype.itemsize
    gate_up, down = Weights(layer.gate_up, inputs), Weights(layer.down, inputs)
    hidden = norm.size
    for rows in _row_counts(inputs):
        x = inputs.normal(rows, hidden, dtype=torch.float32)
        delta = inputs.normal(rows, hidden)

        def prepare(
            backend: Backend, x: torch.Tensor = x, delta: torch.Tensor = delta
        ) -> Callable[[], Tensors]:
            own, up, out = delta.to(backend.dtype), gate_up.on(backend), down.on(backend)
            return lambda: backend.norm_mlp(x, own, norm, up, out, layer.activation)

        moved = gate_up.bytes(item) + down.bytes(item) + rows * hidden * (8 + 2 * item)
        flops = 2 * rows * hidden * (layer.gate_up.outputs + layer.down.inputs)
        tolerance = max(gate_up.tolerance, down.tolerance)
        label = f"{rows} rows"
        yield Case("norm_mlp", label, prepare, moved, flops, rows == 1, tolerance)


def activate_cases(size: int, activation: Activation, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of the activation of gate and up, `size` values each."""
    for rows in _row_counts(inputs):
        gate_up = inputs.normal(rows, activation.parts * size, scale=4.0)

        def prepare(backend: Backend, gate_up: torch.Tensor = gate_up) -> Callable[[], Tensors]:
            own = gate_up.to(backend.dtype)
            return lambda: (backend.activate(own, activation),)

        moved = 3 * rows * size * inputs.dtype.itemsize
        yield Case("activate", f"{rows} rows", prepare, moved, 0)


def gated_cases(config: ModelConfig, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of the activation of a gate times the layer's part of an embedding."""
    size = config.per_layer_size
    for rows in _row_counts(inputs):
        gate, own = inputs.normal(rows, size, scale=4.0), inputs.normal(rows, 3, size)

        def prepare(
            backend: Backend, gate: torch.Tensor = gate, own: torch.Tensor = own
        ) -> Callable[[], Tensors]:
            gates, ups = gate.to(backend.dtype), own.to(backend.dtype)[:, 1]
            return lambda: (backend.gated(gates, ups, config.activation),)

        yield Case("gated", f"{rows} rows", prepare, 3 * gate.numel() * inputs.dtype.itemsize, 0)


def scaled_sum_cases(hidden: int, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of a residual sum that is multiplied by the factor of a layer."""
    for rows in _row_counts(inputs):
        x = inputs.normal(rows, hidden, dtype=torch.float32)
        delta, factor = inputs.normal(rows, hidden), inputs.factors(1)

        def prepare(
            backend: Backend, x: torch.Tensor = x, delta: torch.Tensor = delta, factor: Any = factor
        ) -> Callable[[], Tensors]:
            own = delta.to(backend.dtype)
            return lambda: (backend.scaled_sum(x, own, factor),)

        moved = rows * hidden * (8 + inputs.dtype.itemsize)
        yield Case("scaled_sum", f"{rows} rows", prepare, moved, 0)
