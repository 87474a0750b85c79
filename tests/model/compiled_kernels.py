"""What holds for every kernel that is compiled for a GPU."""

from collections.abc import Sequence

from model.ops.triton.tiles import TILES
from tests.model.hazards import hazards
from tests.model.machine_code import Instruction, disassemble
from tests.model.occupancy import PROCESSORS
from tests.model.triton_compiler import Compiled, Launch, compile_launch


def compiled(
    launches: Sequence[Launch], architecture: str, wide_heads: bool = False
) -> list[tuple[Launch, Compiled, list[Instruction]]]:
    """Compile launches, and check that they fit and that none of their instructions is a hazard.

    Instructions are read where there are hazards: of the products of sm_90, of kernels that start
    early, and of AMD's warps that alternate; elsewhere they are empty. wide_heads: on AMD, heads of
    256 and more spill, since a Radeon has not enough vector registers for them, and the count
    includes scalar registers that are kept in a vector register.
    """
    kernels = [compile_launch(launch, architecture) for launch in launches]
    codes: list[list[Instruction]] = [[] for _ in kernels]
    is_amd = architecture.startswith("gfx")
    if is_amd or TILES[architecture].programmatic_launch:
        codes = disassemble([kernel.code for kernel in kernels], architecture)
    for launch, kernel, code in zip(launches, kernels, codes, strict=True):
        name = f"{architecture}, {launch}"
        assert kernel.shared <= PROCESSORS[architecture].program_shared, f"{name}: {kernel.shared}"
        assert not kernel.spills or (wide_heads and is_amd), f"{name}: {kernel.spills} spilled"
        assert not code or not hazards(code, dict(launch.options)), name
    return list(zip(launches, kernels, codes, strict=True))
