"""What is computed: config, weights and the decoder of every family.

Knows tensors and nothing of requests or text. The main class is `Transformer`; `load_config`
and `weights.load` bring a Hugging Face directory into it.
"""

from model.config import CheckpointError, ModelConfig, load_config
from model.transformer import Transformer

__all__ = ["CheckpointError", "ModelConfig", "Transformer", "load_config"]
