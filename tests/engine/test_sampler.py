"""Samples have the right distribution, depend on seed and position, and not on the batch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import SamplingParams
from engine.execution.sampler import Sampler
from model.ops.backend import Backend
from model.ops.cpu.backend import CpuBackend
from model.ops.sampling import NO_TOKEN, keyed_uniform, sample_sorted

CPU = CpuBackend(torch.device("cpu"), torch.float32)


def sample(
    logits: torch.Tensor, params: list[SamplingParams], positions: list[int]
) -> tuple[list[int], dict[int, Any]]:
    """The next tokens of sequences whose rows are in reverse order."""
    rows = list(reversed(range(len(params))))
    sampler = Sampler(len(rows), CPU)
    sampler.set_params(rows, params)
    non_greedy = dict(enumerate(params))
    found = sampler.sample(
        logits, torch.tensor(rows), torch.tensor(positions), non_greedy, not non_greedy
    ).read()
    assert sampler.last.tolist() == found[0][::-1]
    return found


def sample_many(logits: torch.Tensor, count: int, **params: float) -> torch.Tensor:
    """`count` samples from one distribution, with seeds 0, 1, 2, …"""
    rows = [SamplingParams(seed=i, **params) for i in range(count)]  # type: ignore[arg-type]
    tokens, _ = sample(logits.expand(count, -1), rows, [7] * count)
    return torch.tensor(tokens)


def test_samples_follow_the_softmax_at_a_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    for temperature in (0.5, 1.0, 2.0):
        tokens = sample_many(logits, 20_000, temperature=temperature)
        found = tokens.bincount(minlength=5) / len(tokens)
        torch.testing.assert_close(found, (logits / temperature).softmax(0), rtol=0, atol=0.012)


def test_parameters_may_be_integers() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    as_floats = [SamplingParams(temperature=1.0, top_p=1.0, seed=i) for i in range(2)]
    as_integers = [SamplingParams(temperature=1, top_p=1, seed=i) for i in range(2)]
    assert sample(logits, as_integers, [3, 4]) == sample(logits, as_floats, [3, 4])


def test_samples_from_a_large_vocabulary_follow_the_softmax_in_every_block() -> None:
    """Including the short last block and the first and last tokens of blocks."""
    logits = torch.full((5000,), -30.0)
    likely = [0, 1023, 1024, 2500, 4095, 4096, 4999]
    logits[likely] = torch.tensor([0.0, 1.0, -1.0, 0.5, 0.0, 2.0, 1.0])
    found = sample_many(logits, 20_000, temperature=1.0).bincount(minlength=5000) / 20_000
    torch.testing.assert_close(found, logits.softmax(0), rtol=0, atol=0.012)


def test_top_k_and_top_p_keep_the_right_tokens_and_their_proportions() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])
    probs = logits.softmax(0)
    found = sample_many(logits, 8000, temperature=1.0, top_k=2).bincount(minlength=5) / 8000
    expected = torch.where(torch.arange(5) < 2, probs, 0.0) / probs[:2].sum()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    # Probabilities 0.64, 0.24, 0.09 …: 0.7 needs two tokens, 0.6 one, 0.9 three.
    for top_p, kept in ((0.6, 1), (0.7, 2), (0.9, 3), (1.0, 5)):
        assert sample_many(logits, 4000, temperature=1.0, top_p=top_p).unique().tolist() == list(
            range(kept)
        )
    both = sample_many(logits, 2000, temperature=1.0, top_k=3, top_p=0.95)
    assert both.unique().tolist() == [0, 1, 2]


def test_a_nucleus_larger_than_the_candidates_is_sampled_in_full() -> None:
    logits = torch.zeros(3000)
    tokens = sample_many(logits, 4000, temperature=1.0, top_p=0.95)
    assert len(tokens.unique()) > 1500


def test_searching_candidates_and_sorting_sample_the_same_tokens() -> None:
    rows, generator = 500, torch.Generator().manual_seed(1)
    logits = torch.randn(rows, 2000, generator=generator) * torch.linspace(0.1, 4, rows)[:, None]
    temperature, top_p = torch.full((rows,), 0.7), torch.full((rows,), 0.8)
    top_k = torch.arange(rows) % 5 * 200
    uniform = torch.rand(rows, dtype=torch.float64, generator=generator)
    for limit in (None, top_k):
        found = CPU.sample(logits, temperature, limit, top_p, uniform)
        assert torch.equal(found, sample_sorted(logits, temperature, limit, top_p, uniform))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_searching_and_sorting_agree_among_equal_logits(dtype: torch.dtype) -> None:
    rows, generator = 300, torch.Generator().manual_seed(2)
    logits = torch.randint(-40, 40, (rows, 3000), generator=generator) * 2.0**-6
    logits[:50] += torch.rand(50, 3000, generator=generator)
    logits[50:60] *= -0.0
    logits[60:70, ::2] = -torch.inf
    temperature, logits = torch.full((rows,), 0.7), logits.to(dtype)
    top_p = torch.rand(rows, generator=generator) * 0.5 + 0.5
    uniform = torch.rand(rows, dtype=torch.float64, generator=generator)
    uniform[::7] = 0.0
    found = CPU.sample(logits, temperature, None, top_p, uniform)
    assert torch.equal(found, sample_sorted(logits, temperature, None, top_p, uniform))
    one = []
    for row in (slice(i, i + 1) for i in range(0, rows, 30)):
        one.append(CPU.sample(logits[row], temperature[row], None, top_p[row], uniform[row]))
    assert torch.equal(torch.cat(one), found[::30])


def test_a_row_of_nan_samples_a_valid_token() -> None:
    one = torch.ones(2)
    for limit in (None, torch.tensor([0, 3])):
        found = CPU.sample(torch.full((2, 700), torch.nan), one, limit, one / 2, one.double() / 2)
        assert found.min() >= 0
        assert found.max() < 700


@pytest.mark.parametrize("vocab", [700, 5000])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_reported_and_its_last_token_is_valid(
    vocab: int, value: float
) -> None:
    random_ = SamplingParams(temperature=1)
    every = [SamplingParams(), random_, SamplingParams(temperature=1, top_p=0.5)]
    every.append(SamplingParams(logprobs=2))
    logits = torch.randn(2 * len(every), vocab, generator=torch.Generator().manual_seed(0))
    logits[0::2] = value
    logits[0::2, 1:] = value if value < 0 else 0.0
    for params in ([p for each in every for p in (each, each)], [random_] * 8, []):
        sampler, rows = Sampler(8, CPU), torch.arange(8)
        if params:
            sampler.set_params(rows.tolist(), params)
        non_greedy = dict(enumerate(params))
        tokens, _ = sampler.sample(logits, rows, rows, non_greedy, not non_greedy).read()
        assert tokens[0::2] == [NO_TOKEN] * 4
        assert tokens[1::2] == sampler.last[1::2].tolist()
        assert sampler.last.min() >= 0
        assert sampler.last.max() < vocab


def test_tokens_with_probability_zero_are_never_sampled() -> None:
    logits = torch.full((2000, 700), float("-inf"))
    logits[:, 5:9] = torch.tensor([0.0, -200.0, 1.0, 0.0])  # the second's probability underflows
    tokens, _ = sample(
        logits, [SamplingParams(temperature=1, seed=i) for i in range(2000)], [0] * 2000
    )
    assert sorted(set(tokens)) == [5, 7, 8]


@pytest.mark.parametrize("backend", [CPU, Backend(CPU.device, CPU.dtype)])
def test_a_row_takes_the_parameters_of_the_sequence_that_starts_in_it(backend: Backend) -> None:
    """Also a greedy sequence, after one with a temperature, in the same row or in another."""
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(3)) / 4
    greedy, whole = SamplingParams(), SamplingParams(temperature=2.0, seed=1)
    truncated = SamplingParams(temperature=2.0, top_k=300, top_p=0.9, seed=1)
    rows = torch.tensor([2, 0, 1])

    def sample_after(*history: list[SamplingParams]) -> list[int]:
        sampler = Sampler(4, backend)
        for params in history:
            sampler.set_params(rows.tolist(), params)
        tokens = sampler.sample_rows(logits, rows, rows.int()).tolist()
        assert sampler.last[rows].tolist() == tokens
        return tokens

    mixed = [truncated, greedy, whole]
    expected = sample_after(mixed)
    assert expected[1] == logits[1].argmax()
    assert expected[0] != logits[0].argmax()
    assert expected[2] != logits[2].argmax()
    assert sample_after([greedy, whole, truncated], [whole, truncated, greedy], mixed) == expected
    assert sample_after(mixed, [greedy] * 3) == logits.argmax(-1).tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=8), st.data())
def test_a_sample_does_not_depend_on_the_rest_of_the_batch(
    seeds: list[int], data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(len(seeds))
    logits = torch.randn(len(seeds), 600, generator=generator) * data.draw(st.floats(0.1, 5))
    params = [
        SamplingParams(
            seed=seed,
            temperature=data.draw(st.sampled_from([0.0, 0.7, 1.5])),
            top_k=data.draw(st.sampled_from([0, 1, 40, 500])),
            top_p=data.draw(st.sampled_from([0.3, 0.95, 1.0])),
        )
        for seed in seeds
    ]
    batched, _ = sample(logits, params, [3] * len(seeds))
    alone = [sample(logits[i : i + 1], [params[i]], [3])[0][0] for i in range(len(seeds))]
    assert batched == alone


def test_greedy_sampling_takes_the_most_likely_token() -> None:
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample(logits, [SamplingParams()] * 5, [0] * 5)
    assert tokens == logits.argmax(-1).tolist()
    assert logprobs == {}


@pytest.mark.parametrize("vocab", [1, 700, 2048, 5000, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_sampling_takes_the_first_of_equal_tokens(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    for levels in (1, 3, 1000):
        logits = torch.randint(levels, (40, vocab), generator=generator).to(dtype)
        logits[:3, -1] = logits.max() + 2
        tokens, _ = sample(logits, [SamplingParams()] * 40, [0] * 40)
        assert tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 400}])
@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-40, 1e-45, 5e-324])
@pytest.mark.parametrize("backend", [CPU, Backend(CPU.device, CPU.dtype)])
def test_a_tiny_temperature_samples_the_greedy_token(
    backend: Backend, temperature: float, limits: dict[str, float]
) -> None:
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(5)) * 20
    sampler, rows = Sampler(3, backend), [0, 1, 2]
    params = [
        SamplingParams(temperature=temperature, seed=i, **limits)  # type: ignore[arg-type]
        for i in rows
    ]
    sampler.set_params(rows, params)
    found = sampler.sample(
        logits, torch.tensor(rows), torch.tensor(rows), dict(enumerate(params)), False
    )
    assert found.read()[0] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_the_greedy_token_is_the_first_of_the_most_likely_ones(count: int) -> None:
    """Also among equal logits, and where a log-probability rounds several logits to one value."""
    logits = torch.zeros(5, 5000)
    logits[1, [4000, 17, 30]] = 3.0
    logits[2] = -0.0
    logits[2, 1::2] = 0.0
    logits[3, 70:] = 12345.0
    logits[4, 11], logits[4, 9] = 1.0, torch.tensor(1.0).nextafter(torch.tensor(0.0))
    params = [SamplingParams(logprobs=count)] * 5
    tokens, logprobs = sample(logits, params, [0] * 5)
    assert tokens == [0, 17, 0, 70, 11]
    for row, token in enumerate(tokens):
        top = [token_id for token_id, _ in logprobs[row].top]
        assert top[:1] == [token][:count]
        _, ids = logits[row].sort(descending=True, stable=True)
        assert top == ids[:count].tolist()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_most_likely_tokens_are_those_of_a_stable_sort(data: st.DataObject) -> None:
    values = st.sampled_from([-1.5, -0.0, 0.0, 1.0, 1.0000001, 7.0, float("-inf")])
    size = data.draw(st.integers(1, 40))
    rows = data.draw(st.lists(st.lists(values, min_size=size, max_size=size), max_size=4))
    logits = torch.tensor(rows).view(len(rows), size)
    count = data.draw(st.integers(1, 45))
    expected, order = logits.sort(dim=-1, descending=True, stable=True)
    for backend in (CPU, Backend(CPU.device, CPU.dtype)):
        found, ids = backend.top_tokens(logits, count)
        assert torch.equal(ids, order[:, :count])
        assert torch.equal(found, expected[:, :count])


def test_uniform_numbers_are_uniform_and_differ_by_seed_and_position() -> None:
    seeds = torch.arange(300).repeat_interleave(300)
    positions = torch.arange(300).repeat(300)
    u = keyed_uniform(seeds, positions)
    assert ((u >= 0) & (u < 1)).all()
    assert len(u.unique()) == len(u)
    counts = (u * 100).long().bincount(minlength=100).double()
    assert ((counts - 900) ** 2 / 900).sum() < 160  # chi-square, 99 degrees of freedom
    grid = u.view(300, 300)
    for a, b in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:])):
        pair = torch.stack((a.flatten(), b.flatten()))
        assert torch.corrcoef(pair)[0, 1].abs() < 0.015


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("top_k", -1), ("max_new_tokens", -1)],
)
def test_a_parameter_out_of_range_is_named(parameter: str, value: float) -> None:
    with pytest.raises(ValueError, match=parameter):
        SamplingParams(**{parameter: value})  # type: ignore[arg-type]
