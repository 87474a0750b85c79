"""Compile the kernels for GPUs without having one, with the arguments of their launches.

The operations run on tensors without storage, and launches are recorded instead of executed.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from model import ModelConfig
from model.cost.known_models import named_config
from model.formats import DENSE, FP8, MXFP4, WeightFormat
from model.formats.float8 import Float8
from model.formats.integers import Integers
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.specs import (
    Activation,
    AdjustmentTables,
    AttentionSpec,
    DeltaRuleGates,
    DeltaRuleSpec,
    Experts,
    Linear,
    Norm,
    NormSpec,
    RopeArgs,
    Router,
    SamplingTables,
)
from model.ops.triton.backend import TritonBackend
from model.ops.triton.linear import norm_linear
from model.ops.triton.mxfp4 import ExpertWeights, dense_weights, words_shape
from model.ops.triton.tiles import Target, nearest_tiles
from tests.model.launch_forms import largest
from tests.model.ops_helpers import heads_with_norms, linear_of, norm_of, rope_args

CONFIGS = tuple(
    map(
        named_config,
        ("gpt-oss-20b", "qwen3-0.6b", "llama-3-8b", "qwen2-0.5b", "qwen3-30b-a3b"),
    )
)
ROWS = (1, 16, 64, 512, 4096)  # every choice by number of rows occurs
# For architectures that share another's tiles and most of its instructions: every tile occurs, and
# both forms of each operation with tiles.
FEW_CONFIGS = (CONFIGS[0], CONFIGS[2])
FEW_ROWS = (1, 512, 4096)
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e4m3fnuz: "*fp8e4b8",
}


@dataclass(frozen=True)
class Launch:
    """A kernel and everything that its compiled form depends on."""

    kernel: JITFunction[Any]
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def is_tiled(self) -> bool:
        """Whether it has a tile of `tiles.py`; the others work on a row or a part of it."""
        return "num_stages" in dict(self.options)

    def __str__(self) -> str:
        named = ", ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.kernel.__name__}({named}; {dict(self.options)})"


@dataclass(frozen=True)
class Compiled:
    """The resources of its target that a compiled kernel uses."""

    shared: int
    spills: int  # bytes; on AMD, registers
    registers: int
    binary: Any

    @property
    def code(self) -> Any:
        """NVIDIA: the cubin; AMD: the text of the assembly."""
        return self.binary.asm.get("cubin") or self.binary.asm["amdgcn"]


def target(architecture: str) -> GPUTarget:
    """Return the compiler's target; Radeons (gfx10 and later) have waves of 32 threads."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    return GPUTarget("hip", architecture, 32 if architecture.startswith("gfx1") else 64)


def launches(
    architecture: str,
    configs: Sequence[ModelConfig] | None = None,
    rows: Sequence[int] | None = None,
) -> list[Launch]:
    """Return the launches of the layers of the configs for the numbers of rows; see `largest`.

    By default CONFIGS and ROWS.
    """
    found: dict[Launch, None] = {}

    def record(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kw: Any) -> None:
        found[launch_of(kernel, args, kw)] = None

    _run(architecture, configs or CONFIGS, rows or ROWS, record)
    return largest(found)


def fp8_launches(architecture: str) -> list[Launch]:
    """Return every distinct launch that writes or reads a KV cache in fp8, for FEW_CONFIGS."""
    found: dict[Launch, None] = {}

    def record(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kw: Any) -> None:
        found[launch_of(kernel, args, kw)] = None

    known = Target(architecture, 132, nearest_tiles(architecture))
    ops = TritonBackend(torch.device("meta"), torch.bfloat16, known, kv_dtype="fp8")
    with patch.object(JITFunction, "run", record):
        for config in FEW_CONFIGS:
            for rows in FEW_ROWS:
                for call in _attention_calls(ops, config, rows):
                    call()
    return largest(x for x in found if any("fp8" in kind for _, kind in x.types))


