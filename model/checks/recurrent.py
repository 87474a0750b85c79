"""Cases of recurrent layers: convolution, gated delta rule and the gates of outputs."""

from collections.abc import Callable, Iterator, Sequence

import torch

from model.checks.case import Case, Tensors
from model.checks.inputs import Inputs, Weights
from model.layers.delta_rule import DeltaRule
from model.ops.backend import Backend
from model.ops.forward_batch import ForwardBatch

_SPARE_ROWS = 2  # of states that belong to no sequence

Length = tuple[int, int]
"""New tokens of a sequence, and its context with them."""


def causal_conv_cases(layer: DeltaRule, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of the convolution, with the states after it."""
    spec, item = layer.spec, inputs.dtype.itemsize
    weight = inputs.normal(spec.kernel, spec.channels, dtype=torch.float32)
    width = layer.qkv_gate.outputs  # as projected: what is convolved and the gate behind it
    for label, lengths, is_timed in _steps(inputs):
        batch, rows = _batch(lengths, inputs)
        x = inputs.normal(sum(count for count, _ in lengths), width)
        before = inputs.normal(rows, *spec.conv_shape)

        def prepare(
            backend: Backend,
            x: torch.Tensor = x,
            before: torch.Tensor = before,
            batch: ForwardBatch = batch,
        ) -> Callable[[], Tensors]:
            own, state = x.to(backend.dtype), before.to(backend.dtype)

            def call() -> Tensors:
                after = state.clone()  # the same state for every call
                return backend.causal_conv(own, weight, after, batch), after

            return call

        moved = (2 * len(x) * spec.channels + 2 * before.numel()) * item
        yield Case("causal_conv", label, prepare, moved, 0, is_timed)


def delta_rule_cases(layer: DeltaRule, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of the gated delta rule, with the states after it."""
    spec, item = layer.spec, inputs.dtype.itemsize
    weights = Weights(layer.gates, inputs)
    for label, lengths, is_timed in _steps(inputs):
        batch, rows = _batch(lengths, inputs)
        tokens = sum(count for count, _ in lengths)
        mixed, gates = (
            inputs.normal(tokens, spec.channels),
            inputs.normal(tokens, 2 * spec.value_heads),
        )
        before = inputs.normal(rows, *spec.recurrent_shape, dtype=torch.float32, scale=0.3)

        def prepare(
            backend: Backend,
            mixed: torch.Tensor = mixed,
            gates: torch.Tensor = gates,
            before: torch.Tensor = before,
            batch: ForwardBatch = batch,
        ) -> Callable[[], Tensors]:
            own, own_gates = mixed.to(backend.dtype), gates.to(backend.dtype)
            parameters = weights.on(backend)

            def call() -> Tensors:
                after = before.clone()
                return backend.delta_rule(own, own_gates, parameters, after, batch), after

            return call

        moved = tokens * (spec.channels + spec.value_heads * spec.value_dim) * item
        moved += 2 * len(lengths) * before[0].numel() * before.element_size()
        yield Case("delta_rule", label, prepare, moved, 6 * tokens * before[0].numel(), is_timed)


def gated_norm_cases(layer: DeltaRule, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of the norm and the gate of the rule's outputs."""
    spec, norm, item = layer.spec, inputs.norm(layer.head_norm), inputs.dtype.itemsize
    for rows in (1, 3, inputs.size.tokens):
        x = inputs.normal(rows, spec.value_heads, spec.value_dim)
        projected = inputs.normal(rows, layer.qkv_gate.outputs)

        def prepare(
            backend: Backend, x: torch.Tensor = x, projected: torch.Tensor = projected
        ) -> Callable[[], Tensors]:
            own, gate = x.to(backend.dtype), projected.to(backend.dtype)[:, spec.channels :]
            return lambda: (backend.gated_norm(own, gate, norm),)

        yield Case("gated_norm", f"{rows} rows", prepare, 3 * x.numel() * item, 0)


def output_gate_cases(width: int, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of the gate of attention's outputs; width: values of all heads."""
    for rows in (1, 3, inputs.size.tokens):
        x, gate = inputs.normal(rows, width), inputs.normal(rows, width)

        def prepare(
            backend: Backend, x: torch.Tensor = x, gate: torch.Tensor = gate
        ) -> Callable[[], Tensors]:
            own, own_gate = x.to(backend.dtype), gate.to(backend.dtype)
            return lambda: (backend.output_gate(own, own_gate),)

        moved = 3 * x.numel() * inputs.dtype.itemsize
        yield Case("output_gate", f"{rows} rows", prepare, moved, 0)


def _steps(inputs: Inputs) -> Iterator[tuple[str, list[Length], bool]]:
    """Steps (label, lengths, whether they are timed), with new sequences and others.

    Sequences are shorter and longer than the kernel of a convolution and than a chunk of the rule.
    """
    size = inputs.size
    singles: list[Length] = [(1, 1), (1, 2), (1, size.context)]
    chunks: list[Length] = [(2, 2), (3, 9), (16, 16), (17, 40), (size.tokens // 2, size.context)]
    yield "single tokens", singles, False
    yield "chunks", chunks, False
    yield "single tokens and chunks", singles + chunks, False
    yield f"{size.rows} tokens", [(1, size.context)] * size.rows, True
    yield f"a chunk of {size.tokens}", [(size.tokens, size.tokens)], True


def _batch(lengths: Sequence[Length], inputs: Inputs) -> tuple[ForwardBatch, int]:
    """Return a batch of sequences whose states are in random rows, and the number of rows."""
    counts, contexts = [count for count, _ in lengths], [context for _, context in lengths]
    none = torch.zeros(0, dtype=torch.int64, device=inputs.device)
    rows = len(lengths) + _SPARE_ROWS
    batch = ForwardBatch(
        none,
        none,
        counts,
        contexts,
        sum(count == 1 for count in counts),
        (),
        none,
        torch.tensor([0, *counts]).cumsum(0).int().to(inputs.device),
        torch.tensor(contexts, dtype=torch.int32, device=inputs.device),
        inputs.order(rows)[: len(lengths)],
    )
    return batch, rows
