"""Rotary position embedding: the cos and sin tables of every supported scaling rule."""

import math

import torch

from model.config import RopeConfig


def rope_table(rope: RopeConfig, rotary_dim: int, positions: int) -> torch.Tensor:
    """cos and sin of every position: float32 [rows, rotary_dim], cos in the first half.

    Row p is position p. With longrope these are the rows of the short factors, up to the original
    context; if `positions` exceeds it, the rows of the long factors for every position follow
    (`RopeConfig.first_row`). All positions of a sequence must use the same factors, because the
    attention between two positions depends on the difference of their angles. Which factors a
    sequence uses depends on its own length alone, not on the rest of the batch.
    """
    if rope.kind == "none":
        ones = torch.ones(positions, rotary_dim // 2)
        return torch.cat((ones, torch.zeros_like(ones)), dim=-1)
    factor = cos_sin_factor(rope)
    if rope.kind != "longrope":
        frequencies = inverse_frequencies(rope, rotary_dim)
        return _rows(-frequencies if rope.is_reversed else frequencies, positions) * factor
    original = rope.original_max_positions
    short = _frequencies(rope.theta, rotary_dim, torch.tensor(rope.short_factors))
    table = _rows(short, min(positions, original))
    if positions > original:
        long = _frequencies(rope.theta, rotary_dim, torch.tensor(rope.long_factors))
        table = torch.cat((table, _rows(long, positions)))
    return table * factor


def query_scales(rope: RopeConfig, positions: int) -> torch.Tensor:
    """What queries at each position are multiplied by: float32 [positions, 1].

    1 + beta · ln(1 + ⌊position / original context⌋), which keeps the softmax as sharp over more
    positions than the model was first trained on (the temperature of Llama 4, Ministral 3).
    """
    contexts = (torch.arange(positions) // rope.original_max_positions).float()
    return (1 + rope.query_beta * torch.log1p(contexts)).unsqueeze(1)


def inverse_frequencies(rope: RopeConfig, rotary_dim: int) -> torch.Tensor:
    """Inverse frequencies, float32 [rotary_dim / 2], of the kinds other than longrope.

    default: theta^(-2i/d) (RoFormer, 3.4.2). linear: divided by the factor. llama3: long
    wavelengths divided by the factor, with a smooth band between (Llama 3.1 model code).
    yarn: "NTK-by-parts" (YaRN, 3.2). proportional: as linear in the first pairs of values, 0 in the
    others (Gemma 4).
    """
    plain = _frequencies(rope.theta, rotary_dim)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "proportional":
        rotated = int(rope.rotated_share * rotary_dim // 2)
        return torch.cat((plain[:rotated] / rope.factor, torch.zeros_like(plain[rotated:])))
    if rope.kind == "llama3":
        # The rotations within the original context decide how much a dimension is stretched.
        rotations = rope.original_max_positions * plain / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = ((rotations - low) / (high - low)).clamp(0, 1)
        return plain * keep + plain / rope.factor * (1 - keep)
    if rope.kind == "yarn":
        keep = 1 - _yarn_ramp(rope, rotary_dim)
        return plain * keep + plain / rope.factor * (1 - keep)
    return plain


def cos_sin_factor(rope: RopeConfig) -> float:
    """The factor by which cos and sin are multiplied.

    yarn: 0.1·ln(s) + 1 (YaRN, 3.4); longrope: √(1 + ln(s) / ln(original context)) (LongRoPE,
    3.4); 1 for the others.
    """
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "yarn":
        return (0.1 * math.log(max(rope.factor, 1.0)) + 1.0) * rope.attn_factor
    if rope.kind == "longrope" and rope.factor > 1:
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions))
    return 1.0


def _frequencies(
    theta: float, rotary_dim: int, divisors: torch.Tensor | float = 1.0
) -> torch.Tensor:
    return 1.0 / (divisors * theta ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim))


def _rows(frequencies: torch.Tensor, positions: int) -> torch.Tensor:
    angles = torch.outer(torch.arange(positions).float(), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _yarn_ramp(rope: RopeConfig, rotary_dim: int) -> torch.Tensor:
    """0 for dimensions that keep their frequency, 1 for those divided by the factor."""

    def dimension(rotations: float) -> float:
        """The (fractional) dimension with this many rotations within the original context."""
        context = rope.original_max_positions / (rotations * 2 * math.pi)
        return rotary_dim * math.log(context) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(rotary_dim // 2).float() - low) / (high - low)).clamp(0, 1)
