"""What a run needs of memory, how much there is, and whether a failure was for want of it.

What there is counts on the device and under the limits of a container.
"""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import EngineError
from engine.kv_cache import group_layers
from model import ModelConfig
from model.cost.operations import parameter_bytes

# A logit where every row is sorted in full to find its nucleus: float32, sorted float32 values and
# int64 ids, three float64 rows of shares at once, masks. As `sampler.sample` does it.
_SAMPLING_BYTES = 48

# A request that may run, besides its block tables: parameters, its row in lists of Python's.
_ROW_BYTES = 200


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run needs besides its KV cache, at the largest step there can be.

    What the CPU's attention gathers of a layer's KV is not in it: it grows with the lengths that
    requests reach, and `is_out_of_memory` is there for it.
    """

    weights: int
    activations: int
    logits: int
    rows: int = 0  # block tables and parameters, of as many requests as may run

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        max_batch_size: int,
        max_batch_tokens: int,
        ranks: int = 1,
        block_size: int = 16,
    ) -> "MemoryPlan":
        """From shapes alone, so that it is known before the weights are read.

        config: as the weights are held (`Engine.held_config`). Of several ranks what rank 0 needs,
        which has everyone's logits.
        """
        item, on_cpu = dtype.itemsize, device.type == "cpu"
        weights = parameter_bytes(config, str(dtype).removeprefix("torch."), ranks)
        if on_cpu and dtype == torch.bfloat16 and config.tie_word_embeddings:
            head = config.vocab_size * config.hidden_size * item  # packed, besides the embedding
            weights += head // ranks
        weights += 4 * config.max_positions * config.head_dim  # the rotary table
        rows = min(max_batch_size, max_batch_tokens)
        groups = len(group_layers([layer.window for layer in config.layers]))
        table = 4 * -(-config.max_positions // block_size)
        tables = (2 * groups + 1 if on_cpu else groups) * table  # on a GPU others are the host's
        return cls(
            weights,
            max_batch_tokens * _activation_bytes(config, item, ranks),
            rows * config.vocab_size * (item * (3 if ranks > 1 else 1) + _SAMPLING_BYTES),
            max_batch_size * (tables + _ROW_BYTES),
        )

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.activations + self.logits + self.rows

    def shortage(
        self, kv: int, kv_given: bool, available: int, device: torch.device, dtype: torch.dtype
    ) -> EngineError | None:
        """The error, with the arithmetic, if with `kv` bytes of KV cache the plan does not fit."""
        needed = self.total + kv
        if needed <= available:
            return None
        if self.weights >= available:
            advice = "use a smaller model"
            if dtype == torch.float32:
                advice += " or {dtype} bfloat16"
        elif kv_given and self.total < available:
            advice = "lower {kv_memory} to {left} or less"
        elif self.total < available:
            advice = "lower {block_size}: this KV cache is a block or two"
        else:
            advice = (
                "lower {max_batch_tokens} (activations) or {max_batch_size} (logits, block tables)"
            )
        return EngineError(
            "not enough memory on {where}: weights {weights} + KV cache {at_least}{kv} + "
            "activations {activations} + logits {logits} + block tables {rows} = {needed}, but "
            "only {available} are available; " + advice,
            where=device,
            weights=size(self.weights),
            at_least="" if kv_given else "at least ",
            kv=size(kv),
            activations=size(self.activations),
            logits=size(self.logits),
            rows=size(self.rows),
            needed=size(needed),
            available=size(available),
            left=size(available - self.total),
        )


def size(count: int) -> str:
    """Bytes for people, such as "1.50GiB": rounded down, and in the form that options take."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count * 100 // unit / 100:.2f}{name}"
    return f"{count}B"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that an allocation failed, in any of the ways there are."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _activation_bytes(config: ModelConfig, item: int, ranks: int) -> int:
    """Of one token, at the widest place of a layer; what a step makes is freed as it goes."""
    hidden, moe = config.hidden_size, config.moe
    query = config.num_heads // ranks * config.head_dim
    key = max(1, config.num_kv_heads // ranks) * config.head_dim
    # The stream and its norm; then QKV and what is rotated, attention's result and its projection.
    attention = item * (2 * hidden + 2 * (query + 2 * key) + query + hidden)
    mlp = 0
    if any(not layer.sparse for layer in config.layers):
        mlp = item * (
            3 * hidden + 4 * config.intermediate_size // ranks
        )  # gate and up, and two of a half
    if moe is not None:
        pair = item * (2 * hidden + 4 * moe.intermediate_size) + 2 * 4 * hidden  # float32 sums
        mlp = max(mlp, item * 3 * hidden + moe.top_k * pair)
    return max(attention, mlp)


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_meminfo_available(), *_cgroup_available(), _limit_available()]
    return min((value for value in found if value is not None), default=4 << 30)


def _meminfo_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:  # not Linux: all of the physical memory is the best guess
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _limit_available() -> int | None:
    """What `ulimit -v` leaves, where it is set."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        return None
    return max(0, limit - pages * os.sysconf("SC_PAGE_SIZE"))


def _cgroup_available() -> list[int]:
    """What the control group leaves, where a limit is set (cgroup v2, then v1)."""
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
