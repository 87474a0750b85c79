"""Run a program as if on a GPU that takes no time: `python benchmarks/null_gpu.py PROGRAM …`.

What is left is the host's work, and all of it is real but the kernels' results, which are zero:
torch's allocator and streams, captures, and the compilation of Triton's kernels. So this finds
where a job on a GPU would fail or wait for its host, without a GPU:

    python benchmarks/null_gpu.py benchmarks/gpu.py --section ragged

Needs a torch built for CUDA 13 and its Triton, a C compiler, Linux on x86-64. Checks of results
fail, and figures are the host's alone: nothing is said of a GPU's speed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

_SOURCE = Path(__file__).with_name("null_gpu.c")


def main() -> None:
    """Build the library and run the program over it; its exit status is ours."""
    if len(sys.argv) < 2:
        sys.exit(str(__doc__))
    compiler, headers = shutil.which("cc"), _headers()
    if compiler is None or not all(headers):
        sys.exit("null_gpu.py needs a C compiler, and torch for CUDA 13 with its Triton")
    # A new folder each time: whoever could write to a shared one could run code as this user.
    with tempfile.TemporaryDirectory(prefix="null-gpu-") as folder:
        library = f"{folder}/libcuda.so.1"
        options = ["-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-lpthread"]
        options += [f"-I{place}" for place in headers]
        subprocess.run([compiler, _SOURCE, *options, "-o", library], check=True)
        own = {
            "LD_PRELOAD": library,
            "TRITON_LIBCUDA_PATH": folder,
            "KINETO_LOG_LEVEL": "5",  # the profiler finds no device
            "XDG_CACHE_HOME": folder,  # nobody is to find later what is measured of this GPU
        }
        status = subprocess.run([sys.executable, *sys.argv[1:]], env=os.environ | own).returncode
    sys.exit(128 - status if status < 0 else status)


def _headers() -> list[Path | None]:
    """Folders with CUDA's, in whose order they count: the compiler's own are in Triton's alone."""
    found = []
    for package, inside in (("nvidia", "cu13/include"), ("triton", "backends/nvidia/include")):
        spec = find_spec(package)
        places = spec.submodule_search_locations or [] if spec else []
        found.append(next((p for at in places if (p := Path(at) / inside).is_dir()), None))
    return found


if __name__ == "__main__":
    main()
