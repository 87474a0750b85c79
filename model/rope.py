"""Rotary position embedding: the cos and sin tables of every scaling rule that is supported."""

import math

import torch

from model.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """(inverse frequencies float32 [head_dim / 2], factor on cos and sin).

    default: theta^(-2i/d) (RoFormer, 3.4.2). linear: divided by the factor. llama3: long
    wavelengths divided by the factor, with a smooth band between (Llama 3.1 model code).
    yarn: "NTK-by-parts" and the attention factor 0.1·ln(s) + 1 (YaRN, 3.2 and 3.4).
    """
    plain = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        # Rotations completed within the original context decide how much a dimension stretches.
        rotations = rope.original_max_positions * plain / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = ((rotations - low) / (high - low)).clamp(0, 1)
        return plain * keep + plain / rope.factor * (1 - keep), 1.0
    if rope.kind == "yarn":
        keep = 1 - _yarn_ramp(rope, head_dim)
        scaled = plain * keep + plain / rope.factor * (1 - keep)
        factor = rope.attention_factor
        if factor is None:
            factor = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
        return scaled, factor
    return plain, 1.0


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """0 for dimensions that keep their frequency, 1 for those divided by the factor."""

    def dimension(rotations: float) -> float:
        """The (fractional) dimension that turns this often within the original context."""
        context = rope.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(context) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(head_dim // 2).float() - low) / (high - low)).clamp(0, 1)


def rope_table(rope: RopeConfig, head_dim: int, positions: int) -> torch.Tensor:
    """cos and sin for every position: float32 [positions, head_dim], cos in the first half."""
    frequencies, factor = inverse_frequencies(rope, head_dim)
    angles = torch.outer(torch.arange(positions).float(), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * factor