def recurrent_launches(architecture: str) -> list[Launch]:
    """Return every distinct launch of recurrent layers, for one spec and a mixed step."""
    found: dict[Launch, None] = {}

    def record(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kw: Any) -> None:
        found[launch_of(kernel, args, kw)] = None

    target = Target(architecture, 132, nearest_tiles(architecture))
    ops = TritonBackend(torch.device("meta"), torch.bfloat16, target)
    spec = DeltaRuleSpec(key_heads=16, value_heads=32, key_dim=128, value_dim=128, kernel=4)
    gates = DeltaRuleGates(spec, _empty(32, dtype=torch.float32), _empty(32, dtype=torch.float32))
    x, weight = _empty(64, 16_384), _empty(4, spec.channels, dtype=torch.float32)
    mixed, value = _empty(64, spec.channels), _empty(64, 32, 128)
    conv = _empty(9, *spec.conv_shape)
    state = _empty(9, *spec.recurrent_shape, dtype=torch.float32)
    ids, lengths = _empty(8, dtype=torch.int64), _empty(9, dtype=torch.int32)
    norm = norm_of(_empty(128))
    with patch.object(JITFunction, "run", record):
        for singles in (4, 8):
            batch = ForwardBatch(ids, ids, [], [], singles, (), ids, lengths, lengths[:-1], ids)
            ops.causal_conv(x, weight, conv, batch)
            ops.delta_rule(mixed, _empty(64, 64), gates, state, batch)
        ops.gated_norm(value, x[:, spec.channels :], norm)
        ops.output_gate(value.flatten(1), value.flatten(1))
    return list(found)


QUANTIZED: tuple[WeightFormat, ...] = (
    Integers(4, 128, True, quantizes=False),
    Integers(8, 0, False, quantizes=False),
    Float8(),
    FP8,
    Float8(128, "dynamic"),
)


def quantized_launches(
    architecture: str,
    forms: Sequence[WeightFormat] = QUANTIZED,
    rows: Sequence[int] = (1, 64, 1024),
    configs: Sequence[ModelConfig] | None = None,
) -> list[Launch]:
    """Return every distinct launch of a product with weights in these formats.

    By default those of the down projection of Llama-3-8B and of the experts of Qwen3-30B-A3B.
    """
    found: dict[Launch, None] = {}

    def record(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kw: Any) -> None:
        if "quantize" in kernel.__name__:
            found[launch_of(kernel, args, kw)] = None

    known = Target(architecture, 132, nearest_tiles(architecture))
    ops = TritonBackend(torch.device("meta"), torch.bfloat16, known)
    with patch.object(JITFunction, "run", record):
        for config in configs or (CONFIGS[2], CONFIGS[4]):
            for form, count in itertools.product(forms, rows):
                _quantized_call(ops, config, form, count)
    return list(found)


def _quantized_call(ops: TritonBackend, config: ModelConfig, form: WeightFormat, rows: int) -> None:
    hidden, moe, x = config.hidden_size, config.moe, _empty(rows, config.hidden_size)
    if moe is None:
        size = config.intermediate_size
        weight = form.allocate(ops, (hidden, size))
        if isinstance(weight, torch.Tensor):  # a format that these sizes do not fit
            return
        ops.linear(_empty(rows, size), Linear(size, hidden, False, form, weight=weight))
        return
    count, size = moe.num_experts, moe.intermediate_size
    shapes = (count, 2 * size, hidden), (count, hidden, size)
    up, down = (form.allocate(ops, shape) for shape in shapes)
    if isinstance(up, torch.Tensor) or isinstance(down, torch.Tensor):
        return
    chosen = _empty(rows, moe.router.top_k, dtype=torch.int64)
    weights = _empty(rows, moe.router.top_k, dtype=torch.float32)
    experts = Experts(count, hidden, size, False, form, up, None, down, None)
    ops.experts(x, chosen, weights, experts, Activation())


def grids(
    architecture: str, configs: Sequence[ModelConfig], rows: int
) -> set[tuple[str, tuple[int, ...]]]:
    """Return the kernels and grids of a step of `rows` tokens."""
    found = set()

    def record(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kw: Any) -> None:
        found.add((kernel.__name__, tuple(grid)))

    _run(architecture, configs, (rows,), record)
    return found


def _run(
    architecture: str,
    configs: Sequence[ModelConfig],
    rows: Sequence[int],
    record: Callable[..., None],
) -> None:
    """Run the operations of the configs' layers with `record` in place of launches."""
    # More rows than norms are fused for in jobs, because benchmarks try up to 64 on Hopper.
    most = 64 if architecture == "sm_90" else 16
    tiles = replace(nearest_tiles(architecture), fused_qkv=most, fused_mlp=most)
    backend = TritonBackend(torch.device("meta"), torch.bfloat16, Target(architecture, 132, tiles))
    with patch.object(JITFunction, "run", record):
        for config in configs:
            for count in rows:
                for call in _calls(backend, config, count):
                    call()


