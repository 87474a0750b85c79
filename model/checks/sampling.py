"""Cases of sampling from logits."""

from collections.abc import Callable, Iterator

import torch

from model.checks.case import Case, Tensors
from model.checks.inputs import Inputs
from model.ops.adjustments import NO_FACTORS
from model.ops.backend import Backend
from model.ops.specs import AdjustmentTables, SamplingTables


def sample_cases(vocab: int, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of sampling rows of all kinds, and of greedy ones alone."""
    yield _sample_case(inputs.size.rows, vocab, inputs, is_greedy=True)
    for rows in (1, inputs.size.rows):
        yield _sample_case(rows, vocab, inputs)
    logits = torch.full((2, vocab), float("nan"), device=inputs.device)
    row, positions, tables = _arguments(2, inputs)

    def prepare(backend: Backend) -> Callable[[], Tensors]:
        def call() -> Tensors:
            last = torch.zeros_like(row)
            tokens = backend.sample_rows(logits, row, last, positions, tables)
            return tokens, _is_token(last, vocab)

        return call

    yield Case("sample_rows", "rows of NaN", prepare, logits.nbytes, 0)


def _arguments(rows: int, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, SamplingTables]:
    """Return rows, positions and tables of `Backend.sample_rows`: every seventh row is greedy."""
    row = torch.arange(rows, device=inputs.device)
    top_p = torch.where(row % 5 == 4, 1.0, 0.95 - 0.11 * (row % 5))
    temperature = torch.where(row % 7 == 6, 0.0, 0.6 + 0.2 * (row % 3))
    tables = SamplingTables(
        torch.stack((temperature, top_p), 1), torch.stack(((row + 1) % 3 * 20, row + 1), 1)
    )
    return row, row + 100, tables


def _sample_case(rows: int, vocab: int, inputs: Inputs, is_greedy: bool = False) -> Case:
    spread = torch.linspace(1, 4, rows, device=inputs.device)[:, None]
    logits = inputs.normal(rows, vocab, dtype=torch.float32) * spread
    row, positions, tables = _arguments(rows, inputs)

    def prepare(backend: Backend) -> Callable[[], Tensors]:
        def call() -> Tensors:
            last = torch.zeros_like(row)
            how = () if is_greedy else (positions, tables)
            tokens = backend.sample_rows(logits, row, last, *how)
            # Rounding can select a token with a nearly equal logit, so logits are compared.
            at = tokens.clamp(0, vocab - 1).unsqueeze(1)
            return _is_token(tokens, vocab), logits.gather(1, at), last == tokens

        return call

    label = f"{rows} rows, " + ("greedy" if is_greedy else "all kinds")
    return Case("sample_rows", label, prepare, logits.nbytes, 0, is_timed=True)


def _is_token(tokens: torch.Tensor, vocab: int) -> torch.Tensor:
    return (tokens >= 0) & (tokens < vocab)


def argmax_cases(vocab: int, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of the largest logit: ordinary rows, and one with a NaN."""
    for rows in (1, 5, inputs.size.rows):
        logits = inputs.normal(rows, vocab, dtype=torch.float32)
        logits[0, -1] = 100.0  # the last token of the vocabulary

        def prepare(backend: Backend, logits: torch.Tensor = logits) -> Callable[[], Tensors]:
            return lambda: backend.argmax(logits)

        yield Case("argmax", f"{rows} rows", prepare, logits.nbytes, 0)
    broken = inputs.normal(2, vocab, dtype=torch.float32)
    broken[1, vocab // 2] = float("nan")

    def prepare_broken(backend: Backend) -> Callable[[], Tensors]:
        return lambda: (backend.argmax(broken)[0].isnan(),)

    yield Case("argmax", "a NaN", prepare_broken, broken.nbytes, 0)


def top_tokens_cases(vocab: int, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of the most likely tokens; many logits are equal."""
    for rows in (1, 5):
        logits = (inputs.normal(rows, vocab, dtype=torch.float32) * 4).round()

        def prepare(backend: Backend, logits: torch.Tensor = logits) -> Callable[[], Tensors]:
            return lambda: backend.top_tokens(logits, 20)

        yield Case("top_tokens", f"{rows} rows", prepare, logits.nbytes, 0)


def adjust_cases(vocab: int, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of changes of logits: rows with biases, a mask, penalties, min-p, or none."""
    for rows in (1, inputs.size.rows):
        yield _adjust_case(rows, vocab, inputs)


def _adjust_case(rows: int, vocab: int, inputs: Inputs) -> Case:
    logits = inputs.normal(rows, vocab, dtype=torch.float32) * 3
    row = torch.arange(rows, device=inputs.device)
    left = rows - 1 - row  # so that the last row, which a wrong grid leaves out, has every change
    is_penalized, has_min_p = left % 3 == 0, left % 2 == 0
    factors = torch.stack((1.2 + row * 0, 0.1 + row * 0, 0.3 + row * 0, -10.0 + row * 0), 1)
    neutral = torch.tensor(NO_FACTORS, device=inputs.device)
    factors[:, :3] = torch.where(is_penalized[:, None], factors[:, :3], neutral[:3])
    factors[:, 3] = torch.where(has_min_p, factors[:, 3], neutral[3])
    starts = torch.stack((100 + left % 2, (left + 1) % 5 * 4, is_penalized, left % 4 == 0), 1).int()
    token = torch.arange(vocab, device=inputs.device)
    counts = ((token + row[:, None]) % 11 % 5).to(torch.int16)
    entries = torch.zeros(rows, 16, 4, dtype=torch.int32, device=inputs.device)
    entries[:, :, 0] = torch.arange(16, device=inputs.device) * (vocab // 16)
    entries[:, :, 2], entries[:, :, 3] = 1 << 30, -1
    biases = torch.ones(rows, 16, device=inputs.device)
    masks = torch.full((rows, -(-vocab // 32)), 0x5A0F83C1, dtype=torch.int32, device=inputs.device)

    def prepare(backend: Backend) -> Callable[[], Tensors]:
        def call() -> Tensors:
            own = counts.clone()
            tables = AdjustmentTables(factors, starts, own, entries, biases, masks)
            last = row % vocab
            found = backend.adjust_logits(logits.clone(), row, last, row * 0 + 101, tables)
            # Rounding decides about logits at the end of min-p: they are removed here in any case.
            least = torch.where(has_min_p, found.amax(1) + factors[:, 3], -torch.inf)[:, None]
            is_kept = found > least + 1e-3
            is_too_low = (found > -torch.inf) & (found < least - 1e-3)
            return found.masked_fill(~is_kept, 0), is_kept, is_too_low, own

        return call

    return Case("adjust_logits", f"{rows} rows", prepare, logits.nbytes, 0)
