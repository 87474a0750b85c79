"""The machine code of compiled kernels, read without a GPU: NVIDIA's SASS and AMD's assembly."""

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_MATRIX = re.compile(r"[HIQO]G?MMA\b|UTC[HIQO]MMA\b|v_(?:s?w?mfma|smfmac|s?wmma)")
_BARRIER = re.compile(r"BAR\b|s_barrier(?!_signal)")
_NVIDIA_LOAD = re.compile(r"LDG(?:STS)?\b")
_AMD_LOAD = re.compile(r"(?:global|flat|buffer)_load_(?:lds_)?(\w+)")
_AMD_SHARED_STORE = re.compile(r"ds_(?:write|store)(_?2)?(?:addr|st64)?_b(\d+)")
_AMD_BYTES = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}


@dataclass(frozen=True)
class Instruction:
    """One instruction; `target` is the index of the instruction to which a branch jumps."""

    name: str
    operands: str
    target: int | None = None
    predicate: str = ""

    @property
    def is_matrix(self) -> bool:
        """Whether it starts a matrix product."""
        return _MATRIX.match(self.name) is not None

    @property
    def is_barrier(self) -> bool:
        """Whether all warps of a program wait for each other here."""
        return _BARRIER.match(self.name) is not None

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that one thread of an AMD GPU writes; 0 for others."""
        found = _AMD_SHARED_STORE.match(self.name)
        return int(found[2]) // 8 * (2 if found[1] else 1) if found else 0

    @property
    def loaded_bytes(self) -> int:
        """Bytes of global memory that one thread loads; 0 for other instructions."""
        if _NVIDIA_LOAD.match(self.name):
            parts = self.name.split(".")
            wide = next((int(part) // 8 for part in parts if part in ("64", "128", "256")), 4)
            return {"U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(parts[-1], wide)
        found = _AMD_LOAD.match(self.name)
        if found is None:
            return 0
        form = found[1]
        bits = re.match(r"(?:d16_)?(?:hi_)?[biu](\d+)", form)
        if bits is not None:
            return int(bits[1]) // 8
        words = re.match(r"dwordx(\d)", form)
        if words is not None:
            return 4 * int(words[1])
        return next(size for key, size in _AMD_BYTES.items() if form.startswith(key))


def loops(code: Sequence[Instruction]) -> list[range]:
    """Return the instructions from the target of each backward branch to the branch.

    A branch to itself only fills the end of a kernel.
    """
    return [
        range(instruction.target, at + 1)
        for at, instruction in enumerate(code)
        if instruction.target is not None and instruction.target < at
    ]


def innermost_loop(code: Sequence[Instruction]) -> Sequence[Instruction]:
    """Return the loop without another inside: with most matrix products, then the longest."""
    found = loops(code)
    inner = [
        code[x.start : x.stop]
        for x in found
        if not any(x != y and x.start <= y.start and y.stop <= x.stop for y in found)
    ]
    return max(inner, key=lambda x: (sum(i.is_matrix for i in x), len(x)), default=())


def disassemble(binaries: Sequence[Any], architecture: str) -> list[list[Instruction]]:
    """Return the instructions of kernels, each a cubin, or the text of AMD's assembly."""
    if architecture.startswith("sm_"):
        return _nvidia_code(binaries, architecture)
    return [_amd_code(text) for text in binaries]


def _nvidia_code(cubins: Sequence[bytes], architecture: str) -> list[list[Instruction]]:
    """Disassemble kernels, each the only function of its cubin, up to the NOPs at its end.

    One call of the disassembler for all: most of its time is spent on starting.
    """
    texts = [_text_section(cubin) for cubin in cubins]
    code = _nvidia_instructions(b"".join(texts), architecture)
    kernels = []
    first = 0
    for text in texts:
        end = first + len(text) // 16
        last = next(i for i in reversed(range(first, end)) if code[i].name != "NOP")
        kernels.append([_shifted(x, first) for x in code[first : last + 1]])
        first = end
    return kernels


def _shifted(instruction: Instruction, first: int) -> Instruction:
    if instruction.target is None:
        return instruction
    name, operands = instruction.name, instruction.operands
    return Instruction(name, operands, instruction.target - first, instruction.predicate)


def _text_section(cubin: bytes) -> bytes:
    """Return the section of instructions of an ELF file of 64 bits that has one function."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    # Each: name, type, flags, address, offset, size, …; the name is an offset into a section.
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    names = sections[names_at][4]
    (found,) = (x for x in sections if cubin.startswith(b".text.", names + x[0]))
    return cubin[found[4] : found[4] + found[5]]


def _nvidia_instructions(binary: bytes, architecture: str) -> list[Instruction]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    # From sm_90 on, the names with an "a" include instructions of this architecture only.
    version = architecture.replace("sm_", "SM") + ("a" if int(architecture[3:]) >= 90 else "")
    with tempfile.NamedTemporaryFile() as file:
        file.write(binary)
        file.flush()
        text = subprocess.run(
            [str(tool), "--binary", version, file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    line = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?\w+)?\s*([\w.]+)\s*(.*?)\s*;", re.MULTILINE)
    code: list[Instruction] = []
    for address, predicate, name, operands in line.findall(text):
        assert int(address, 16) == 16 * len(code), f"cannot read the line at {address}"
        jump = re.search(r"(0x[0-9a-f]+)$", operands) if name.startswith("BRA") else None
        target = int(jump[1], 16) // 16 if jump else None
        code.append(Instruction(name, operands, target, predicate))
    assert 16 * len(code) == len(binary), "the disassembly is not complete"
    return code


def _amd_code(text: str) -> list[Instruction]:
    """Return the instructions of one kernel's assembly, as Triton keeps it in `asm["amdgcn"]`."""
    found: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in _amd_lines(text):
        if line.endswith(":"):
            labels[line[:-1]] = len(found)
        elif not line.startswith("."):
            name, _, operands = line.partition(" ")
            found.append((name, operands.strip()))
    return [
        Instruction(name, operands, labels.get(operands) if "branch" in name else None)
        for name, operands in found
    ]


def _amd_lines(text: str) -> Iterator[str]:
    """The lines up to the end of the function, without comments."""
    for line in text.split(".section", 1)[0].splitlines():
        line = line.partition(";")[0].strip()
        if line:
            yield line
