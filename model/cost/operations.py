"""The cost of every operation of a step: FLOPs by unit, bytes by content and kernel launches.

All figures are integers computed from the config alone, without torch. Conventions:

- `context` includes the query tokens. Attention scores cover query · context positions (the
  convention of the documents and of MFU), or only the positions that a causal mask keeps if
  `causal` is set. A sliding window limits both. With `causal`, the last MLP runs only for the rows
  that need logits.
- Keys and values cross the memory bus once per position: new ones when they are written, earlier
  ones when they are read. With a sliding window only positions inside it are read.
- Unfused, each operation reads its input and writes its output (qwen2-layer-data-flow). Fused, a
  layer reads its input once and writes the results of its two blocks (roofline-prefill-decode).
- The head runs for the rows that need logits: one per sequence in prefill, else every token.
- Of the experts, only the expected number of distinct selected ones is read.
- With tensor parallelism the figures are those of one GPU; communication is in `interconnect`.
"""

from collections import Counter
from dataclasses import replace
from itertools import chain

from model.config import ModelConfig
from model.cost.attention_cost import AttentionCost
from model.cost.flops import Flops
from model.cost.mlp_cost import MlpCost
from model.cost.workload import (
    DTYPE_BYTES,
    Bytes,
    Op,
    Workload,
    kv_vector_bytes,
    state_bytes,
)
from model.formats import DENSE, HEAD, full_interface
from model.sharding import Shard
from model.transformer import Transformer


def check_tensor_parallel(config: ModelConfig, size: int) -> None:
    """Raise ValueError with the possible sizes if the model cannot be split `size` ways."""
    if _can_be_split(config, size):
        return
    possible = [n for n in range(1, config.num_heads + 1) if _can_be_split(config, n)]
    kv_heads = " and ".join(map(str, _kv_head_counts(config)))
    parts = [f"{config.num_heads} heads", f"{kv_heads} KV heads"]
    if any(config.has_mlp(layer) for layer in config.layers):
        parts.append(f"MLP {config.intermediate_size}")
    if config.moe is not None:
        parts.append(f"{config.moe.num_experts} experts")
        if config.moe.shared_size:
            parts.append(f"shared expert {config.moe.shared_size}")
    if config.delta_rule is not None:
        parts.append(f"{config.delta_rule.key_heads} key heads of recurrent layers")
    raise ValueError(
        f"this model ({', '.join(parts)}) cannot be split {size} ways; possible: "
        f"{', '.join(map(str, possible))}"
    )


def _can_be_split(config: ModelConfig, size: int) -> bool:
    """Return whether heads, experts and MLPs divide evenly and every GPU has vocabulary."""
    if config.whole_qk_norm and size > 1:
        return False  # a norm over the heads of all ranks would need one more exchange
    moe, rule = config.moe, config.delta_rule
    dense = any(config.has_mlp(layer) for layer in config.layers)
    return not (
        config.num_heads % size
        or any(kv % size and size % kv for kv in _kv_head_counts(config))
        or (rule is not None and rule.key_heads % size)
        or (moe is not None and (moe.num_experts % size or moe.shared_size % size))
        or (dense and config.intermediate_size % size)
        or (size - 1) * -(-config.vocab_size // size) >= config.vocab_size
    )


def _kv_head_counts(config: ModelConfig) -> list[int]:
    """Return the different numbers of KV heads that layers have."""
    return list(dict.fromkeys(config.heads(layer).num_kv_heads for layer in config.layers))


def operations(config: ModelConfig, work: Workload) -> list[Op]:
    """Return the operations of the step in order. Raises ValueError for an impossible split."""
    check_tensor_parallel(config, work.tensor_parallel)
    shard = _ShardCost(config, work)
    layers, last = list(config.layers), []
    if work.causal and work.logits_rows < work.tokens:
        few = _ShardCost(config, replace(work, batch=work.logits_rows, query=1))
        last = [(layers.pop(), 1, few)]
    found: dict[str, Op] = {}
    for layer, count, mlp in [(*each, shard) for each in Counter(layers).items()] + last:
        block = shard.recurrent_block if layer.recurrent else shard.attention_block
        for op in chain(block(layer), mlp.mlp_block(layer), mlp.per_layer_block()):
            one = op.repeated(count)
            found[op.name] = found[op.name].plus(one) if op.name in found else one
    ops = [shard.embedding(), *(found[name] for name in _LAYER_OPS if name in found)]
    ops += shard.head()
    if work.backward:
        return [Op(op.name, op.layer_count, op.flops, Bytes(), 0) for op in ops]
    return ops


def total(ops: list[Op]) -> Op:
    """Return the sum of the operations; its layer_count is the largest of theirs."""
    result = Op("total", 0, Flops(), Bytes(), 0)
    for op in ops:
        result = result.plus(op, max(result.layer_count, op.layer_count))
    return result


def parameter_bytes(config: ModelConfig, dtype: str, tensor_parallel: int = 1) -> int:
    """Return the bytes of weights that one GPU stores, norms in the same dtype as the rest.

    A tied embedding counts once, unless the head is a copy of it in another format.
    """
    check_tensor_parallel(config, tensor_parallel)
    item = DTYPE_BYTES[dtype]
    # The first rank, because the last may have a smaller part of the vocabulary.
    model = Transformer(config, Shard(0, tensor_parallel))
    stored = [*model.parameters()]
    if config.tie_word_embeddings and config.head_format != HEAD:
        stored += model.head.parameters()
    return sum(
        full_interface(parameter.format or DENSE).bytes(parameter.shape, item)
        for parameter in stored
    )


def kv_bytes_per_sequence(
    config: ModelConfig, context: int, dtype: str, tensor_parallel: int = 1
) -> int:
    """Return the bytes of keys and values of one sequence of `context` positions on one GPU.

    The states of recurrent layers are included.
    """
    found = state_bytes(config, DTYPE_BYTES[dtype], tensor_parallel)
    for layer, count in Counter(config.layers).items():
        if layer.kv_source is None and not layer.recurrent:
            heads = config.heads(layer)
            vectors = config.kv_vectors * max(1, heads.num_kv_heads // tensor_parallel) * count
            positions = min(layer.window or context, context)
            found += positions * vectors * kv_vector_bytes(config, heads.head_dim, dtype)
    return found


def activation_accesses(fused: bool, sparse: bool = False) -> int:
    """Return the activation round trips of one layer, as qwen2-layer-data-flow counts them.

    Unfused: each of the nine operations (ten with a router) reads once and writes once. Fused: two,
    the writes after the attention block and after the MLP block.
    """
    return 2 if fused else 2 * (10 if sparse else 9)


_LAYER_OPS = (
    "input_norm qkv_proj rope attention o_proj post_norm router gate_up_proj activation down_proj"
    " per_layer_mlp"
).split()


class _ShardCost(AttentionCost, MlpCost):
    """All operations."""
