"""The kernels of `kernels.cpp`: finding the library, calling it, weights in its layout.

The library is built when getp is installed, if there is a compiler. Which of its instruction sets
runs is chosen here, by the processor or by the environment variable GETP_CPU_KERNELS.
"""

import ctypes
import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from model.batch import ForwardBatch, GroupTables
from model.ops.reference import MXFP4_BLOCK, Mxfp4

VARIABLE = "GETP_CPU_KERNELS"
LEVELS = ("none", "avx2", "avx512", "amx")
"""Values of the variable: torch alone, AVX2 (other architectures: the compiler's vectors), AVX-512
with BF16, and that with AMX."""

PANEL = 32  # outputs; as in kernels.cpp
MAX_HEAD_DIM = 256
_LARGEST_SCALE = 250  # with it 6, the largest value of FP4, is within bf16's range

_Pointer, _Int, _Flag, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "pack": (_Pointer, _Int, _Int, _Int, _Pointer, _Int, _Int, _Flag),
    "pack_mxfp4": (*[_Pointer] * 2, *[_Int] * 3, *[_Pointer] * 2, _Int, _Flag),
    "linear": (*[_Pointer] * 2, _Int, _Pointer, _Flag),
    "add_rms_norm": (*[_Pointer] * 3, *[_Int] * 2, _Float, *[_Pointer] * 2, _Flag),
    "rotate_and_write": (
        *[_Pointer] * 3, _Int, *[_Pointer] * 3, _Float, *[_Int] * 4, _Pointer, _Flag,
    ),
    "attention": (
        *[_Pointer] * 2, _Int, _Pointer, _Int, *[_Pointer] * 3, *[_Int] * 6, _Pointer, _Flag,
    ),
    "gated_linear": (*[_Pointer] * 2, _Int, _Flag, *[_Float] * 2, _Pointer, _Flag),
    "route": (_Pointer, *[_Int] * 3, *[_Flag] * 2, *[_Pointer] * 2),
    "experts_up": (
        _Pointer, _Int, _Pointer, _Int, _Pointer, _Int, _Flag, *[_Float] * 2, _Pointer, _Flag,
    ),
    "experts_down": (
        _Pointer, _Int, _Pointer, _Int, *[_Pointer] * 2, _Int, _Pointer, _Flag,
    ),
}  # fmt: skip


class _Weight(ctypes.Structure):
    _fields_ = [
        ("data", _Pointer), ("scales", _Pointer), ("bias", _Pointer),
        ("outputs", _Int), ("inputs", _Int),
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the kernels, ready to be called; None where they cannot be, said once and why."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in LEVELS:
        raise ValueError(f"{VARIABLE} must be {', '.join(LEVELS)}, not {wanted!r}")
    if wanted == "none":
        return None
    files = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not files:
        _say("they were not built: `pip install -e .` with a C++ compiler builds them")
        return None
    try:
        _share_openmp()
        found = ctypes.CDLL(str(files[0]))
    except OSError as error:
        _say(f"{files[0].name} does not load ({error}); install again to build it anew")
        return None
    best: int = found.getp_best_level()
    if wanted and LEVELS.index(wanted) > best:
        raise ValueError(f"{VARIABLE} is {wanted}, and this processor has {LEVELS[best]} at most")
    if not best:
        _say("they need AVX2, which this processor lacks")
        return None
    found.getp_use_level(LEVELS.index(wanted) if wanted else best)
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, f"getp_{name}")
        function.argtypes, function.restype = arguments, None
    return found


def _say(reason: str) -> None:
    warnings.warn(f"slower without the native CPU kernels: {reason}", stacklevel=3)


