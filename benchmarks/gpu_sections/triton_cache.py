"""Compile the kernels of checks and loads without a GPU, into a folder that a GPU can use.

Triton finds a compiled kernel by a hash of its source, its arguments' types and alignment, the
target and Triton's own files. So models are run as on the GPU, layer by layer, on tensors without
memory, for a driver that only names the target; each launch compiles its kernel.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.gpu_sections.compile_ahead import compile_together
from engine.execution.decode_graphs import capture_sizes
from model.checks import FULL, cases
from model.config import ModelConfig
from model.cost.known_models import named_config
from model.families import parse_config
from model.formats import MXFP4
from model.layers.attention import Attention
from model.layers.mlp import Moe
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.specs import Experts, RopeArgs, SamplingTables
from model.ops.triton.backend import TritonBackend
from model.ops.triton.mxfp4 import ExpertWeights, words_shape
from model.ops.triton.tiles import TILES, Target
from model.transformer import Transformer

META = torch.device("meta")
# The models of the loads, and their largest batches.
MODELS = {"gpt-oss-20b": 1024, "qwen3-0.6b": 256, "llama-3.1-8b": 256, "qwen2-0.5b": 256}
_MAX_TOKENS = 8192  # of a step
_PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
_BLOCK = 16
_CHUNK = 1024  # tokens: the same kernels run for every length of a chunk
_SMALL = (
    "embed",
    "rotate_and_write",
    "activate",
    "argmax",
    "top_tokens",
    "adjust_logits",
    "sample_rows",
)
_IS_MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}
_CHECK_ROWS = (1, 3, 33, 64)  # of the cases of model.checks


class _Driver:
    """Triton's driver of a GPU that is not there."""

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(architecture: str, folder: Path) -> None:
    """Compile all kernels for an architecture of TILES; print their number, size and time.

    Raises SystemExit, with a message, for an unknown architecture.
    """
    if architecture not in TILES:
        raise SystemExit(f"gpu.py: unknown architecture {architecture}; known: {', '.join(TILES)}")
    folder.mkdir(parents=True, exist_ok=True)
    use_kernels(folder)
    started = time.monotonic()
    from tests.model.triton_compiler import target

    driver: Any = _Driver(target(architecture))
    triton.runtime.driver.set_active(driver)
    errors = compile_together(calls(architecture))
    if errors:
        raise SystemExit(f"gpu.py: {len(errors)} steps failed: {errors[0]!r}") from errors[0]
    _delete_intermediate_code(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(
        f"{compiled_kernels(folder)} kernels for {architecture}, {size / 1e6:.1f} MB, "
        f"{time.monotonic() - started:.0f} s, with Triton {triton.__version__}"
    )


def use_kernels(folder: Path) -> None:
    """Let this process and its children use the kernels in a folder, which may have been moved.

    Triton's lists of a kernel's files hold absolute paths, so they are written again.
    """
    for group in folder.resolve().glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        found = {name: str(group.parent / name) for name in names}
        group.write_text(json.dumps({"child_paths": found}))
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())


def _delete_intermediate_code(folder: Path) -> None:
    """Keep only what a launch needs: the binary and its description, a sixth of the bytes."""
    for kind in ("source", "ttir", "ttgir", "llir", "ptx", "amdgcn"):
        for path in folder.glob(f"*/*.{kind}"):
            path.unlink()


def compiled_kernels(folder: Path) -> int:
    """Return the number of kernels in a folder of compiled kernels."""
    return sum(1 for kind in ("cubin", "hsaco") for _ in folder.glob(f"*/*.{kind}"))


def calls(architecture: str) -> Iterator[Callable[[], Any]]:
    """Yield the steps of all models that warm-ups and loads run, on tensors without memory."""
    processors = _PROCESSORS.get(architecture, 132)
    tiles = TILES[architecture]

    def backend(**changes: Any) -> TritonBackend:
        target = Target(architecture, processors, replace(tiles, **changes))
        return TritonBackend(META, torch.bfloat16, target)

    # Profiles, and one of the checks, run without programmatic launch.
    for other in {tiles.programmatic_launch, False}:
        yield from _calls_of(backend(programmatic_launch=other))
    # What `check_fusions` tries: norms fused for more rows.
    limits = {"fused_qkv": 64, "fused_gate_up": 64}
    for fused_mlp in (0, 64):
        ops = backend(**limits, fused_mlp=fused_mlp)
        for name in MODELS:
            config = named_config(name)
            model = _model(replace(config, layers=config.layers[:2]), ops)
            yield from (partial(_step, model, ops, [1] * rows) for rows in _CHECK_ROWS)
            yield from _layer_calls(model, ops)
    if backend().target.fp8 is not None:
        ops = TritonBackend(META, torch.bfloat16, backend().target, kv_dtype="fp8")
        for name in MODELS:
            config = named_config(name)
            model = _model(replace(config, layers=config.layers[:2]), ops)
            for lengths in ([1], [1] * 3, [1] * 64, [1] * 256, [_CHUNK]):
                yield partial(_step, model, ops, lengths)
            yield from _layer_calls(model, ops)
    yield from _small_calls(architecture)
    yield from _tiny_calls(architecture)


