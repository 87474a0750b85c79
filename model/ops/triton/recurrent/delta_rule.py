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
_COLUMNS = 32  # of a state in one program, for single tokens
_CHUNK_COLUMNS = 16  # and for chunks, with operands of matrix instructions in registers


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
def _squares(x):
    """The sum of the squares of each row, in float32."""
    return tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)


@triton.jit
def _parts(x):
    """Three numbers in bfloat16 that together hold all bits of x, float32; the largest first.

    The matrix instructions of most GPUs take no operands in float32, and without them operands are
    spread over more registers than there are. The products of bfloat16 are exact in float32.
    """
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _product(a, b):
    """a · b, as exact as in float32; a as it is stored, b float32."""
    if a.dtype == tl.bfloat16:
        high, middle, low = _parts(b)
        result = tl.dot(a, high, tl.dot(a, middle, tl.dot(a, low)))
    else:
        result = tl.dot(a.to(tl.float32), b, input_precision="ieee")
    return result


@triton.jit
def _add_products(key, query, state, similar, seen, known, asked):
    """Add key · keyᵀ, query · keyᵀ, key · state and query · state to the last four arguments.

    key, query [tokens, some of the keys' values], state float32 [these values, columns]. Of the
    parts of a state only one has to be in registers.
    """
    similar = tl.dot(key, tl.trans(key), similar, input_precision="ieee")
    seen = tl.dot(query, tl.trans(key), seen, input_precision="ieee")
    if key.dtype == tl.bfloat16:
        high, middle, low = _parts(state)
        known, asked = tl.dot(key, low, known), tl.dot(query, low, asked)
        known, asked = tl.dot(key, middle, known), tl.dot(query, middle, asked)
        known, asked = tl.dot(key, high, known), tl.dot(query, high, asked)
    else:
        known, asked = known + _product(key, state), asked + _product(query, state)
    return similar, seen, known, asked


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
        # The values of keys are in two halves, of which one at a time is in registers.
        HALF: tl.constexpr = BLOCK_K // 2
        left, column = tl.arange(0, HALF), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
        right = HALF + left
        is_value = column < VALUE_DIM
        KEYS: tl.constexpr = KEY_HEADS * KEY_DIM
        CHANNELS: tl.constexpr = 2 * KEYS + VALUE_HEADS * VALUE_DIM
        key_head = (head // (VALUE_HEADS // KEY_HEADS)) * KEY_DIM
        decay_log, bias = tl.load(decay_log_ptr + head), tl.load(bias_ptr + head)
        own = state_ptr + (row * VALUE_HEADS + head) * KEY_DIM * VALUE_DIM
        upper_cells = own + left[:, None] * VALUE_DIM + column[None, :]
        lower_cells = upper_cells + HALF * VALUE_DIM
        is_upper = (left < KEY_DIM)[:, None] & is_value[None, :]
        is_lower = (right < KEY_DIM)[:, None] & is_value[None, :]
        upper = tl.load(upper_cells, is_upper & is_old, other=0.0)
        lower = tl.load(lower_cells, is_lower & is_old, other=0.0)
        index = tl.arange(0, BLOCK_T)
        is_before = index[:, None] > index[None, :]
        is_seen = index[:, None] >= index[None, :]
        for begin in range(0, count, BLOCK_T):
            exists = begin + index < count
            token = first + begin + index
            # Keys and queries as they are stored, for matrix instructions; what makes their lengths
            # 1 are factors of tokens.
            source = mixed_ptr + token[:, None] * CHANNELS + key_head + left[None, :]
            is_left = exists[:, None] & (left < KEY_DIM)[None, :]
            query = tl.load(source, is_left, other=0.0)
            left_key = tl.load(source + KEYS, is_left, other=0.0)
            query_squares, key_squares = _squares(query), _squares(left_key)
            square = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
            narrow = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
            similar, seen, known, asked = _add_products(
                left_key, query, upper, square, square, narrow, narrow
            )
            is_right = exists[:, None] & (right < KEY_DIM)[None, :]
            query = tl.load(source + HALF, is_right, other=0.0)
            right_key = tl.load(source + KEYS + HALF, is_right, other=0.0)
            query_squares += _squares(query)
            key_squares += _squares(right_key)
            similar, seen, known, asked = _add_products(
                right_key, query, lower, similar, seen, known, asked
            )
            query_scale = tl.rsqrt(query_squares + 1e-6) * scale
            key_scale = tl.rsqrt(key_squares + 1e-6)
            gates = gates_ptr + token * 2 * VALUE_HEADS + head
            b = tl.load(gates, exists, other=0.0).to(tl.float32)
            a = tl.load(gates + VALUE_HEADS, exists, other=0.0).to(tl.float32)
            beta = tl.where(exists, tl.sigmoid(b), 0.0)
            step = tl.where(exists, _decay_log(a, decay_log, bias), 0.0)
            total = tl.sum(tl.where(is_seen, step[None, :], 0.0), 1)
            since = tl.where(is_seen, total[:, None] - total[None, :], 0.0)
            decay = tl.where(is_seen, tl.exp(since), 0.0) * key_scale[None, :]
            before = tl.exp(total)[:, None]
            system = tl.where(is_before, (beta * key_scale)[:, None] * similar * decay, 0.0)
            values = exists[:, None] & is_value[None, :]
            of_head = 2 * KEYS + head * VALUE_DIM + column[None, :]
            value = tl.load(mixed_ptr + token[:, None] * CHANNELS + of_head, values, other=0.0)
            written = value.to(tl.float32) - before * key_scale[:, None] * known
            written *= beta[:, None]
            for i in range(1, BLOCK_T):
                is_row = (index == i)[:, None]
                weights = tl.sum(tl.where(is_row, system, 0.0), 0)
                written -= tl.where(is_row, tl.sum(weights[:, None] * written, 0)[None, :], 0.0)
            out = before * asked + tl.dot(seen * decay, written, input_precision="ieee")
            out *= query_scale[:, None]
            target = out_ptr + (token[:, None] * VALUE_HEADS + head) * VALUE_DIM + column[None, :]
            tl.store(target, out.to(out_ptr.dtype.element_ty), values)
            last = tl.sum(step, 0)
            kept = (key_scale * tl.exp(last - total))[:, None] * written
            upper = tl.exp(last) * upper + _product(tl.trans(left_key), kept)
            lower = tl.exp(last) * lower + _product(tl.trans(right_key), kept)
        tl.store(upper_cells, upper, is_upper)
        tl.store(lower_cells, lower, is_lower)


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
    inputs = mixed, gates, parameters.decay_log, parameters.bias, state
    sizes = {
        "KEY_HEADS": spec.key_heads,
        "VALUE_HEADS": spec.value_heads,
        "KEY_DIM": spec.key_dim,
        "VALUE_DIM": spec.value_dim,
        "BLOCK_K": max(2 * _TOKENS, triton.next_power_of_2(spec.key_dim)),
        "num_warps": 4,
        **target.launch_options,
    }
    rows, lengths, scale = batch.state_rows, batch.context_lens, spec.key_dim**-0.5
    if singles:
        grid = (singles, spec.value_heads, triton.cdiv(spec.value_dim, _COLUMNS))
        _single_token[grid](*inputs, rows, lengths, out, scale, BLOCK_V=_COLUMNS, **sizes)
    chunks = len(rows) - singles
    if chunks and len(mixed) > singles:
        starts = batch.cu_seqlens_q[singles:]
        _chunks[(chunks, spec.value_heads, triton.cdiv(spec.value_dim, _CHUNK_COLUMNS))](
            *inputs, rows[singles:], starts, lengths[singles:], out, scale,
            BLOCK_V=_CHUNK_COLUMNS, BLOCK_T=_TOKENS, **sizes,
        )  # fmt: skip
    return out