def _share_openmp() -> None:
    """Make torch's OpenMP runtime visible to the kernels, which are linked to none.

    Two runtimes in one process would each keep threads spinning against the other's.
    """
    names = ("libgomp", "libiomp5", "libomp")
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    loaded = {line.split()[-1] for line in lines if Path(line.split()[-1]).name.startswith(names)}
    ctypes.CDLL(min(loaded) if loaded else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


class Packed:
    """Weights [outputs, inputs], or a stack of them, in the layout of the kernels.

    Filled by rows: `weight[first:last].copy_(source)`, `weight[expert][first:last].copy_(source)`,
    from any float tensor or, if it is MXFP4, from MXFP4. A scale out of range raises ValueError.
    """

    def __init__(self, data: torch.Tensor, scales: torch.Tensor | None, shape: tuple[int, ...]):
        self.shape = shape
        self.inputs = shape[-1]
        self._data, self._scales = data, scales
        self._bias: torch.Tensor | None = None
        self._structs: ctypes.Array[_Weight] | None = None

    @classmethod
    def empty(cls, shape: Sequence[int], mxfp4: bool) -> "Packed":
        """Storage for weights of a shape whose last two are outputs and inputs."""
        *stack, outputs, inputs = shape
        panels = (*stack, -(-outputs // PANEL))
        if not mxfp4:
            data = torch.empty(*panels, inputs // 2, PANEL, 2, dtype=torch.bfloat16)
            if outputs % PANEL:
                data[..., -1, :, :, :] = 0  # outputs that nobody will write
            return cls(data, None, tuple(shape))
        groups = inputs // MXFP4_BLOCK
        data = torch.empty(*panels, groups, 512, dtype=torch.uint8)
        scales = torch.empty(*panels, groups, PANEL, dtype=torch.uint8)
        if outputs % PANEL:
            data[..., -1, :, :], scales[..., -1, :, :] = 0, 127
        return cls(data, scales, tuple(shape))

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._data.device

    def __len__(self) -> int:
        """Return the number of stacked weights, or of outputs."""
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> "Packed | _Rows":
        """Return one weight of a stack, or some rows of a single one, to be filled."""
        if isinstance(index, slice):
            return _Rows(self, *index.indices(self.shape[0]))
        scales = None if self._scales is None else self._scales[index]
        return Packed(self._data[index], scales, self.shape[1:])

    def copy_(self, source: torch.Tensor | Mxfp4) -> None:
        """Fill all of a single weight."""
        _Rows(self, 0, self.shape[0], 1).copy_(source)

    def random_(self, generator: torch.Generator) -> None:
        """Fill with random values of a usual size."""
        if self._scales is None:
            self._data.uniform_(-0.03, 0.03, generator=generator)
        else:
            self._data.random_(0, 256, generator=generator)
            self._scales.fill_(120)  # values of up to 6 · 2⁻⁷

    def structs(self, bias: torch.Tensor | None) -> "ctypes.Array[_Weight]":
        """Describe the weights to the kernels, with a bias [outputs] or [stack, outputs]."""
        if self._structs is None or bias is not self._bias:
            count = self.shape[0] if len(self.shape) == 3 else 1
            made = (_Weight * count)()
            for i, struct in enumerate(made):
                struct.data = _at(self._data, i, count)
                struct.scales = None if self._scales is None else _at(self._scales, i, count)
                struct.bias = None if bias is None else _at(bias, i, count)
                struct.outputs, struct.inputs = self.shape[-2:]
            self._structs, self._bias = made, bias
        return self._structs


def _at(stack: torch.Tensor, index: int, count: int) -> int:
    return stack.data_ptr() + index * (stack.numel() // count) * stack.element_size()


class _Rows:
    """Rows [first, last) of a weight that is being filled."""

    def __init__(self, weight: Packed, first: int, last: int, step: int):
        assert step == 1
        self._weight, self._first, self._count = weight, first, last - first

    def copy_(self, source: torch.Tensor | Mxfp4) -> None:
        """Take the rows from a source [rows, inputs] of any strides."""
        weight, threads = self._weight, torch.get_num_threads()
        kernels = _kernels()
        if isinstance(source, Mxfp4):
            codes, scales = source.blocks, source.scales
            if int(scales.max()) > _LARGEST_SCALE:
                raise ValueError(f"an MXFP4 scale is above 2^{_LARGEST_SCALE - 127}")
            step = codes.stride(0) // (codes.shape[1] * codes.shape[2])
            assert weight._scales is not None
            kernels.getp_pack_mxfp4(
                weight._data.data_ptr(), weight._scales.data_ptr(), weight.inputs, self._first,
                self._count, codes.data_ptr(), scales.data_ptr(), step, threads,
            )  # fmt: skip
            return
        source = source.to(torch.bfloat16)
        kernels.getp_pack(
            weight._data.data_ptr(), weight.inputs, self._first, self._count,
            source.data_ptr(), source.stride(0), source.stride(1), threads,
        )  # fmt: skip


def _kernels() -> ctypes.CDLL:
    kernels = library()
    assert kernels is not None  # who calls has asked
    return kernels


def linear(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """As reference.linear."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    _kernels().getp_linear(
        weight.structs(bias), x.data_ptr(), x.shape[0], out.data_ptr(), torch.get_num_threads()
    )
    return out


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.add_rms_norm, for a size that 16 divides."""
    normed = torch.empty_like(x)
    summed = x if delta is None else torch.empty_like(x)
    _kernels().getp_add_rms_norm(
        x.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(), *x.shape,
        eps, summed.data_ptr(), normed.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return summed, normed


def rotate_and_write(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
    heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """As reference.rotate_and_write, for heads whose size 32 divides."""
    tokens, _, head_dim = qkv.shape
    query = qkv.new_empty(tokens, heads, head_dim)
    q_norm, k_norm = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
    _kernels().getp_rotate_and_write(
        qkv.data_ptr(), cos_sin.data_ptr(), kv.data_ptr(), kv.stride(0), slots.data_ptr(),
        q_norm, k_norm, eps, tokens, heads, kv.shape[3], head_dim, query.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return query


def attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    batch: ForwardBatch,
    group: GroupTables,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As reference.attention, for heads whose size 32 divides; reads the pages where they are."""
    out = torch.empty_like(query)
    _, heads, head_dim = query.shape
    table = group.block_table
    _kernels().getp_attention(
        query.data_ptr(), kv.data_ptr(), kv.stride(0), table.data_ptr(), table.stride(0),
        batch.query_starts.data_ptr(), batch.seen.data_ptr(),
        None if sinks is None else sinks.data_ptr(), table.shape[0], heads, kv.shape[3], head_dim,
        kv.shape[2], group.window or 0, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def gated_linear(
    x: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    limit: float | None,
    alpha: float,
) -> torch.Tensor:
    """As reference.gated_linear, for a size that 32 divides."""
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    _kernels().getp_gated_linear(
        weight.structs(bias), x.data_ptr(), x.shape[0], limit is not None, limit or 0.0, alpha,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def route(
    logits: torch.Tensor, top_k: int, softmax_after_top_k: bool, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.route."""
    rows, count = logits.shape
    chosen = torch.empty(rows, top_k, dtype=torch.int64)
    weights = torch.empty(rows, top_k)
    _kernels().getp_route(
        logits.data_ptr(), rows, count, top_k, softmax_after_top_k, normalize, chosen.data_ptr(),
        weights.data_ptr(),
    )  # fmt: skip
    return chosen, weights


def experts_up(
    x: torch.Tensor,
    chosen: torch.Tensor,
    gate_up: Packed,
    bias: torch.Tensor | None,
    limit: float | None,
    alpha: float,
) -> torch.Tensor:
    """The first half of `experts` → [tokens · top_k, size], rows in order of their expert."""
    tokens, top_k = chosen.shape
    inner = x.new_empty(tokens * top_k, gate_up.shape[1] // 2)
    _kernels().getp_experts_up(
        gate_up.structs(bias), len(gate_up), x.data_ptr(), tokens, chosen.data_ptr(), top_k,
        limit is not None, limit or 0.0, alpha, inner.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return inner


def experts_down(
    inner: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    down: Packed,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The second half of `experts`: inner from `experts_up` → [tokens, hidden]."""
    tokens, top_k = chosen.shape
    out = inner.new_empty(tokens, down.shape[1])
    _kernels().getp_experts_down(
        down.structs(bias), len(down), inner.data_ptr(), tokens, chosen.data_ptr(),
        weights.data_ptr(), top_k, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
