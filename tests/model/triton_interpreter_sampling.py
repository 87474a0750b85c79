"""Compare the sampling of a step's rows with references, in Triton's interpreter.

test_triton.py runs this file, as it runs triton_interpreter.py.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.ops.sampling import NO_TOKEN, keyed_uniform
from model.ops.specs import SamplingTables
from model.ops.triton import sampling
from model.ops.triton.backend import TritonBackend
from model.ops.triton.kernels.sampling.choose import _keyed_uniform
from model.ops.triton.tiles import target_of
from tests.model.adjustment_cases import adjusted, random_tables
from tests.model.ops_helpers import CPU, cpu_backend, reference
from tests.model.test_ops import rand

REFERENCE, KERNELS = reference(), TritonBackend(CPU, torch.float32)
_ALMOST_1 = 1 - 2.0**-53


class Row(NamedTuple):
    """The parameters of one row; uniform: its random number."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    uniform: float = 0.5


def seed_of(uniform: float) -> int:
    """The seed with this number at position 0: `keyed_uniform` backwards."""
    bits = int(uniform * 2**53) << 11
    for _ in range(2):
        for shift, factor in ((31, -7723592293110705685), (27, -4658895280553007687), (30, 1)):
            bits ^= bits >> shift ^ bits >> 2 * shift
            bits = bits * pow(factor, -1, 1 << 64) % (1 << 64)
    return bits - (bits >> 63 << 64)


def run(logits: torch.Tensor, rows: list[Row], ops: Any = KERNELS) -> torch.Tensor:
    """The tokens of rows that are in reverse order in the tables; `last` holds them, too."""
    tables = SamplingTables(
        torch.tensor([(row.temperature, row.top_p) for row in rows]).flip(0),
        torch.tensor([(row.top_k, seed_of(row.uniform)) for row in rows]).flip(0),
    )
    index = torch.arange(len(rows)).flip(0)
    last = torch.full((len(rows),), -7)
    tokens: torch.Tensor = ops.sample_rows(
        logits, index, last, torch.zeros(len(rows), dtype=torch.int32), tables
    )
    last = last.flip(0)
    assert ((last >= 0) & (last < logits.shape[1])).all()
    assert torch.equal(tokens, torch.where(logits.amax(1).isfinite(), last, NO_TOKEN))
    return tokens


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make rows take several blocks and chunks, the last of which is not full."""
    for name, size in (("_BLOCK", 32), ("_CHUNK", 64)):
        monkeypatch.setattr(sampling, name, size)


def various(count: int, vocab: int) -> list[Row]:
    """Rows of all kinds."""
    random = np.random.default_rng(vocab)
    rows = []
    for i in range(count):
        top_k = (0, 1, 5, int(random.integers(1, 2 * vocab)))[i % 4]
        top_p = (1.0, 0.3, 0.9, float(np.float32(random.random() / 2 + 0.5)))[i // 4 % 4]
        temperature = 0.0 if i % 9 == 8 else random.random() + 0.5
        rows.append(Row(temperature, top_k, top_p, random.random()))
    return rows


def distinct(rows: int, vocab: int) -> torch.Tensor:
    """Logits with ties; they are multiples of 2⁻⁶, so that different ones have different keys."""
    logits = (rand(rows, vocab) * 256).round() / 64
    logits[: rows // 2] = logits[: rows // 2].round()
    return logits


@triton.jit
def _store_uniform(seeds_ptr, positions_ptr, found_ptr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0)
    uniform = _keyed_uniform(tl.load(seeds_ptr + i), tl.load(positions_ptr + i))
    tl.store(found_ptr + i, uniform)


def test_random_numbers_are_those_of_the_reference_bit_for_bit() -> None:
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789, seed_of(_ALMOST_1)])
    positions = torch.tensor([0, 5, 7, 2**31 - 1, 131_071, 1, 0])
    found = torch.empty(len(seeds), dtype=torch.float64)
    _store_uniform[(len(seeds),)](seeds, positions, found)
    assert torch.equal(found, keyed_uniform(seeds, positions))
    assert found[-1] == _ALMOST_1


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("vocab", [1, 7, 130])
def test_a_step_of_all_kinds_of_rows_equals_the_reference(vocab: int) -> None:
    rows, logits = various(18, vocab), distinct(18, vocab)
    rows[3] = Row(0.7, 3 * vocab, 0.001, 0.0)
    rows[4] = Row(1.3, 0, 1.0, _ALMOST_1)
    rows[5] = Row(1.3, min(3, vocab), 1.0, _ALMOST_1)
    logits[6, 1:] = float("-inf")
    assert torch.equal(run(logits, rows), run(logits, rows, REFERENCE))
    greedy = torch.zeros(18, dtype=torch.int64)
    tokens = KERNELS.sample_rows(logits, torch.arange(18), greedy)
    assert torch.equal(tokens, logits.argmax(1))
    assert torch.equal(tokens, greedy)


def oracle(logits: np.ndarray, row: Row) -> set[int]:
    """The tokens that may be sampled where sums and probabilities are rounded, in float64."""
    vocab = len(logits)
    if row.temperature == 0:
        return {int(logits.argmax())}
    in_order = row.top_k > 0 or row.top_p < 1
    ids = np.argsort(-logits, kind="stable") if in_order else np.arange(vocab)
    probs = np.exp((logits[ids] - logits.max()) / np.float64(np.float32(row.temperature)))
    probs[row.top_k or vocab :] = 0
    found = set()
    before = np.cumsum(probs) - probs
    for share in (-1e-6, 0, 1e-6) if row.top_p < 1 else (0,):
        limit = np.float64(np.float32(row.top_p)) * (1 + share) * probs.sum()
        is_kept = (before < limit) | (ids == ids[0]) if row.top_p < 1 else probs >= 0
        cumulative = np.cumsum(np.where(is_kept, probs, 0))
        for error in (-1e-6, 0, 1e-6):
            target = np.clip(row.uniform + error, 0, 1 - 1e-12) * cumulative[-1]
            found.add(int(ids[np.searchsorted(cumulative, target, side="right")]))
    return found


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
@pytest.mark.usefixtures("small_blocks")
def test_tokens_are_those_of_a_plain_computation(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(1, 150))
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    levels = data.draw(st.sampled_from([1, 2, 10, 1000]))
    width = data.draw(st.sampled_from([0.0, 0.5, 3.0, 20.0]))
    logits = np.round(random.standard_normal((3, vocab)) * levels) / levels * width
    logits = np.round(logits * 64) / 64
    logits[1, random.random(vocab) < 0.3] = -np.inf
    logits[1, random.integers(vocab)] = width
    rows = [
        Row(
            data.draw(st.sampled_from([0.0, 2.0**-126, 1e-3, 0.6, 1.0, 1.5])),
            data.draw(st.sampled_from([0, 1, 2, 5, 50, vocab, 10**12])),
            data.draw(st.sampled_from([1.0, 1e-6, 0.5, 0.9, 0.99, 1 - 2.0**-24])),
            data.draw(st.sampled_from([0.0, 0.123, 0.5, 0.987, _ALMOST_1])),
        )
        for _ in logits
    ]
    tokens = run(torch.tensor(logits, dtype=torch.float32), rows).tolist()
    for token, own, row in zip(tokens, logits, rows, strict=True):
        assert token in oracle(own, row), row


class Recorded:
    """`choose_tokens`, and the numbers of listed tokens that it got."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.counts = args[7][:, 0].tolist()
            choose_tokens[grid](*args, **options)

        return launch