def launch_of(kernel: JITFunction[Any], args: tuple[Any, ...], kw: dict[str, Any]) -> Launch:
    """The launch of a kernel with these arguments and, beside named ones, options."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    options = tuple((k, v) for k, v in kw.items() if k not in kernel.arg_names)
    values |= {k: v for k, v in kw.items() if k in kernel.arg_names}
    types, constants, aligned = {}, {}, []
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if isinstance(value, torch.Tensor):
            types[parameter.name] = _POINTERS[value.dtype]
            aligned.append(i)
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            types[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = parameter.annotation_type or ("i32" if value < 2**31 else "i64")
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(i)
    return Launch(kernel, tuple(types.items()), tuple(constants.items()), tuple(aligned), options)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _calls(ops: TritonBackend, config: ModelConfig, rows: int) -> Iterator[Callable[[], Any]]:
    """The operations of the config's different layers, as a step of `rows` tokens calls them."""
    yield from _sampling_calls(ops, config, min(rows, 512))
    yield from _attention_calls(ops, config, rows)
    if config.moe is None:
        yield from _mlp_calls(ops, config, rows)
    else:
        yield from _moe_calls(ops, config, rows)


def _sampling_calls(
    ops: TritonBackend, config: ModelConfig, rows: int
) -> Iterator[Callable[[], Any]]:
    logits = _empty(rows, config.vocab_size, dtype=torch.float32)
    ids, last = _empty(rows, dtype=torch.int64), _empty(1024, dtype=torch.int64)
    tables = SamplingTables(
        _empty(1024, 2, dtype=torch.float32), _empty(1024, 2, dtype=torch.int64)
    )
    adjustments = AdjustmentTables(
        _empty(1024, 4, dtype=torch.float32),
        _empty(1024, 4, dtype=torch.int32),
        _empty(1024, config.vocab_size, dtype=torch.int16),
        _empty(1024, 3072, 4, dtype=torch.int32),
        _empty(1024, 3072, dtype=torch.float32),
        _empty(1024, -(-config.vocab_size // 32), dtype=torch.int32),
    )
    yield lambda: ops.sample_rows(logits, ids, last)
    for dtype in (torch.int32, torch.int64):
        positions = _empty(rows, dtype=dtype)
        yield partial(ops.sample_rows, logits, ids, last, positions, tables)
        yield partial(ops.adjust_logits, logits, ids, last, positions, adjustments)


def _attention_calls(
    ops: TritonBackend, config: ModelConfig, rows: int
) -> Iterator[Callable[[], Any]]:
    hidden, heads, dim = config.hidden_size, config.num_heads, config.head_dim
    x, norm = _empty(rows, hidden), norm_of(_empty(hidden))
    stream = _empty(rows, hidden, dtype=torch.float32)
    table, ids = _empty(config.vocab_size, hidden), _empty(rows, dtype=torch.int64)
    yield lambda: ops.embed(table, ids, config.embedding_scale)
    yield lambda: ops.add_rms_norm(stream, None, norm)
    yield lambda: ops.add_rms_norm(stream, x, norm)
    kv = ops.empty_cache((2, 60_000, 16, config.num_kv_heads, dim))
    qkv = _empty(rows, heads + 2 * config.num_kv_heads, dim)
    norms = (_empty(dim), _empty(dim)) if config.qk_norm else None
    slots, cos_sin = _empty(rows, dtype=torch.int64), _empty(rows, dim, dtype=torch.float32)
    rope = rope_args(kv, cos_sin, slots, heads, norms)
    yield lambda: ops.rotate_and_write(qkv, rope)
    if rows == 1:  # one form is enough
        identity = Norm(hidden, NormSpec(1e-6), is_identity=True)
        yield lambda: ops.add_rms_norm(stream, x, identity)
        scale = _empty(rows, 1, dtype=torch.float32)
        for kind in ("after the rotation", "of all heads at once"):
            other = heads_with_norms(heads, config.num_kv_heads, dim, kind)
            yield partial(ops.rotate_and_write, qkv, RopeArgs(other, cos_sin, kv, slots, scale))
    out = qkv.shape[1] * dim
    projection = linear_of(_empty(out, hidden), _empty(out) if config.qkv_bias else None)
    deltas = (None, x) if rows == 1 else (x,)  # one form is enough for more rows
    if config.moe is not None and rows <= ops.target.tiles.fused_router:
        parts = _empty(rows, config.moe.router.top_k, hidden)
        yield lambda: ops.add_rms_norm(stream, parts, norm)
        deltas = (*deltas, parts)
    for delta in deltas:
        yield partial(ops.norm_qkv, stream, delta, norm, projection, rope)
    query = _empty(rows, heads, dim)
    yield lambda: ops.linear(query.flatten(1), linear_of(_empty(hidden, heads * dim)))
    yield lambda: ops.logits(x, linear_of(_empty(config.vocab_size, hidden)), config.logits_scale)
    sinks = _empty(heads) if config.sinks else None
    for window in {layer.window for layer in config.layers}:
        spec = AttentionSpec(dim**-0.5, window)
        for singles, sequences in {(min(rows, 512), min(rows, 512)), (0, 1)}:
            lengths = _empty(sequences + 1, dtype=torch.int32)
            batch = ForwardBatch(slots, slots, [], [], singles, (), slots, lengths, lengths[:-1])
            tables = GroupTables(_empty(sequences, 512, dtype=torch.int32), slots)
            tokens = query[: singles or rows]
            yield partial(ops.attention, tokens, kv, batch, tables, spec, sinks)


def _mlp_calls(ops: TritonBackend, config: ModelConfig, rows: int) -> Iterator[Callable[[], Any]]:
    hidden, size, plain = config.hidden_size, config.intermediate_size, Activation()
    x, norm, gate_up = _empty(rows, hidden), norm_of(_empty(hidden)), _empty(rows, 2 * size)
    up, down = linear_of(_empty(2 * size, hidden)), linear_of(_empty(hidden, size))
    yield lambda: ops.activate(gate_up, plain)
    stream = _empty(rows, hidden, dtype=torch.float32)
    yield lambda: ops.norm_mlp(stream, x, norm, up, down, plain)
    yield lambda: ops.linear(gate_up[:, :size], down)
    if rows <= ops.target.tiles.fused_qkv:
        biased = linear_of(up.weight, _empty(2 * size) if config.mlp_bias else None)
        yield lambda: norm_linear(x, x, norm, biased, ops.target, is_gated=True)


def _moe_calls(ops: TritonBackend, config: ModelConfig, rows: int) -> Iterator[Callable[[], Any]]:
    moe, hidden = config.moe, config.hidden_size
    assert moe is not None
    count, size, biased = moe.num_experts, moe.intermediate_size, moe.biases
    x, norm = _empty(rows, hidden), norm_of(_empty(hidden))
    stream = _empty(rows, hidden, dtype=torch.float32)
    scores = _empty(rows, count, dtype=torch.float32)
    router = linear_of(_empty(count, hidden), _empty(count) if biased else None)
    spec = moe.router
    yield lambda: ops.logits(x, router, 1)
    yield lambda: ops.route(scores, spec)
    chosen = _empty(rows, spec.top_k, dtype=torch.int64)
    weights = _empty(rows, spec.top_k, dtype=torch.float32)
    biases = (_empty(count, 2 * size), _empty(count, hidden)) if biased else (None, None)
    dense = (_empty(count, 2 * size, hidden), _empty(count, hidden, size))
    packed = partial(_packed, target=ops.target)
    # No other models have experts in MXFP4 than those of gpt-oss, which have biases.
    for stack, form in ((dense_weights, DENSE), (packed, MXFP4))[: 2 if biased else 1]:
        up, down = map(stack, dense)
        experts = Experts(count, hidden, size, biased, form, up, biases[0], down, biases[1])
        activation = config.activation
        yield partial(ops.experts, x, chosen, weights, experts, activation)
        yield partial(ops.norm_experts, stream, x, norm, Router(router, spec), experts, activation)


def _packed(weight: torch.Tensor, target: Target) -> ExpertWeights:
    count, outputs, inputs = weight.shape
    values = _empty(count, *words_shape(outputs, inputs, target.mxfp4_rows), dtype=torch.int32)
    scales = _empty(count, -(-inputs // 128), outputs, dtype=torch.int32)
    return ExpertWeights(values, scales, target.mxfp4_run)


def compile_launch(launch: Launch, architecture: str) -> Compiled:
    """Compile a launch. Raises the compiler's errors."""
    divisible = [["tt.divisibility", 16]]
    source = ASTSource(
        launch.kernel,
        dict(launch.types),
        dict(launch.constants),
        {(i,): divisible for i in launch.aligned},
    )
    binary = triton.compile(source, target=target(architecture), options=dict(launch.options))
    shared = binary.metadata.shared
    if "cubin" in binary.asm:
        return Compiled(shared, *_nvidia_usage(binary.asm["cubin"]), binary)
    text = binary.asm["amdgcn"]
    spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text))
    registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s*(\d+)", text))
    return Compiled(shared, spills, registers, binary)


@cache
def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Return (bytes of stack, which kernels use only for spilled registers, and registers)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    stack, registers = re.search(r"STACK:(\d+)", text), re.search(r"REG:(\d+)", text)
    assert stack is not None, text
    assert registers is not None, text
    return int(stack[1]), int(registers[1])
