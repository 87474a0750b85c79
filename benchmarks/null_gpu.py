"""Run a program on a simulated GPU that takes no time: `python benchmarks/null_gpu.py PROGRAM …`.

Only the host's work remains. It is the real work (torch's allocator and streams, graph captures,
compilation of Triton kernels), but kernels do not run and their results are zero. This shows,
without a GPU, where a job on a GPU would fail or wait for the host:

    python benchmarks/null_gpu.py benchmarks/gpu.py --section ragged

Needs torch built for CUDA 13 with its Triton, a C compiler, and Linux on x86-64. Results are not
computed, so the checks of gpu.py run but compare nothing. The measured times are the host's only;
they do not predict the speed of a GPU.
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
    """Build the library, run the program with it, and exit with the program's status."""
    if len(sys.argv) < 2:
        sys.exit(str(__doc__))
    compiler, headers = shutil.which("cc"), _headers()
    if compiler is None or not all(headers):
        sys.exit("null_gpu.py needs a C compiler, and torch for CUDA 13 with its Triton")
    # A new folder for each run, since other users could put code into a shared one.
    with tempfile.TemporaryDirectory(prefix="null-gpu-") as folder:
        library = f"{folder}/libcuda.so.1"
        options = ["-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-lpthread"]
        options += [f"-I{place}" for place in headers]
        subprocess.run([compiler, _SOURCE, *options, "-o", library], check=True)
        settings = {
            "LD_PRELOAD": library,
            "TRITON_LIBCUDA_PATH": folder,
            "NULL_GPU": "1",  # tells benchmarks not to compare results
            "KINETO_LOG_LEVEL": "5",  # silences the profiler, which does not find a device
            "XDG_CACHE_HOME": folder,  # measured peaks of this GPU must not be cached
        }
        command = [sys.executable, *sys.argv[1:]]
        status = subprocess.run(command, env=os.environ | settings).returncode
    sys.exit(128 - status if status < 0 else status)


def _headers() -> list[Path | None]:
    """Return the header folders of CUDA and Triton in search order; None for a missing one."""
    found = []
    for package, inside in (("nvidia", "cu13/include"), ("triton", "backends/nvidia/include")):
        spec = find_spec(package)
        places = spec.submodule_search_locations or [] if spec else []
        found.append(next((p for at in places if (p := Path(at) / inside).is_dir()), None))
    return found


if __name__ == "__main__":
    main()
