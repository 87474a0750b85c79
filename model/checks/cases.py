"""The cases of every operation that a model uses."""

from collections.abc import Collection, Iterator
from dataclasses import replace

import torch

from model.checks.attention import attention_cases
from model.checks.case import Case
from model.checks.dense import (
    activate_cases,
    embed_cases,
    gated_cases,
    linear_cases,
    logits_cases,
    norm_cases,
    norm_mlp_cases,
    norm_qkv_cases,
    rotate_cases,
    scaled_sum_cases,
)
from model.checks.experts import (
    add_gated_cases,
    experts_cases,
    norm_experts_cases,
    route_cases,
)
from model.checks.inputs import FULL, SMALL, Inputs, Size
from model.checks.latent import head_linear_cases, latent_query_cases
from model.checks.recurrent import (
    causal_conv_cases,
    delta_rule_cases,
    gated_norm_cases,
    output_gate_cases,
)
from model.checks.sampling import adjust_cases, argmax_cases, sample_cases, top_tokens_cases
from model.config import ModelConfig
from model.formats import DENSE
from model.layers.attention import Attention
from model.layers.delta_rule import DeltaRule
from model.layers.latent_attention import LatentAttention
from model.layers.mlp import Mlp, Moe
from model.ops.backend import OPERATIONS
from model.sharding import ALONE, Shard
from model.transformer import Transformer, attention_of

_WEIGHTS_IN_MEMORY = 16


def cases(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    kv_dtype: torch.dtype | None = None,
    shard: Shard = ALONE,
    block_size: int = 16,
    operations: Collection[str] = OPERATIONS,
    size: Size | None = None,
) -> Iterator[Case]:
    """Yield the cases of the operations that one rank of a model uses, in the order of OPERATIONS.

    kv_dtype: of the KV cache; None: dtype. block_size: positions of a KV block. size: by default
    FULL on a GPU, else SMALL. Inputs of an operation are created when its first case is taken, and
    freed with its cases.
    """
    if size is None:
        size = SMALL if device.type == "cpu" else _fitting(FULL, device)
    for operation in OPERATIONS:
        if operation in operations:
            inputs = Inputs(device, dtype, size, kv_dtype)
            yield from _cases_of(operation, config, shard, block_size, inputs)


def _fitting(size: Size, device: torch.device) -> Size:
    """Return a size whose weights fit in a GPU several times, in several forms."""
    free, _ = torch.cuda.mem_get_info(device)
    return replace(size, weight_bytes=min(size.weight_bytes, free // _WEIGHTS_IN_MEMORY))


def _cases_of(
    operation: str, config: ModelConfig, shard: Shard, block_size: int, inputs: Inputs
) -> Iterator[Case]:
    kinds = {
        (layer.window, config.heads(layer)): layer
        for layer in config.layers
        if layer.kv_source is None and not layer.recurrent
    }
    layers = [attention_of(config, layer, shard) for layer in kinds.values()]
    attention = layers[0]
    latent = attention if isinstance(attention, LatentAttention) else None
    plain = attention if isinstance(attention, Attention) else None
    dense = next((layer for layer in config.layers if config.has_mlp(layer)), None)
    sparse = next((layer for layer in config.layers if layer.sparse), None)
    recurrent = next((layer for layer in config.layers if layer.recurrent), None)
    rule = None if recurrent is None else DeltaRule(config, recurrent, shard)
    mlp = None if dense is None else Mlp(config, dense, shard)
    moe = None if sparse is None else Moe(config, sparse, shard)
    shared = None if moe is None else moe.experts.shared
    vocab = config.vocab_size
    if operation == "embed":
        yield from embed_cases(config, inputs)
    elif operation == "add_rms_norm":
        yield from norm_cases(attention.norm, inputs)
    elif operation == "linear":
        yield from linear_cases("attention's output", attention.out, inputs)
        if shared is not None:
            yield from linear_cases("the shared expert's output", shared.down, inputs)
            if shared.gate is not None:
                yield from linear_cases("the shared expert's gate", shared.gate, inputs)
        # Dense ones are computed in fused operations, or by torch.
        linears = {} if plain is None else {"QKV": plain.qkv}
        if latent is not None:
            linears |= {"the query": latent.query, "the latent": latent.latent}
        if mlp is not None:
            linears |= {"gate and up": mlp.gate_up, "down": mlp.down}
        if shared is not None:
            linears |= {"the shared expert's gate and up": shared.gate_up}
        for name, linear in linears.items():
            if linear.format != DENSE:
                yield from linear_cases(name, linear, inputs)
    elif operation == "logits":
        head = Transformer(config, shard).head
        yield from logits_cases("head", head, config.logits_scale, inputs)
        if moe is not None:
            yield from logits_cases("router", moe.router, 1, inputs)
    elif operation == "rotate_and_write" and plain is not None:
        for layer in {layer.heads.head_dim: layer for layer in layers}.values():
            if isinstance(layer, Attention):
                yield from rotate_cases(layer, config, block_size, inputs)
    elif operation == "norm_qkv" and plain is not None:
        yield from norm_qkv_cases(plain, config, block_size, inputs)
    elif operation == "head_linear" and latent is not None:
        yield from head_linear_cases(latent, inputs)
    elif operation == "latent_query" and latent is not None:
        yield from latent_query_cases(latent, config.rotary_dim, block_size, inputs)
    elif operation == "causal_conv" and rule is not None:
        yield from causal_conv_cases(rule, inputs)
    elif operation == "delta_rule" and rule is not None:
        yield from delta_rule_cases(rule, inputs)
    elif operation == "gated_norm" and rule is not None:
        yield from gated_norm_cases(rule, inputs)
    elif operation == "output_gate" and config.output_gate:
        yield from output_gate_cases(attention.out.inputs, inputs)
    elif operation == "attention":
        for layer in layers:
            yield from attention_cases(layer, block_size, inputs)
    elif operation == "activate":
        for gated in (mlp, shared):
            if gated is not None:
                yield from activate_cases(gated.down.inputs, config.activation, inputs)
    elif operation == "gated" and config.per_layer_size:
        yield from gated_cases(config, inputs)
    elif operation == "scaled_sum" and config.layer_scalars:
        yield from scaled_sum_cases(config.hidden_size, inputs)
    elif operation == "norm_mlp" and mlp is not None:
        yield from norm_mlp_cases(mlp, inputs)
    elif operation == "route" and moe is not None:
        yield from route_cases(moe, inputs)
    elif operation == "experts" and moe is not None:
        yield from experts_cases(moe, inputs)
    elif operation == "add_gated" and shared is not None:
        yield from add_gated_cases(shared, config.hidden_size, inputs)
    elif operation == "norm_experts" and moe is not None:
        yield from norm_experts_cases(moe, inputs)
    elif operation == "argmax":
        yield from argmax_cases(vocab, inputs)
    elif operation == "top_tokens":
        yield from top_tokens_cases(vocab, inputs)
    elif operation == "adjust_logits":
        yield from adjust_cases(vocab, inputs)
    elif operation == "sample_rows":
        yield from sample_cases(vocab, inputs)
