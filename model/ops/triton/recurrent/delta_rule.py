"""The gated delta rule: a kernel for chunks, and one for the single tokens of a step.

See `model/ops/recurrent.py` for the rule. Rows of states are read from a tensor, and a sequence
without tokens changes nothing, so that both can be captured.
"""

import torch
import triton
import triton.language as tl

from model.ops.forward_batch import ForwardBatch
from model.ops.specs import DeltaRuleGates
from model.ops.triton.programmatic_launch import wait_for_previous_kernel
from model.ops.triton.tiles import Target

_TOKENS = 16  # that are computed at once: the smallest product of matrices
_COLUMNS = 32  # of a state in one program


@triton.jit
def _decay_log(a, decay_log, bias):
    """ln α of the gate's input a, float32."""
    x = a + bias
    return -tl.exp(decay_log) * tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _single_token(
    mixed_ptr,
    gates_ptr,
    decay_log_ptr,
    bias_ptr,
    state_ptr,
    rows_ptr,
    lengths_ptr,
    out_ptr,
    scale,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """The rule for one token; grid (tokens, VALUE_HEADS, ⌈VALUE_DIM / BLOCK_V⌉).

    Arguments as in `Backend.delta_rule`; scale: 1 / √KEY_DIM; BLOCK_K: a power of 2 of at least
    KEY_DIM.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows_ptr + token)
    is_old = tl.load(lengths_ptr + token) > 1
    at, column = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_key, is_value = at < KEY_DIM, column < VALUE_DIM
    KEYS: tl.constexpr = KEY_HEADS * KEY_DIM
    source = mixed_ptr + token * (2 * KEYS + VALUE_HEADS * VALUE_DIM)
    own_key = (head // (VALUE_HEADS // KEY_HEADS)) * KEY_DIM + at
    query = tl.load(source + own_key, is_key, other=0.0).to(tl.float32)
    key = tl.load(source + KEYS + own_key, is_key, other=0.0).to(tl.float32)
    query = query * (tl.rsqrt(tl.sum(query * query) + 1e-6) * scale)
    key = key * tl.rsqrt(tl.sum(key * key) + 1e-6)
    value = tl.load(source + 2 * KEYS + head * VALUE_DIM + column, is_value, other=0.0)
    gates = gates_ptr + token * 2 * VALUE_HEADS + head
    beta = tl.sigmoid(tl.load(gates).to(tl.float32))
    a = tl.load(gates + VALUE_HEADS).to(tl.float32)
    decay = tl.exp(_decay_log(a, tl.load(decay_log_ptr + head), tl.load(bias_ptr + head)))
    own = (row * VALUE_HEADS + head) * KEY_DIM * VALUE_DIM
    cells = state_ptr + own + at[:, None] * VALUE_DIM + column[None, :]
    inside = is_key[:, None] & is_value[None, :]
    state = decay * tl.load(cells, inside & is_old, other=0.0)
    change = beta * (value.to(tl.float32) - tl.sum(state * key[:, None], 0))
    state += key[:, None] * change[None, :]
    tl.store(cells, state, inside)
    out = tl.sum(state * query[:, None], 0)
    target = out_ptr + (token * VALUE_HEADS + head) * VALUE_DIM + column
    tl.store(target, out.to(out_ptr.dtype.element_ty), is_value)


@triton.jit
def _chunks(
    mixed_ptr,
    gates_ptr,
    decay_log_ptr,
    bias_ptr,
    state_ptr,
    rows_ptr,
    starts_ptr,
    lengths_ptr,
    out_ptr,
    scale,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """The rule over a sequence's tokens; grid (sequences, VALUE_HEADS, ⌈VALUE_DIM / BLOCK_V⌉).

    Arguments as in `_single_token`. BLOCK_T tokens at once, as `chunk_of_rule` computes them; what
    they write depends on what the ones before them wrote, row by row.
    """
    wait_for_previous_kernel(PROGRAMMATIC_LAUNCH)
    sequence, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(starts_ptr + sequence).to(tl.int64)
    count = (tl.load(starts_ptr + sequence + 1) - first).to(tl.int32)
    if count > 0:
        row = tl.load(rows_ptr + sequence)
        is_old = tl.load(lengths_ptr + sequence) > count
        at, column = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
        is_key, is_value = at < KEY_DIM, column < VALUE_DIM
        KEYS: tl.constexpr = KEY_HEADS * KEY_DIM
        CHANNELS: tl.constexpr = 2 * KEYS + VALUE_HEADS * VALUE_DIM
        own_key = (head // (VALUE_HEADS // KEY_HEADS)) * KEY_DIM + at
        decay_log, bias = tl.load(decay_log_ptr + head), tl.load(bias_ptr + head)
        own = (row * VALUE_HEADS + head) * KEY_DIM * VALUE_DIM
        cells = state_ptr + own + at[:, None] * VALUE_DIM + column[None, :]
        inside = is_key[:, None] & is_value[None, :]
        state = tl.load(cells, inside & is_old, other=0.0)
        index = tl.arange(0, BLOCK_T)
        is_before = index[:, None] > index[None, :]
        is_seen = index[:, None] >= index[None, :]
        for begin in range(0, count, BLOCK_T):
            exists = begin + index < count
            token = first + begin + index
            source = mixed_ptr + token[:, None] * CHANNELS
            keys = exists[:, None] & is_key[None, :]
            query = tl.load(source + own_key[None, :], keys, other=0.0).to(tl.float32)
            key = tl.load(source + KEYS + own_key[None, :], keys, other=0.0).to(tl.float32)
            query = query * (tl.rsqrt(tl.sum(query * query, 1) + 1e-6) * scale)[:, None]
            key = key * tl.rsqrt(tl.sum(key * key, 1) + 1e-6)[:, None]
            values = exists[:, None] & is_value[None, :]
            of_head = 2 * KEYS + head * VALUE_DIM + column[None, :]
            value = tl.load(source + of_head, values, other=0.0).to(tl.float32)
            gates = gates_ptr + token * 2 * VALUE_HEADS + head
            b = tl.load(gates, exists, other=0.0).to(tl.float32)
            a = tl.load(gates + VALUE_HEADS, exists, other=0.0).to(tl.float32)
            beta = tl.where(exists, tl.sigmoid(b), 0.0)
            step = tl.where(exists, _decay_log(a, decay_log, bias), 0.0)
            total = tl.sum(tl.where(is_seen, step[None, :], 0.0), 1)
            since = tl.where(is_seen, total[:, None] - total[None, :], 0.0)
            decay = tl.where(is_seen, tl.exp(since), 0.0)
            before = tl.exp(total)[:, None]
            similar = tl.dot(key, tl.trans(key), input_precision="ieee")
            system = tl.where(is_before, beta[:, None] * similar * decay, 0.0)
            known = tl.dot(key, state, input_precision="ieee")
            written = beta[:, None] * (value - before * known)
            for i in tl.static_range(1, BLOCK_T):
                is_row = (index == i)[:, None]
                weights = tl.sum(tl.where(is_row, system, 0.0), 0)
                written -= tl.where(is_row, tl.sum(weights[:, None] * written, 0)[None, :], 0.0)
            seen = tl.dot(query, tl.trans(key), input_precision="ieee") * decay
            out = before * tl.dot(query, state, input_precision="ieee")
            out += tl.dot(seen, written, input_precision="ieee")
            target = out_ptr + (token[:, None] * VALUE_HEADS + head) * VALUE_DIM + column[None, :]
            tl.store(target, out.to(out_ptr.dtype.element_ty), values)
            last = tl.sum(step, 0)
            later = key * tl.exp(last - total)[:, None]
            state = tl.exp(last) * state
            state += tl.dot(tl.trans(later), written, input_precision="ieee")
        tl.store(cells, state, inside)


def delta_rule(
    mixed: torch.Tensor,
    gates: torch.Tensor,
    parameters: DeltaRuleGates,
    state: torch.Tensor,
    batch: ForwardBatch,
    target: Target,
) -> torch.Tensor:
    """As `Backend.delta_rule`."""
    spec, singles = parameters.spec, batch.num_single
    assert batch.state_rows is not None
    out = mixed.new_empty(len(mixed), spec.value_heads, spec.value_dim)
    columns = triton.cdiv(spec.value_dim, _COLUMNS)
    inputs = mixed, gates, parameters.decay_log, parameters.bias, state
    sizes = {
        "KEY_HEADS": spec.key_heads,
        "VALUE_HEADS": spec.value_heads,
        "KEY_DIM": spec.key_dim,
        "VALUE_DIM": spec.value_dim,
        "BLOCK_K": max(_TOKENS, triton.next_power_of_2(spec.key_dim)),
        "BLOCK_V": _COLUMNS,
        "num_warps": 4,
        **target.launch_options,
    }
    rows, lengths, scale = batch.state_rows, batch.context_lens, spec.key_dim**-0.5
    if singles:
        grid = (singles, spec.value_heads, columns)
        _single_token[grid](*inputs, rows, lengths, out, scale, **sizes)
    chunks = len(rows) - singles
    if chunks and len(mixed) > singles:
        starts = batch.cu_seqlens_q[singles:]
        _chunks[(chunks, spec.value_heads, columns)](
            *inputs, rows[singles:], starts, lengths[singles:], out, scale,
            BLOCK_T=_TOKENS, **sizes,
        )  # fmt: skip
    return out
