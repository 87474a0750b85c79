"""The default limits of a step: on a GPU from its memory and the model's, on a CPU fixed."""

from model.config import ModelConfig
from model.cost.operations import kv_bytes_per_sequence, parameter_bytes
from model.cost.roofline import USABLE_MEMORY

_BATCH_SIZES = (1024, 512, 256)
# Positions of a sequence that runs, on average: 512 of the prompt, and half of 512 new tokens.
_TYPICAL_CONTEXT = 768
# Plain torch samples with 49 bytes for each logit, the logit's own included; log-probabilities of
# every row take 36. Kernels sample with less than one more.
_LOGIT_BYTES = 52
# More tokens make no step of chunks more efficient; a larger batch needs them so that its decodes
# leave most of a step to chunks.
_MIN_TOKENS, _MAX_TOKENS, _TOKENS_PER_SEQUENCE = 8192, 16384, 16


CPU_BATCH_SIZE = 64
"""How many requests run at once on a CPU."""


def cpu_batch_tokens(config: ModelConfig) -> int:
    """Return how many tokens a step computes on a CPU, chunks and decodes together.

    Kernels reach their full speed at 512 tokens; an expert processes only some of a step's.
    """
    return 512 if config.moe is None else 1024


def default_batch_size(
    config: ModelConfig, dtype: str, memory: int, tensor_parallel: int = 1
) -> int:
    """Return how many requests run at once on GPUs that have `memory` bytes each.

    A large batch reads the weights for more tokens at once, but only while its KV fits: otherwise
    requests are preempted and computed again. So the largest of 1024, 512 and 256 is returned of
    which the KV of typical sequences and the logits fit beside the weights, or 256 if none does.
    """
    room = int(memory * USABLE_MEMORY) - parameter_bytes(config, dtype, tensor_parallel)
    context = min(_TYPICAL_CONTEXT, config.max_positions)
    each = kv_bytes_per_sequence(config, context, dtype, tensor_parallel)
    each += _LOGIT_BYTES * config.vocab_size
    return next((size for size in _BATCH_SIZES if size * each <= room), _BATCH_SIZES[-1])


def default_batch_tokens(batch_size: int) -> int:
    """Return how many tokens a step computes on a GPU, chunks and decodes together."""
    return min(_MAX_TOKENS, max(_MIN_TOKENS, _TOKENS_PER_SEQUENCE * batch_size))
