"""How many programs fit into one processor of a GPU at a time.

NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". AMD: the
instruction set manuals of CDNA and RDNA, and LLVM's AMDGPUUsage. A processor is what
`multi_processor_count` counts: a multiprocessor, a compute unit, or RDNA's workgroup processor.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Processor:
    """The resources of one processor and of one program, in bytes, registers and warps."""

    program_shared: int  # bytes of shared memory that one program may use
    shared: int
    warps: int
    programs: int
    shared_of_program: int = 0  # bytes that every program uses besides its own
    registers: int = 512  # of one thread, if there were one warp for each of `schedulers`
    granule: int = 8  # registers of a thread are allocated in multiples of it
    schedulers: int = 4

    def programs_at_once(self, registers: int, shared: int, warps: int) -> int:
        """Return how many programs fit, each with `warps` warps and `shared` bytes."""
        allocated = -(-max(registers, 1) // self.granule) * self.granule
        by_registers = self.schedulers * (self.registers // allocated) // warps
        by_shared = self.shared // max(shared + self.shared_of_program, 1)
        return min(by_registers, by_shared, self.warps // warps, self.programs)


def _nvidia(program_shared: int, warps: int, programs: int) -> Processor:
    return Processor(
        program_shared << 10, (program_shared + 1) << 10, warps, programs, shared_of_program=1 << 10
    )


def _cdna(shared: int) -> Processor:
    return Processor(shared << 10, shared << 10, warps=32, programs=32)


_RDNA = Processor(64 << 10, 128 << 10, warps=64, programs=64, registers=1536, granule=24)

PROCESSORS = {
    "sm_80": _nvidia(163, 64, 32),
    "sm_86": _nvidia(99, 48, 16),
    "sm_89": _nvidia(99, 48, 24),
    "sm_90": _nvidia(227, 64, 32),
    "sm_100": _nvidia(227, 64, 32),
    "sm_103": _nvidia(227, 64, 32),
    "sm_120": _nvidia(99, 48, 24),
    "gfx90a": _cdna(64),
    "gfx942": _cdna(64),
    "gfx950": _cdna(160),
    "gfx1100": _RDNA,
    "gfx1151": _RDNA,
    "gfx1201": _RDNA,
}
