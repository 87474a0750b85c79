"""The computation: config, weights and the decoder of every family.

Works on tensors; requests and text do not occur here. The main class is `Transformer`;
`load_config` and `loader` read a Hugging Face directory. The cost model (`cost`) is pure arithmetic
on a config, so torch is imported only with `Transformer`.
"""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import CheckpointError, ModelConfig
from model.families import load_config


def _is_crowded(pressure: Path) -> bool:
    """Whether work waited for a processor in a tenth of the last ten seconds: Linux's cpu.pressure.

    False where the file is not there.
    """
    try:
        first = pressure.read_text().split()[1]  # some avg10=0.00 avg60=…
    except (OSError, IndexError):
        return False
    return float(first.removeprefix("avg10=")) >= 10


# A thread that waits for another one spins, and sleeps after a number of iterations. The threads of
# GCC's OpenMP, which torch and the CPU kernels share, spin for tens of milliseconds. On a busy
# machine this occupies the core that the other thread needs, so 0.2 ms are better there; on an idle
# machine 0.2 ms make a step 5% slower. The count can be set only once, before torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ and _is_crowded(Path("/proc/pressure/cpu")):
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# torch says so at import where NumPy is not installed; nothing here needs it.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

if TYPE_CHECKING:
    from model.transformer import Transformer

__all__ = ["CheckpointError", "ModelConfig", "Transformer", "load_config"]


def __getattr__(name: str) -> Any:
    if name == "Transformer":
        from model.transformer import Transformer

        return Transformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
