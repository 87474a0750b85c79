"""A kernel that is set up while the one before it ends, on GPUs that can: `Tiles.overlap`.

A launch costs what it takes to bring programs onto the device and to let the last of them go. With
few rows that is as long as the work itself. Where overlap is on, the programs of the next kernel
come onto the device as soon as all of this one's are there, and wait before they touch memory
(NVIDIA calls it programmatic dependent launch). Everywhere else the same kernels run one by one.
"""

import triton
import triton.language as tl

_AHEAD = tl.constexpr(16 << 10)  # bytes that a program asks for before its turn, at most
# Each of the first threads asks for one row, from a multiple of 16 bytes on: $1 is where the first
# row is, $2 how many there are, $3 bytes from one to the next, $4 how many bytes of each.
_PREFETCH = tl.constexpr("""
{
    .reg .pred own;
    .reg .b32 turn;
    .reg .b64 place;
    mov.u32 turn, %tid.x;
    setp.lt.s32 own, turn, $2;
    mad.wide.s32 place, turn, $3, $1;
    and.b64 place, place, -16;
    @own cp.async.bulk.prefetch.L2.global [place], $4;
    mov.u32 $0, 0;
}
""")


@triton.jit
def wait_for_previous_kernel(PROGRAMMATIC_LAUNCH: tl.constexpr):
    """Until all that was launched before has ended and can be seen: no kernel reads before it.

    Each waits, so that one that has its turn knows of all before it, not only of the last.
    """
    if PROGRAMMATIC_LAUNCH:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(
    source,
    rows,
    SIZE: tl.constexpr,
    OF: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMMATIC_LAUNCH: tl.constexpr,
):
    """Bring rows of SIZE numbers nearer while the kernel before ends: weights, which nobody writes.

    The first `rows`, at least 1, from `source` on, of up to OF; ROWS of the program in all share
    what it may ask for.
    """
    BYTES: tl.constexpr = SIZE * source.dtype.element_ty.primitive_bitwidth // 8
    if PROGRAMMATIC_LAUNCH and BYTES % 16 == 0:
        tl.static_assert(OF <= 32, "a row needs a thread")
        size: tl.constexpr = min(BYTES, _AHEAD // ROWS)
        tl.inline_asm_elementwise(
            _PREFETCH,
            "=r,l,r,r,r",
            [source.to(tl.int64), rows, BYTES, size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
