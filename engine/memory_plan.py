"""The memory of a run: needed, available, and left for the KV cache.

Available memory respects the limits of a container (cgroup) and of a shell (ulimit).
"""

import contextlib
import os
import resource
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.errors import EngineError
from engine.execution.adjustments import adjustment_bytes
from engine.execution.chunk_graphs import MAX_CHUNK_TOKENS
from engine.execution.kv_tensors import KvLayout
from engine.resolve import Settings, dtype_name
from model import ModelConfig
from model.config import QUANTIZED
from model.cost.operations import parameter_bytes
from model.cost.workload import state_bytes
from model.formats import DENSE, HEAD, WeightFormat, full_interface
from model.formats.dense import Dequantized
from model.gguf import read_gguf
from model.ops.backend import choose_backend
from model.ops.cpu.bindings import library
from model.ops.cpu.topology import cgroups
from model.transformer import Layer

# Bytes for each logit of a row that is sampled by sorting it in full: scaled logits, sorted
# float32 values and int64 ids, three float64 rows of probabilities at once, and masks.
_SAMPLING_BYTES = 48

# Host bytes for each request that may run, besides its block tables: sampling parameters, and its
# entries in Python lists.
_ROW_BYTES = 200

# The KV cache's share of the memory that is left after loading. On a CPU other processes need
# memory, too; blocks that are never used cost nothing there.
_KV_SHARE = {"cpu": 0.4, "cuda": 0.9}
_SNAPSHOT_SHARE = 0.05  # of that memory, for the states of cached prefixes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run needs besides its KV cache, at the largest step that can occur.

    On a CPU, attention also gathers a part of one layer's KV. That is not included, because it
    grows with the lengths that requests reach; a step that fails for it is repeated in parts.
    """

    weights: int
    activations: int
    logits: int
    rows: int = 0  # block tables and parameters of `max_batch_size` requests
    states: int = 0  # of recurrent layers, for as many requests, and their snapshots

    @classmethod
    def of(cls, settings: Settings) -> "MemoryPlan":
        """The needs of rank 0, which gathers the logits of all ranks.

        Computed from shapes alone, so that they are known before the weights are read.
        """
        config, ranks, on_cpu = settings.model, settings.tensor_parallel, settings.on_cpu
        item = settings.dtype.itemsize
        weights = parameter_bytes(config, dtype_name(settings.dtype), ranks)
        if on_cpu and settings.dtype == torch.bfloat16 and config.head_format == HEAD:
            # The head is packed, besides an embedding that it is tied to; torch's is float32.
            head = item * config.vocab_size * config.hidden_size
            packed = head if library() is not None else 2 * head
            more = packed if config.tie_word_embeddings else packed - head
            weights += more // ranks
        weights += sum(
            4 * rope.table_rows(config.max_positions) * rotary_dim
            for rope, rotary_dim in config.ropes
        )
        rows = min(settings.max_batch_size, settings.max_batch_tokens)
        stored = torch.int8 if config.kv_dtype == "int8" else settings.dtype  # int8 has scales
        groups = len(KvLayout.of(config, ranks, stored).groups)
        table = 4 * -(-config.max_positions // settings.block_size)
        # A CPU holds each table twice. A GPU's captured steps have up to four tables a row in all;
        # its host copies are not in the device's memory.
        tables = (2 * groups + 1 if on_cpu else 4 * groups) * table
        # On a CPU only requests that change logits touch the memory for it.
        row_bytes = _ROW_BYTES + (0 if on_cpu else adjustment_bytes(config.vocab_size))
        return cls(
            weights=weights,
            activations=settings.max_batch_tokens * _activation_bytes(config, item, ranks),
            logits=rows * config.vocab_size * (4 * (3 if ranks > 1 else 1) + _SAMPLING_BYTES),
            rows=settings.max_batch_size * (tables + row_bytes),
            states=(settings.max_batch_size + 1) * state_bytes(config, item, ranks),
        )

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.activations + self.logits + self.rows + self.states

    def measured(self, step_bytes: int, end_bytes: int, settings: Settings) -> "MemoryPlan":
        """The plan with what a GPU's largest steps allocated in place of estimates.

        step_bytes: of the largest step; end_bytes: the logits of a captured step, and what sampling
        them allocates. Captured steps have both in memory of their own, as well as activations.
        """
        step_bytes = max(0, step_bytes - self.states)  # which the step allocates, too
        tokens = settings.max_batch_size + min(MAX_CHUNK_TOKENS, settings.max_batch_tokens)
        captured = self.activations * tokens // settings.max_batch_tokens
        return replace(self, activations=step_bytes + captured, logits=end_bytes)


@dataclass(frozen=True)
class BlockCost:
    """The memory cost of the KV cache's blocks."""

    groups: int  # layer groups, each with its own block tables
    block_bytes: int
    state_bytes: int = 0  # of a sequence in all recurrent layers

    @property
    def min_bytes(self) -> int:
        """The smallest useful KV cache: a block for each group, and the null block."""
        return (self.groups + 1) * self.block_bytes