choose_tokens = sampling.choose_tokens


def test_a_list_of_candidates_does_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    """Peaked rows are searched in short lists, flat ones in full: the tokens are the same."""
    vocab, recorded = 600, Recorded()
    monkeypatch.setattr(sampling, "_CHUNK", 256)
    zipf = -1.5 * torch.arange(1.0, vocab + 1).log()[torch.randperm(vocab)] * 2
    peaked = [
        Row(0.8, 0, 0.9, 0.95),
        Row(1.0, 0, 0.5, 0.3),
        Row(1.0, 10, 0.95, 0.7),
        Row(0.9, 3, 1.0, _ALMOST_1),
        Row(1.0, 40, 0.9, 0.99),  # more tokens than there are blocks
    ]
    flat = [Row(1e4, 0, 0.9, 0.6), Row(1e4, 400, 1.0, 0.9), Row(2.0, 500, 0.99, 0.999)]
    full = [Row(0.0), Row(1.0, 0, 1.0, 0.7)]
    rows = [*peaked, *flat, *full]
    logits = zipf.expand(len(rows), -1) + rand(len(rows), vocab) / 9
    monkeypatch.setattr(sampling, "choose_tokens", recorded)
    found = run(logits, rows)
    counts = recorded.counts
    assert min(counts[:5]) > 0
    assert max(counts[:5]) < 200
    assert counts[5] > 500
    assert counts[8:] == [0, 0]
    monkeypatch.setattr(sampling, "_CAPACITY", 0)
    for capacity in (1, 30):  # the second is enough for some
        monkeypatch.setattr(sampling, "_LEAST", capacity)
        assert torch.equal(run(logits, rows), found)
    assert recorded.counts == counts
    expected = run(logits, rows, REFERENCE)
    assert torch.equal(found[[*range(5), 8, 9]], expected[[*range(5), 8, 9]])


