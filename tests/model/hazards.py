"""Machine instructions that may give wrong results on hardware, found in compiled kernels.

Neither Triton's interpreter nor its compiler reports them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from tests.model.machine_code import Instruction

_REGISTER = re.compile(r"R(\d+)")
# The sum, the first operand if it is in registers, and the descriptor of the second.
_PRODUCT = re.compile(r"R\d+, R(\d+)(?:\.\w+)*, gdesc")
_OPERAND_REGISTERS = 4  # of 64 rows and 32 bytes of each, in the 128 threads of a warp group
_MEMORY = re.compile(r"(?:LDG|STG|LD|ST|LDGSTS|ATOM|ATOMG|RED|REDG|LDTM|STTM|U?TMA\w*|UBLK\w*)$")
_PREFETCHES = ("UBLKPF", "CCTL", "UTMAPF")

_Reads = frozenset[tuple[int, int | None]]
"""Registers that products still read, each with the number of groups committed after its own.

None: the product's own group is not committed yet.
"""


def overwritten_operands(code: Sequence[Instruction]) -> list[str]:
    """Return the instructions of sm_90 that may write an operand of a product that still runs.

    A warp group's product (HGMMA) runs asynchronously and may take its first operand from
    registers. It has read them for certain once the group of products with it is waited for:
    "gsb0" commits the group, and WARPGROUP.DEPBAR.LE gsb0, n waits until at most n are left. All
    paths through the kernel are followed, also around loops.
    """
    found: dict[int, str] = {}
    states: dict[int, _Reads] = {0: frozenset()}
    pending = [0]
    while pending:
        at = pending.pop()
        reads = states[at]
        instruction = code[at]
        written = set(_written(instruction)) & {register for register, _ in reads}
        if written:
            found[at] = f"{at}: {instruction.name} {instruction.operands} writes {sorted(written)}"
        after = _after(instruction, reads)
        for following in _following(code, at):
            joined = after | states.get(following, frozenset())
            if following not in states or joined != states[following]:
                states[following] = joined
                pending.append(following)
    return [found[at] for at in sorted(found)]


def _after(instruction: Instruction, reads: _Reads) -> _Reads:
    if instruction.name.startswith("WARPGROUP.DEPBAR"):
        left = int(instruction.operands.rpartition(",")[2], 16)
        return frozenset(x for x in reads if x[1] is None or x[1] < left)
    if not instruction.name.startswith("HGMMA"):
        return reads
    operand = _PRODUCT.match(instruction.operands)
    if operand is not None:
        first = int(operand[1])
        reads |= {(register, None) for register in range(first, first + _OPERAND_REGISTERS)}
    if "gsb0" in instruction.operands:  # 3 groups are more than any kernel here leaves running
        reads = frozenset((x, 0 if age is None else min(age + 1, 3)) for x, age in reads)
    return reads


def _following(code: Sequence[Instruction], at: int) -> Iterator[int]:
    instruction = code[at]
    if instruction.target is not None:
        yield instruction.target
    ends = instruction.target is not None or instruction.name == "EXIT"
    if at + 1 < len(code) and (instruction.predicate or not ends):
        yield at + 1


def _written(instruction: Instruction) -> range:
    """Return the general registers that an instruction writes."""
    if instruction.name.startswith("HGMMA"):
        return range(0)  # sums: the compiler itself waits for them
    operands = [x.strip() for x in instruction.operands.split(",")]
    while operands and re.fullmatch(r"!?U?P(?:T|\d)", operands[0]):
        operands.pop(0)
    first = _REGISTER.match(operands[0]) if operands else None
    if first is None:
        return range(0)
    return range(int(first[1]), int(first[1]) + _width(instruction.name.split(".")))


def _width(name: list[str]) -> int:
    """Return the number of registers that an instruction with this name writes, if any."""
    if name[0] == "LDSM":
        return int(name[-1]) if name[-1] in ("2", "4") else 1
    if name[0] in ("HMMA", "IMMA"):
        return 4 if "F32" in name or name[0] == "IMMA" else 2
    if "128" in name:
        return 4
    if "64" in name or "WIDE" in name or (name[0] == "CS2R" and "32" not in name):
        return 2
    return 2 if name[0] in ("DADD", "DMUL", "DFMA") else 1


def early_memory(code: Sequence[Instruction]) -> list[str]:
    """Return what a kernel that may start early does before it waits for the previous kernel.

    It must wait exactly once (ACQBULK), on every path, and before it lets the next kernel start
    (PREEXIT). Before that it may prefetch, which does not change results, and read its arguments.
    """
    waits = [at for at, x in enumerate(code) if x.name == "ACQBULK"]
    starts = [at for at, x in enumerate(code) if x.name == "PREEXIT"]
    if len(waits) != 1 or len(starts) != 1 or starts < waits or code[waits[0]].predicate:
        return [f"waits at {waits}, starts the next kernel at {starts}"]
    before = code[: waits[0]]
    return [
        f"{at}: {x.name} {x.operands}"
        for at, x in enumerate(before)
        if x.name == "EXIT"
        or (x.target is not None and x.target > waits[0])
        or (_MEMORY.match(x.name.split(".")[0]) and not x.name.startswith(_PREFETCHES))
    ]


def block_pingpong(code: Sequence[Instruction]) -> list[str]:
    """Return the instructions of AMD kernels that let 8 warps alternate between loads and products.

    Without a barrier in the right place one half of the warps overwrites shared memory that the
    other half still reads (triton-lang/triton#11696).
    """
    return [f"{at}: {x.name} {x.operands}" for at, x in enumerate(code) if x.name == "s_setprio"]


def hazards(code: Sequence[Instruction], options: Mapping[str, int]) -> list[str]:
    """Return what is wrong in a kernel that was compiled with these launch options."""
    found = overwritten_operands(code)
    if options.get("launch_pdl"):
        found += early_memory(code)
    if options.get("num_warps") == 8:
        found += block_pingpong(code)
    return found