def _calls_of(ops: TritonBackend) -> Iterator[Callable[[], Any]]:
    configs = [(named_config(name), largest) for name, largest in MODELS.items()]
    for config, largest in [*configs, (_embedded(), 256)]:
        config = replace(config, layers=config.layers[:2])  # one of each kind
        model = _model(config, ops)
        sizes = {size for most in (256, largest) for size in capture_sizes(most)}
        for rows in sizes.union(_CHECK_ROWS):
            yield partial(_step, model, ops, [1] * rows)
        for tokens in (1 << power for power in range(1, _MAX_TOKENS.bit_length())):
            yield partial(_step, model, ops, [tokens])
        yield partial(_step, model, ops, [_MAX_TOKENS // largest] * largest)


def _embedded() -> ModelConfig:
    """The config of the model in data/, whose score is checked."""
    folder = Path(__file__).resolve().parent.parent.parent / "data" / "model"
    return parse_config(json.loads((folder / "config.json").read_text()), "embedded")


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _model(config: ModelConfig, ops: TritonBackend) -> Transformer:
    """Return the model with weights in the form that the kernels read, without memory."""
    model = Transformer(config)
    for parameter in model.parameters():
        holder, shape = parameter.holder, parameter.shape
        if isinstance(holder, Experts) and parameter.format is not None:
            value: Any = _experts(shape, holder.format == MXFP4, ops)
        else:
            dtype = torch.float32 if parameter.is_float32 else ops.dtype
            value = _empty(*shape, dtype=dtype)
        setattr(holder, parameter.attribute, value)
    if config.tie_word_embeddings:
        model.head.weight = model.embedding
    model.prepare_rope(16, META)
    return model


def _experts(shape: tuple[int, ...], is_mxfp4: bool, ops: TritonBackend) -> Any:
    if not is_mxfp4:
        return ops.pack_experts(_empty(*shape, dtype=ops.dtype))
    count, outputs, inputs = shape
    shape = words_shape(outputs, inputs, ops.target.mxfp4_rows)
    values = _empty(count, *shape, dtype=torch.int32)
    scales = _empty(count, -(-inputs // 128), outputs, dtype=torch.int32)
    return ExpertWeights(values, scales, ops.target.mxfp4_run)


def _step(model: Transformer, ops: TritonBackend, lengths: list[int]) -> None:
    """Run a step of sequences with these numbers of new tokens, and sample all of them."""
    config, tokens, rows = model.config, sum(lengths), len(lengths)
    ids, lens = _empty(tokens, dtype=torch.int64), _empty(rows, dtype=torch.int32)
    tables = GroupTables(_empty(rows, 512, dtype=torch.int32), ids)
    # Each layer has its own group here, which makes no difference to kernels.
    groups = tuple(tables for _ in config.layers)
    singles = sum(length == 1 for length in lengths)
    starts, last = _empty(rows + 1, dtype=torch.int32), _empty(rows, dtype=torch.int64)
    batch = ForwardBatch(ids, ids, lengths, lengths, singles, groups, last, starts, lens)
    shape = 2, 4096, _BLOCK, config.num_kv_heads, config.head_dim
    caches = [ops.empty_cache(shape) for _ in config.layers]
    logits = model(ops, batch, caches, [(i, i) for i in range(len(config.layers))])
    row, parameters = _empty(rows, dtype=torch.int64), _empty(rows, 2, dtype=torch.int64)
    sampling = SamplingTables(parameters.float(), parameters)
    ops.sample_rows(logits, row, row)
    for positions in (row, lens):  # of steps that are computed, and of captured ones
        ops.sample_rows(logits, row, row, positions, sampling)


def _layer_calls(model: Transformer, ops: TritonBackend) -> Iterator[Callable[[], Any]]:
    """Yield what the cases of `model.checks` run but no step does, since it is part of a fusion:
    QKV behind a sum that is not left to the norm, and the router without a norm.
    """
    layer = model.layers[0]
    attention = layer.attention
    assert isinstance(attention, Attention)  # of the models that are compared
    heads = attention.heads
    kv = ops.empty_cache((2, 4096, _BLOCK, heads.kv_heads, heads.head_dim))
    for rows in _CHECK_ROWS:
        x = _empty(rows, model.config.hidden_size)
        slots = _empty(rows, dtype=torch.int64)
        cos_sin = _empty(rows, model.config.rotary_dim, dtype=torch.float32)
        rope = RopeArgs(heads, cos_sin, kv, slots)
        yield partial(ops.norm_qkv, x.float(), x, attention.norm, attention.qkv, rope)
        if isinstance(layer.mlp, Moe):
            yield partial(ops.logits, x, layer.mlp.router, 1)


def _tiny_calls(architecture: str) -> Iterator[Callable[[], Any]]:
    """Yield the steps of the tiny models that are compared with the CPU, in float32."""
    from tests.checkpoints import FAMILIES

    target = Target(architecture, 132, TILES[architecture])
    ops = TritonBackend(META, torch.float32, target)
    packed = FAMILIES["gpt_oss-wide"]().to_dict() | _IS_MXFP4
    families = {name: make().to_dict() for name, make in FAMILIES.items()} | {"mxfp4": packed}
    for name, given in families.items():
        model = _model(parse_config(given, name), ops)
        for rows in (1, 2, 4):
            yield partial(_step, model, ops, [1] * rows)
        for tokens in (1 << power for power in range(1, 10)):
            yield partial(_step, model, ops, [tokens])


def _small_calls(architecture: str) -> Iterator[Callable[[], Any]]:
    """Yield the cases of operations whose inputs are small enough for a CPU."""
    target = Target(architecture, 132, TILES[architecture])
    ops = TritonBackend(torch.device("cpu"), torch.bfloat16, target)
    for name in MODELS:
        for case in cases(named_config(name), ops.device, ops.dtype, operations=_SMALL, size=FULL):
            yield case.prepare(ops)
