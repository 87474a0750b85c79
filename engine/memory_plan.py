"""The memory of a run: needed, available, and left for the KV cache.

Available memory respects the limits of a container (cgroup) and of a shell (ulimit).
"""

import os
import resource
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.errors import EngineError
from engine.execution.chunk_graphs import MAX_CHUNK_TOKENS
from engine.resolve import Settings, dtype_name
from engine.scheduling.kv_cache import group_layers
from model import ModelConfig
from model.cost.operations import parameter_bytes
from model.formats import DENSE, WeightFormat, full_interface
from model.ops.backend import choose_backend
from model.ops.cpu.bindings import library

# Bytes for each logit of a row that is sampled by sorting it in full: scaled logits, sorted
# float32 values and int64 ids, three float64 rows of probabilities at once, and masks.
_SAMPLING_BYTES = 48

# Host bytes for each request that may run, besides its block tables: sampling parameters, and its
# entries in Python lists.
_ROW_BYTES = 200

# The KV cache's share of the memory that is left after loading. On a CPU other processes need
# memory, too; blocks that are never used cost nothing there.
_KV_SHARE = {"cpu": 0.4, "cuda": 0.9}


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

    @classmethod
    def of(cls, settings: Settings) -> "MemoryPlan":
        """The needs of rank 0, which gathers the logits of all ranks.

        Computed from shapes alone, so that they are known before the weights are read.
        """
        config, ranks, on_cpu = settings.model, settings.tensor_parallel, settings.on_cpu
        item = settings.dtype.itemsize
        weights = parameter_bytes(config, dtype_name(settings.dtype), ranks)
        if on_cpu and settings.dtype == torch.bfloat16:
            # The head is packed, besides an embedding that it is tied to; torch's is float32.
            # A head in fewer bits is counted with the weights, unless it is tied.
            size = config.vocab_size * config.hidden_size
            head = full_interface(config.head_format)
            stored = head.bytes((config.vocab_size, config.hidden_size), item)
            packed = stored if library() is not None else 4 * size
            more = packed if config.tie_word_embeddings else packed - stored
            weights += more // ranks
        rotary_rows = sum(rope.table_rows(config.max_positions) for rope in config.ropes)
        weights += 4 * rotary_rows * config.rotary_dim
        rows = min(settings.max_batch_size, settings.max_batch_tokens)
        groups = len(group_layers([layer.window for layer in config.layers]))
        table = 4 * -(-config.max_positions // settings.block_size)
        # A CPU holds each table twice. A GPU's captured steps have up to four tables a row in all;
        # its host copies are not in the device's memory.
        tables = (2 * groups + 1 if on_cpu else 4 * groups) * table
        return cls(
            weights=weights,
            activations=settings.max_batch_tokens * _activation_bytes(config, item, ranks),
            logits=rows * config.vocab_size * (4 * (3 if ranks > 1 else 1) + _SAMPLING_BYTES),
            rows=settings.max_batch_size * (tables + _ROW_BYTES),
        )

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.activations + self.logits + self.rows

    def measured(self, step_bytes: int, end_bytes: int, settings: Settings) -> "MemoryPlan":
        """The plan with what a GPU's largest steps allocated in place of estimates.

        step_bytes: of the largest step; end_bytes: the logits of a captured step, and what sampling
        them allocates. Captured steps have both in memory of their own, as well as activations.
        """
        tokens = settings.max_batch_size + min(MAX_CHUNK_TOKENS, settings.max_batch_tokens)
        captured = self.activations * tokens // settings.max_batch_tokens
        return replace(self, activations=step_bytes + captured, logits=end_bytes)


@dataclass(frozen=True)
class BlockCost:
    """The memory cost of the KV cache's blocks."""

    groups: int  # layer groups, each with its own block tables
    block_bytes: int

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
    else:
        advice = "lower {max_batch_tokens} (activations) or {max_batch_size} (logits, block tables)"
    raise EngineError(
        "not enough memory on {where}: weights {weights} + KV cache {at_least}{kv} + "
        "activations {activations} + logits {logits} + block tables {rows} = {needed}, but "
        "only {available} are available; " + advice,
        where=settings.device,
        weights=format_bytes(plan.weights),
        at_least="" if given else "at least ",
        kv=format_bytes(kv),
        activations=format_bytes(plan.activations),
        logits=format_bytes(plan.logits),
        rows=format_bytes(plan.rows),
        needed=format_bytes(needed),
        available=format_bytes(available),
        left=format_bytes(available - plan.total),
    )


def _activation_bytes(config: ModelConfig, item: int, ranks: int) -> int:
    """Activation bytes of one token where a layer needs the most; tensors are freed after use."""
    hidden, moe = config.hidden_size, config.moe
    query = config.num_heads // ranks * config.head_dim
    key = max(1, config.num_kv_heads // ranks) * config.head_dim
    # The residual stream, float32; then its norm; QKV before and after rotary; attention's output
    # and its projection.
    stream = 4 * hidden
    attention = item * (hidden + 2 * (query + 2 * key) + query + hidden)
    latent = config.latent
    if latent is not None:
        # Latents of queries, the queries before and after their products, and the results of heads.
        heads = config.num_heads // ranks
        width = 2 * latent.plain_dim + 2 * config.rotary_dim + 2 * latent.rank + latent.value_dim
        attention = item * (2 * hidden + 2 * (latent.query_rank or 0) + 2 * key + heads * width)
    mlp = 0
    if any(not layer.sparse for layer in config.layers):
        # Gate and up in one tensor, then two tensors of half its size.
        mlp = item * (2 * hidden + 4 * config.intermediate_size // ranks)
    if moe is not None:
        pair = item * (2 * hidden + 4 * moe.intermediate_size) + 2 * 4 * hidden  # float32 sums
        shared = item * (2 * hidden + 4 * moe.shared_size // ranks) if moe.shared_size else 0
        mlp = max(mlp, item * 2 * hidden + moe.router.top_k * pair + shared)
    return 2 * stream + max(attention, mlp)  # twice: before and after the addition


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error reports a failed allocation, in any of torch's or Python's forms."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def dequantization_notice(checkpoint: Path, config: ModelConfig, settings: Settings) -> str:
    """What a user should know of weights that have no kernel here; empty if all have one.

    config: of the checkpoint, in whose files they are smaller than they will be in memory.
    """
    backend, kept = choose_backend(settings.device, settings.dtype), set[WeightFormat]()
    for layer in settings.model.layers:
        forms = layer.formats
        kept |= {forms.qkv, forms.out, forms.gate_up, forms.down, forms.experts} - {DENSE}
    names = dict.fromkeys(
        form.name
        for form in config.stored_formats.formats
        if not kept & {form.held(backend, stacked=stacked) for stacked in (False, True)}
    )
    if not names:
        return ""
    dtype = dtype_name(settings.dtype)
    needed = format_bytes(parameter_bytes(settings.model, dtype))
    files = [checkpoint] if checkpoint.is_file() else checkpoint.glob("*.safetensors")
    stored = sum(file.stat().st_size for file in files)
    text = (
        f"the weights in {' and '.join(names)} are dequantized to {dtype} when they are loaded,"
        f" because there is no kernel for them on {settings.device.type}: the weights take {needed}"
        f"{f' instead of {format_bytes(stored)}' if stored else ''}"
    )
    activations = config.stored_formats.activations
    if activations:
        text += f"; activations stay in {dtype} instead of {activations}, which is more precise"
    return text


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


def _cgroup_available() -> list[int]:
    """Bytes that the control group leaves, if it has a limit (cgroup v2, then v1)."""
    root = Path("/sys/fs/cgroup")
    found = []
    for limit, used in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(max(0, int(limit.read_text()) - int(used.read_text())))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return found
