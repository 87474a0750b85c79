"""Log-probabilities of the tokens of prompts, in pieces: the logits of a prompt are never whole."""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from engine.execution.batch_builder import int64
from engine.execution.sampler import Sampler
from engine.execution.transfer import to_device
from engine.scheduling.sequence import Step

_MAX_PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class Targets:
    """The tokens that a step scores, and how many most likely ones it returns beside each."""

    tokens: list[int]
    count: int

    @staticmethod
    def of(step: Step) -> "Targets | None":
        """The targets of a step; None if it scores nothing."""
        scored = [(chunk.sequence.request, chunk.scored) for chunk in step.chunks if chunk.scored]
        if not scored:
            return None
        return Targets(
            [token for request, at in scored for token in request.prompt_ids[at.start : at.stop]],
            max(request.params.prompt_logprobs or 0 for request, _ in scored),
        )


def score(
    sampler: Sampler,
    logits: Callable[[torch.Tensor], torch.Tensor],
    rows: SequenceOf[tuple[int, int]],
    targets: Targets | None,
) -> tuple[torch.Tensor, ...]:
    """The results of `Sampler.score` for all scored rows; nothing on ranks other than 0.

    logits: rows int64 [n] → float32 [n, this rank's part of the vocabulary]; rows: ranges, each the
    first row and their number; targets: None on ranks other than 0.
    """
    device = sampler.last.device
    every = torch.cat([torch.arange(first, first + count) for first, count in rows])
    tokens = torch.zeros_like(every) if targets is None else int64(targets.tokens)
    # No more rows than a step may sample, for which there is memory.
    size = max(1, min(len(sampler.last) - 1, _MAX_PIECE_BYTES // (4 * sampler.vocab)))
    pieces = []
    for own, own_tokens in zip(every.split(size), tokens.split(size), strict=True):
        piece = logits(to_device(own, device))
        count = 0 if targets is None else targets.count
        pieces.append(sampler.score(piece, to_device(own_tokens, device), count))
    if targets is None:
        return ()
    return tuple(torch.cat(each) for each in zip(*pieces, strict=True))
