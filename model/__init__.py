"""The model: configs, weights and the one decoder of every family, split over ranks or not.

Owns the decoder, its operations on each device (`ops`), weight formats, model families, checkpoint
loading, and the arithmetic of what a step costs (`cost`). Never touches requests, scheduling or
text. The main class is `Transformer`; `load_config` and `loader.load` read a Hugging Face
directory. torch is imported only with `Transformer`, so that configs and costs load quickly.
"""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import CheckpointError, ModelConfig
from model.families import load_config


def _is_busy(pressure: Path) -> bool:
    """Whether a task waited for a CPU in at least a tenth of the last ten seconds.

    pressure: Linux's /proc/pressure/cpu. False if the file does not exist.
    """
    try:
        first = pressure.read_text().split()[1]  # some avg10=0.00 avg60=…
    except (OSError, IndexError):
        return False
    return float(first.removeprefix("avg10=")) >= 10


# Waiting threads of GCC's OpenMP runtime, which torch and the CPU kernels share, spin for tens of
# milliseconds before they sleep. On a busy machine they can occupy the CPU that the awaited thread
# needs, so the spin is limited to about 0.2 ms there. On an idle machine that limit would make a
# step 5% slower. The runtime reads the setting once, when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ and _is_busy(Path("/proc/pressure/cpu")):
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# torch warns at import if NumPy is not installed; nothing here needs it.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

if TYPE_CHECKING:
    from model.transformer import Transformer

__all__ = ["CheckpointError", "ModelConfig", "Transformer", "load_config"]


def __getattr__(name: str) -> Any:
    if name == "Transformer":
        from model.transformer import Transformer

        return Transformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
