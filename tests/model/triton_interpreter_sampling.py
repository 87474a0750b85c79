"""Compare sampling with top-k and top-p with the reference, in Triton's interpreter.

test_triton.py runs this file, as it runs triton_interpreter.py.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.ops.triton import sampling
from model.ops.triton.backend import TritonBackend
from model.ops.triton.tiles import target_of
from tests.model.ops_helpers import CPU, reference
from tests.model.test_ops import rand

REFERENCE, KERNELS = reference(), TritonBackend(CPU, torch.float32)


def sample_arguments(rows: int, vocab: int) -> list[Any]:
    """Return logits with ties, and random other arguments of `Backend.sample` for each row.

    The logits are multiples of 2⁻⁶, so that different ones have different keys.
    """
    logits = (rand(rows, vocab) * 256).round() / 64
    logits[: rows // 2] = logits[: rows // 2].round()
    generator = torch.Generator().manual_seed(vocab)
    temperature, top_p = (torch.rand(rows, generator=generator) + x for x in (0.5, 0.01))
    uniform = torch.rand(rows, dtype=torch.float64, generator=generator)
    top_k = torch.randint(0, 2 * vocab, (rows,), generator=generator)
    return [logits, temperature, top_k, top_p.clamp(max=1), uniform]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make rows take several blocks of several parts, the last of which is not full."""
    for name, size in (("_BLOCK", 32), ("_PART", 16)):
        monkeypatch.setattr(sampling, name, size)


def compare(logits: torch.Tensor, temperature: Any, top_k: Any, top_p: Any, uniform: Any) -> None:
    """Compare kernel and reference, with top-k and without."""
    for limit in (None, top_k):
        expected = REFERENCE.sample(logits, temperature, limit, top_p, uniform)
        assert torch.equal(KERNELS.sample(logits, temperature, limit, top_p, uniform), expected)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("vocab", [1, 7, 130])
def test_a_sample_equals_that_of_a_full_sort(vocab: int) -> None:
    logits, temperature, top_k, top_p, uniform = sample_arguments(8, vocab)
    top_k[1], top_k[2], top_k[3], top_k[5] = 1, 0, 3 * vocab, min(3, vocab)
    top_p[2], top_p[3], top_p[4] = 1, 0.001, 1
    uniform[3:5] = torch.tensor([0, 1 - 2.0**-53])
    logits[4] /= 4  # so that no probability is below the smallest one that is counted
    logits[6, 1:] = float("-inf")
    compare(logits, temperature, top_k, top_p, uniform)


@pytest.mark.usefixtures("small_blocks")
def test_logits_that_share_a_key_are_nearly_equally_likely() -> None:
    _, temperature, top_k, top_p, uniform = sample_arguments(40, 400)
    logits = rand(40, 400)  # about 7 tokens for each key of the upper half
    for limit in (None, top_k):
        arguments = (logits, temperature, limit, top_p, uniform)
        both = torch.stack((KERNELS.sample(*arguments), REFERENCE.sample(*arguments)), 1)
        found, expected = (logits / temperature[:, None]).gather(1, both).unbind(1)
        # A key's width, and the neighbour at which rounding may sample.
        assert (found - expected).abs().median() < 2**-10
        assert (found - expected).abs().max() < 0.1


@pytest.mark.usefixtures("small_blocks")
def test_a_tiny_temperature_samples_the_largest_logit() -> None:
    logits = rand(4, 130)
    temperature = torch.tensor([1e-3, 1e-30, 1.2e-38, 1.2e-38])
    arguments = torch.ones(4), torch.tensor([0, 0.3, 0.9, 1 - 2.0**-53]).double()
    found = KERNELS.sample(logits, temperature, None, *arguments)
    assert torch.equal(found, logits.argmax(-1))
    assert torch.equal(found, REFERENCE.sample(logits, temperature, None, *arguments))


@pytest.mark.usefixtures("small_blocks")
def test_of_equal_logits_the_first_are_kept_and_sampled() -> None:
    logits = torch.zeros(4, 40)
    logits[1] = -0.0
    logits[1, ::2] = 0.0
    logits[2, 3::4] = 1.0
    logits[3] = float("-inf")
    logits[3, [8, 30]] = 2.0
    temperature, uniform = torch.ones(4), torch.tensor([0.999, 0.37, 0.62, 0.5]).double()
    compare(
        logits, temperature, torch.tensor([5, 0, 17, 1]), torch.tensor([1, 0.5, 0.9, 1]), uniform
    )


@pytest.mark.usefixtures("small_blocks")
def test_samples_follow_the_distribution_that_top_k_and_top_p_leave() -> None:
    rows, logits = 20, torch.tensor([0.0, 2.0, 1.0, 1.5, -1.0, 0.5])
    # Uniform numbers at equal distances, so counts differ by at most one.
    uniform = (torch.arange(rows).double() + 0.5) / rows
    arguments = (torch.ones(rows), torch.full((rows,), 4), torch.full((rows,), 0.85), uniform)
    counts = KERNELS.sample(logits.expand(rows, -1), *arguments).bincount(minlength=6)
    # Three of the four that top-k keeps reach 0.85; of all six it would take four.
    kept = logits.exp() * torch.tensor([0, 1, 1, 1, 0, 0])
    assert (counts - rows * kept / kept.sum()).abs().max() <= 1


@pytest.mark.parametrize("top_k", [None, torch.tensor([0, 3, 3])])
def test_rows_of_nan_and_of_minus_infinity_give_valid_tokens(top_k: Any) -> None:
    logits = torch.full((3, 70), float("nan"))
    logits[1] = float("-inf")
    logits[2, 5] = 1.0
    found = KERNELS.sample(
        logits, torch.ones(3), top_k, torch.ones(3), torch.ones(3).double() * 0.7
    )
    assert found.min() >= 0
    assert found.max() < 70
    assert found[2] == 5  # a number is preferred to NaN


@pytest.mark.usefixtures("small_blocks")
def test_a_sample_does_not_depend_on_how_rows_are_split() -> None:
    logits, *rest = sample_arguments(4, 130)
    logits[:2] = logits[:2].clamp(max=2)  # many equal logits in every part of a row
    tokens = []
    for count in (1, 3, 64):
        ops = TritonBackend(CPU, logits.dtype, replace(target_of(CPU), processors=count))
        tokens.append(ops.sample(logits, *rest))
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])
    assert torch.equal(tokens[0], REFERENCE.sample(logits, *rest))
