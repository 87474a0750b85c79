"""Cases of sampling from logits."""

from collections.abc import Callable, Iterator

import torch

from model.checks.case import Case, Tensors
from model.checks.inputs import Inputs
from model.ops.backend import Backend


def sample_cases(vocab: int, inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of sampling with top-p, with and without top-k."""
    yield _sample_case(1, vocab, True, inputs)
    for with_top_k in (False, True):
        yield _sample_case(inputs.size.rows, vocab, with_top_k, inputs)
    logits = torch.full((2, vocab), float("nan"), device=inputs.device)
    arguments = _arguments(2, inputs)

    def prepare(backend: Backend) -> Callable[[], Tensors]:
        return lambda: (_is_token(backend.sample(logits, *arguments), vocab),)

    yield Case("sample", "rows of NaN", prepare, logits.nbytes, 0)


def _arguments(rows: int, inputs: Inputs) -> list[torch.Tensor]:
    """Return temperature, top_k, top_p and uniform of `Backend.sample`."""
    row = torch.arange(rows, device=inputs.device)
    uniform = torch.rand(
        rows, dtype=torch.float64, generator=inputs.generator, device=inputs.device
    )
    top_p = torch.where(row % 5 == 4, 1.0, 0.95 - 0.11 * (row % 5))
    temperature = 0.6 + 0.2 * (row % 3)
    return [temperature, (row + 1) % 3 * 20, top_p, uniform]


def _sample_case(rows: int, vocab: int, with_top_k: bool, inputs: Inputs) -> Case:
    spread = torch.linspace(1, 4, rows, device=inputs.device)[:, None]
    logits = inputs.normal(rows, vocab, dtype=torch.float32) * spread
    temperature, top_k, top_p, uniform = _arguments(rows, inputs)

    def prepare(backend: Backend) -> Callable[[], Tensors]:
        def call() -> Tensors:
            tokens = backend.sample(
                logits, temperature, top_k if with_top_k else None, top_p, uniform
            )
            # Rounding can select a token with a nearly equal logit, so logits are compared.
            at = tokens.clamp(0, vocab - 1).unsqueeze(1)
            return _is_token(tokens, vocab), logits.gather(1, at)

        return call

    label = f"{rows} rows, top-p" + (" and top-k" if with_top_k else "")
    return Case("sample", label, prepare, logits.nbytes, 0, is_timed=True)


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