@pytest.mark.usefixtures("small_blocks")
def test_logits_that_share_a_key_are_nearly_equally_likely() -> None:
    logits, rows = rand(9, 300), various(9, 300)
    both = torch.stack((run(logits, rows), run(logits, rows, REFERENCE)), 1)
    found, expected = logits.gather(1, both).unbind(1)
    # A key's width, and the neighbour at which rounding may sample.
    assert (found - expected).abs().median() < 2**-10
    assert (found - expected).abs().max() < 0.1


@pytest.mark.usefixtures("small_blocks")
def test_a_tiny_temperature_samples_the_largest_logit() -> None:
    logits = rand(4, 130)
    temperatures = (1e-3, 1e-30, 2.0**-126, 2.0**-126)
    for top_k, top_p in ((0, 1.0), (0, 0.99), (3, 1.0)):
        rows = [
            Row(temperature, top_k, top_p, uniform)
            for temperature, uniform in zip(temperatures, (0, 0.3, 0.9, _ALMOST_1), strict=True)
        ]
        assert torch.equal(run(logits, rows), logits.argmax(-1))


@pytest.mark.usefixtures("small_blocks")
def test_of_equal_logits_the_first_are_kept_and_sampled() -> None:
    logits = torch.zeros(5, 140)
    logits[1] = -0.0
    logits[1, ::2] = 0.0
    logits[2, 3::4] = 1.0
    logits[3] = float("-inf")
    logits[3, [8, 30]] = 2.0
    rows = [
        Row(1.0, 5, 1.0, 0.999),
        Row(1.0, 0, 0.5, 0.37),
        Row(1.0, 17, 0.9, 0.62),
        Row(1.0, 1, 1.0, 0.5),
        Row(1.0, 0, 1.0, 0.999),
    ]
    assert run(logits, rows).tolist() == run(logits, rows, REFERENCE).tolist()
    assert run(logits, [row._replace(temperature=0.0) for row in rows]).tolist() == [0, 0, 3, 8, 0]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("limits", [(4, 0.85), (0, 1.0)])
def test_samples_follow_the_distribution(limits: tuple[int, float]) -> None:
    count, logits = 20, torch.tensor([0.0, 2.0, 1.0, 1.5, -1.0, 0.5])
    # Uniform numbers at equal distances, so counts differ by at most one.
    rows = [Row(1.0, *limits, (i + 0.5) / count) for i in range(count)]
    counts = run(logits.expand(count, -1), rows).bincount(minlength=6)
    # Three of the four that top-k keeps reach 0.85; of all six it would take four.
    kept = logits.exp() * torch.tensor([0, 1, 1, 1, 0, 0]) if limits[0] else logits.exp()
    assert (counts - count * kept / kept.sum()).abs().max() <= 1


def test_rows_that_are_not_finite_are_marked_and_have_valid_last_tokens() -> None:
    logits = rand(12, 70)
    logits[:4] = float("nan")
    logits[4:8] = float("-inf")
    logits[1, 5] = logits[9, 5] = 1.0
    logits[8:11, 3] = float("inf")
    kinds = [Row(), Row(0.0), Row(1.0, 3), Row(1.0, 0, 0.9)]
    tokens = run(logits, kinds * 3)
    assert tokens[:11].tolist() == [NO_TOKEN] * 11
    assert tokens[11] >= 0
    last = torch.zeros(12, dtype=torch.int64)
    greedy = KERNELS.sample_rows(logits, torch.arange(12), last)
    assert greedy.tolist() == [NO_TOKEN] * 11 + [int(logits[11].argmax())]
    assert last[[8, 9, 10]].tolist() == [3, 3, 3]


@pytest.mark.usefixtures("small_blocks")
def test_a_sample_depends_on_neither_the_split_of_rows_nor_the_batch() -> None:
    rows, logits = various(9, 130), distinct(9, 130)
    logits[:2] = logits[:2].clamp(max=2)  # many equal logits in every part of a row
    expected = run(logits, rows)
    for processors in (1, 40):
        target = replace(target_of(CPU), processors=processors)
        assert torch.equal(run(logits, rows, TritonBackend(CPU, logits.dtype, target)), expected)
    alone = [run(logits[i : i + 1], rows[i : i + 1]) for i in range(9)]
    assert torch.equal(torch.cat(alone), expected)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("vocab", [3, 130])
def test_adjusted_logits_equal_the_reference(vocab: int) -> None:
    rows, logits = 24, rand(24, vocab) * 3
    index, last = torch.arange(rows).flip(0), torch.arange(rows) % vocab
    positions = torch.tensor([10, 11] * 12, dtype=torch.int32)
    tables = random_tables(rows, vocab)
    expected = adjusted(logits, index.tolist(), last.tolist(), positions.tolist(), tables)
    for ops in (REFERENCE, KERNELS, cpu_backend()):
        own = random_tables(rows, vocab)
        found = ops.adjust_logits(logits.clone(), index, last, positions, own)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(own.counts, tables.counts)
