"""Programmatic dependent launch: a kernel starts while the previous one ends, on NVIDIA's GPUs.

Starting the programs of a kernel and waiting for its last one takes time; for few rows, as much as
the computation itself. With `Tiles.programmatic_launch` the programs of the next kernel start as
soon as all programs of the current one have, and wait before they access memory. Without it the
same kernels run one after the other.
"""

import triton
import triton.language as tl

_MAX_PREFETCH = tl.constexpr(16 << 10)  # bytes that a program prefetches while it waits
# Each of the first threads prefetches one row, from a multiple of 16 bytes on. $1: address of the
# first row, $2: number of rows, $3: bytes from one row to the next, $4: bytes to prefetch of each.
_PREFETCH = tl.constexpr("""
{
    .reg .pred has_row;
    .reg .b32 row;
    .reg .b64 address;
    mov.u32 row, %tid.x;
    setp.lt.s32 has_row, row, $2;
    mad.wide.s32 address, row, $3, $1;
    and.b64 address, address, -16;
    @has_row cp.async.bulk.prefetch.L2.global [address], $4;
    mov.u32 $0, 0;
}
""")


@triton.jit
def wait_for_previous_kernel(PROGRAMMATIC_LAUNCH: tl.constexpr):
    """Wait until all earlier kernels have ended and their writes are visible.

    Every kernel calls this before it reads. So the end of the previous kernel implies the end of
    all kernels before it.
    """
    if PROGRAMMATIC_LAUNCH:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(
    source,
    rows,
    SIZE: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    PROGRAM_ROWS: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Prefetch rows of SIZE weights into the L2 cache while the previous kernel ends.

    This needs no wait, because no kernel writes weights. `rows`, from 1 to MAX_ROWS, are prefetched
    from `source` on. The limit of a program's bytes is divided among all of its PROGRAM_ROWS.
    """
    BYTES: tl.constexpr = SIZE * source.dtype.element_ty.primitive_bitwidth // 8
    if PROGRAMMATIC_LAUNCH and BYTES % 16 == 0:
        tl.static_assert(MAX_ROWS <= 32, "a row needs a thread")
        size: tl.constexpr = min(BYTES, _MAX_PREFETCH // PROGRAM_ROWS)
        tl.inline_asm_elementwise(
            _PREFETCH,
            "=r,l,r,r,r",
            [source.to(tl.int64), rows, BYTES, size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
