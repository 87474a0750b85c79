"""Compile the kernels of a revision for `kernel_counts.py`, which runs this file in a subprocess.

The tree of the revision is the working directory; its own `tests.model.triton_compiler` is used.
Writes pickled `Kernel`s, as tuples, to the standard output.
"""

import pickle
import sys
from typing import Any, NamedTuple


class Kernel(NamedTuple):
    """A compiled launch; `number` counts the launches of the kernel for this config and rows."""

    config: str
    rows: int
    name: str
    number: int
    constants: str
    warps: int
    registers: int
    spills: int
    shared: int  # bytes
    code: Any  # NVIDIA: the cubin; AMD: the text of the assembly


def _compile(architecture: str, only: str, configs: list[str], rows: list[int]) -> list[Kernel]:
    from model.cost.known_models import named_config
    from tests.model import triton_compiler as compiler

    found: list[Kernel] = []
    compiled: dict[Any, Any] = {}
    for config in configs:
        for count in rows:
            compiler.CONFIGS, compiler.ROWS = (named_config(config),), (count,)  # type: ignore[assignment]
            counts: dict[str, int] = {}
            found_launches = compiler.launches(architecture)
            if "quantize" in only:  # products with weights of 4 and 8 bits, in all their formats
                found_launches = compiler.quantized_launches(
                    architecture, rows=compiler.ROWS, configs=compiler.CONFIGS
                )
            for launch in found_launches:
                name = launch.kernel.__name__
                number = counts[name] = counts.get(name, 0) + 1
                if only not in name:
                    continue
                if launch not in compiled:
                    compiled[launch] = compiler.compile_launch(launch, architecture)
                result = compiled[launch]
                asm, options = result.binary.asm, dict(launch.options)
                constants = " ".join(f"{key}={value}" for key, value in launch.constants)
                code = asm["cubin"] if "cubin" in asm else asm["amdgcn"]
                usage = options.get("num_warps", 4), result.registers, result.spills, result.shared
                found.append(Kernel(config, count, name, number, constants, *usage, code))
    return found


if __name__ == "__main__":
    architecture, only, configs, rows = sys.argv[1:]
    sys.path[0] = "."  # not this file's folder: the modules of the working directory
    kernels = _compile(architecture, only, configs.split(), [int(x) for x in rows.split()])
    sys.stdout.buffer.write(pickle.dumps([tuple(kernel) for kernel in kernels]))
