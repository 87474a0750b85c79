"""The model: configs, weights and the one decoder of every family, split over ranks or not.

Owns the decoder, its operations on each device (`ops`), weight formats, model families, checkpoint
loading, and the arithmetic of what a step costs (`cost`). Never touches requests, scheduling or
text. The main class is `Transformer`; `load_config` and `loader.load` read a Hugging Face
directory. torch is imported only with `Transformer`, so that configs and costs load quickly.
"""

import os
import warnings
from typing import TYPE_CHECKING, Any

from model.config import CheckpointError, ModelConfig
from model.families import load_config

# Waiting threads of GCC's OpenMP runtime, which torch uses for operations without a native kernel,
# spin for tens of milliseconds before they sleep. Beside other processes they occupy the core that
# the awaited thread needs, so the spin is limited to about 0.07 ms. The runtime reads the setting
# once, when torch is imported. The native kernels have their own threads: see
# ops/cpu/kernels/threads.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

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
