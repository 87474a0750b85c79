"""What is computed: config, weights and the decoder of every family.

Knows tensors and nothing of requests or text. The main class is `Transformer`; `load_config`
and `weights.load` bring a Hugging Face directory into it. What it costs (`cost`, `hardware`,
`roofline`) is pure arithmetic on a config, so torch is imported only with `Transformer`.
"""

import os
from typing import TYPE_CHECKING, Any

from model.config import CheckpointError, ModelConfig
from model.families import load_config

# How often a thread that waits for another looks before it sleeps. GCC's OpenMP, which torch and
# the CPU kernels share, would look for tens of milliseconds, and where there is other work keep the
# processor from the very thread it waits for. It reads this once, when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

if TYPE_CHECKING:
    from model.transformer import Transformer

__all__ = ["CheckpointError", "ModelConfig", "Transformer", "load_config"]


def __getattr__(name: str) -> Any:
    if name == "Transformer":
        from model.transformer import Transformer

        return Transformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