def check_before_loading(
    plan: MemoryPlan, cost: BlockCost, settings: Settings, available: int
) -> None:
    """Raise EngineError if the run cannot fit into `available` bytes, or its KV cache is tiny."""
    least, given = cost.min_bytes, settings.kv_memory
    if given is not None and given < least:
        raise EngineError(
            "{kv_memory} {given} means {given} bytes, which hold {blocks} blocks of {block} bytes; "
            "use at least {least} bytes, or lower {block_size}",
            given=given,
            blocks=given // cost.block_bytes,
            block=cost.block_bytes,
            least=least,
        )
    _check(plan, max(least, given or 0), settings, available)


def pool_blocks(plan: MemoryPlan, cost: BlockCost, settings: Settings, available: int) -> int:
    """Blocks of the KV cache once the weights are loaded, the null block included.

    As many as `available` bytes allow, but no more than the largest batch can use. Raises
    EngineError if that is too few for any request.
    """
    if settings.kv_memory is not None:
        return settings.kv_memory // cost.block_bytes
    needs = replace(plan, weights=0)
    _check(needs, cost.min_bytes, settings, available)
    share = _KV_SHARE[settings.device.type]
    affordable = max(cost.min_bytes, int((available - needs.total) * share)) // cost.block_bytes
    per_sequence = -(-settings.model.max_positions // settings.block_size) * cost.groups
    useful = 2 * settings.max_batch_size * per_sequence  # twice: the rest keeps cached prefixes
    return 1 + min(affordable - 1, useful)


def snapshot_count(plan: MemoryPlan, cost: BlockCost, settings: Settings, available: int) -> int:
    """Snapshots of states that are kept for cached prefixes once the weights are loaded.

    At most one for each request that may run, within a share of the memory that is left.
    """
    left = available - replace(plan, weights=0).total
    return max(0, min(settings.max_batch_size, int(left * _SNAPSHOT_SHARE) // cost.state_bytes))


def _check(plan: MemoryPlan, kv: int, settings: Settings, available: int) -> None:
    """Raise EngineError, with the arithmetic, if plan and KV cache need more than `available`."""
    needed, given = plan.total + kv, settings.kv_memory is not None
    if needed <= available:
        return
    if plan.weights >= available:
        advice = "use a smaller model"
        if settings.dtype == torch.float32:
            advice += " or {dtype} bfloat16"
    elif given and plan.total < available:
        advice = "lower {kv_memory} to {left} or less"
    elif plan.total < available:
        advice = "lower {block_size}: even a few blocks do not fit"
    elif plan.states > plan.activations:
        advice = "lower {max_batch_size} (states of recurrent layers, logits, block tables)"
    else:
        advice = "lower {max_batch_tokens} (activations) or {max_batch_size} (logits, block tables)"
    raise EngineError(
        "not enough memory on {where}: {weights}KV cache {at_least}{kv} + "
        "activations {activations} + logits {logits} + block tables {rows}{states} = {needed}, but "
        "only {available} are available; " + advice,
        where=settings.device,
        weights=f"weights {format_bytes(plan.weights)} + " if plan.weights else "",
        at_least="" if given else "at least ",
        kv=format_bytes(kv),
        activations=format_bytes(plan.activations),
        logits=format_bytes(plan.logits),
        rows=format_bytes(plan.rows),
        states=f" + states {format_bytes(plan.states)}" if plan.states else "",
        needed=format_bytes(needed),
        available=format_bytes(available),
        left=format_bytes(available - plan.total),
    )


def _activation_bytes(config: ModelConfig, item: int, ranks: int) -> int:
    """Activation bytes of one token where a layer needs the most; tensors are freed after use."""
    hidden, moe = config.hidden_size, config.moe
    # The residual stream, float32; then its norm; QKV before and after rotary; attention's output
    # and its projection.
    stream, attention = 4 * hidden, 0
    for heads in {config.heads(layer) for layer in config.layers if not layer.recurrent}:
        query = config.num_heads // ranks * heads.head_dim
        key = max(1, heads.num_kv_heads // ranks) * heads.head_dim
        gate = 2 * query if config.output_gate else 0
        values = hidden + 2 * (query + 2 * key) + query + gate + hidden
        attention = max(attention, item * values)
    if config.delta_rule is not None:
        # Projections, the convolution's output, and the rule's before and after its norm.
        spec = config.delta_rule.part(ranks)
        width = spec.value_heads * spec.value_dim
        attention = max(attention, item * (2 * hidden + 2 * spec.channels + 3 * width))
    latent = config.latent
    if latent is not None:
        # Latents of queries, the queries before and after their products, and the results of heads.
        count = config.num_heads // ranks
        width = 2 * latent.plain_dim + 2 * config.rotary_dim + 2 * latent.rank + latent.value_dim
        latents = 2 * (latent.query_rank or 0) + 2 * config.head_dim
        attention = item * (2 * hidden + latents + count * width)
    mlp = 0
    sizes = [config.mlp_size(layer) for layer in config.layers if config.has_mlp(layer)]
    if sizes:
        # Gate and up in one tensor, then two tensors of half its size.
        mlp = item * (2 * hidden + 2 * config.activation.parts * max(sizes) // ranks)
    if moe is not None:
        pair = item * (2 * hidden + 4 * moe.intermediate_size) + 2 * 4 * hidden  # float32 sums
        shared = item * (2 * hidden + 4 * moe.shared_size // ranks) if moe.shared_size else 0
        beside = item * hidden if moe.beside_mlp else 0  # the result of the dense MLP
        mlp = max(mlp, item * 2 * hidden + moe.router.top_k * pair + shared + beside)
    own = config.per_layer_size * len(config.layers)  # what layers read besides the stream
    largest = 2 * stream + max(attention, mlp) + item * own  # twice: before and after the addition
    return max(largest, stream + item * hidden + (8 + 3 * item) * own)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error reports a failed allocation, in any of torch's or Python's forms."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def conversion_notice(checkpoint: Path, config: ModelConfig, settings: Settings) -> str:
    """What a user should know of weights that are not kept as they are stored; empty without any.

    config: of the checkpoint, in whose files they are smaller than they will be in memory.
    """
    backend, kept = choose_backend(settings.device, settings.dtype), _kept(settings.model)
    dtype, quantization = dtype_name(settings.dtype), settings.model.quantization
    to_other = f"converted to {quantization}" if quantization else f"dequantized to {dtype}"
    changes: dict[str, dict[str, None]] = {}
    for form in config.stored_formats.formats:
        change = to_other
        if kept & {form.held(backend, stacked=stacked) for stacked in (False, True)}:
            change = form.change if isinstance(form, Dequantized) else ""
        if change:
            changes.setdefault(change, {})[form.name] = None
    if not changes:
        return ""
    needed = format_bytes(parameter_bytes(settings.model, dtype))
    files = (
        read_gguf(checkpoint).files if checkpoint.is_file() else checkpoint.glob("*.safetensors")
    )
    stored = sum(file.stat().st_size for file in files)
    texts = (f"those in {' and '.join(names)} are {change}" for change, names in changes.items())
    text = (
        f"the weights{' and '.join(texts).removeprefix('those')} when they are loaded,"
        f" because there is no kernel for them on {settings.device.type}: the weights take {needed}"
        f"{f' instead of {format_bytes(stored)}' if stored else ''}"
    )
    activations = config.stored_formats.activations
    if activations:
        text += f"; activations stay in {dtype} instead of {activations}, which is more precise"
    return text


def quantization_notice(config: ModelConfig, settings: Settings) -> str:
    """Says that no weight of a layer becomes what was asked for; empty if one does.

    config: of the checkpoint.
    """
    name = settings.model.quantization
    if name is None or QUANTIZED[name] in _kept(settings.model):
        return ""
    stored = " and ".join(form.name for form in config.stored_formats.formats)
    return f"quantizing to {name} changes only the head: all other weights stay {stored}"


def _kept(model: ModelConfig) -> set[WeightFormat]:
    """Return the formats other than dense that the layers' weights have."""
    layers = (Layer(model, layer) for layer in set(model.layers))
    formats = {parameter.format for layer in layers for parameter in layer.parameters()}
    return {full_interface(form) for form in formats if form is not None} - {DENSE}


def format_bytes(count: int) -> str:
    """Bytes as text, such as "1.50GiB": rounded down, and valid as the value of a setting."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count * 100 // unit / 100:.2f}{name}"
    return f"{count}B"


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_meminfo_available(), *_cgroup_available(), _ulimit_available()]
    return min((value for value in found if value is not None), default=4 << 30)


def _meminfo_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:  # not Linux: all physical memory is the best estimate
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _ulimit_available() -> int | None:
    """Bytes that `ulimit -v` leaves; None if it is not set."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        return None
    return max(0, limit - pages * os.sysconf("SC_PAGE_SIZE"))


def _cgroup_available(root: Path = Path("/")) -> list[int]:
    """Bytes that each cgroup of this process with a limit leaves (version 2 or 1).

    Cached files count as used there, although those that are not in use are dropped when needed.
    """
    found = []
    for folder in cgroups("memory", root):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
            except (OSError, ValueError):  # no such file, or "max"
                continue
            with contextlib.suppress(OSError, ValueError):
                fields = (folder / "memory.stat").read_text().split()
                left += int(fields[fields.index(cached) + 1])
            found.append(max(0, left))
    return found
