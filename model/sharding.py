"""Shard: one rank's share of a model that is split over ranks, and the collectives between ranks.

Only the collectives import torch, so that a model can be declared without it.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shard:
    """Which of `size` ranks this is; with one rank, its share is the whole model.

    Attention is split by head, dense MLPs by their inner size, experts are distributed whole, the
    embedding and the head are split by vocabulary. Collectives run on the device, in the same order
    on every rank; on a GPU they do not block the host.
    """

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, repr=False)  # torch.distributed.ProcessGroup

    def part(self, count: int) -> slice:
        """This rank's equal part of `count` items, a multiple of the number of ranks."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def kv_part(self, kv_heads: int) -> slice:
        """This rank's KV heads; with fewer heads than ranks, several ranks hold the same head."""
        if kv_heads >= self.size:
            return self.part(kv_heads)
        first = self.rank * kv_heads // self.size
        return slice(first, first + 1)

    def vocab_part(self, vocab: int) -> slice:
        """This rank's part of the vocabulary; the last rank may have fewer tokens."""
        each = -(-vocab // self.size)
        return slice(min(self.rank * each, vocab), min((self.rank + 1) * each, vocab))

    def sum(self, x: "torch.Tensor") -> "torch.Tensor":
        """All-reduce x in place; every rank gets the same bits."""
        if self.size > 1 and x.numel():
            self.group.allreduce([x]).wait()
        return x

    def gather_logits(self, logits: "torch.Tensor", vocab: int) -> "torch.Tensor":
        """Gather the logits [rows, part of the vocabulary] of all ranks on rank 0.

        Returns [rows, vocab] on rank 0 and [rows, 0] on other ranks.
        """
        if self.size == 1 or not len(logits):
            return logits
        import torch
        import torch.distributed as dist

        each = -(-vocab // self.size)
        own = torch.nn.functional.pad(logits, (0, each - logits.shape[1])).contiguous()
        options = dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(own) for _ in range(self.size)] if self.rank == 0 else []
        self.group.gather([parts] if parts else [], [own], options).wait()
        return torch.cat(parts, dim=1)[:, :vocab] if parts else own[:, :0]

    def argmax(
        self, values: "torch.Tensor", tokens: "torch.Tensor", vocab: int
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """The largest logit of each row and its token (of equal ones the first), on every rank.

        values [rows] and tokens int64 [rows]: the largest logit of this rank's part of the
        vocabulary, and its index in the part. float64 holds both exactly, so one exchange suffices.
        """
        if self.size == 1 or not len(tokens):
            return values, tokens
        import torch

        tokens = tokens + self.vocab_part(vocab).start
        own = torch.stack((values.double(), tokens.double()))
        every = own.new_empty(self.size, *own.shape)
        self.group.allgather([list(every.unbind())], [own]).wait()
        highest, best = every[:, 0].max(0, keepdim=True)
        return highest.squeeze(0), every[:, 1].gather(0, best).squeeze(0).long()

    def broadcast(self, x: "torch.Tensor") -> "torch.Tensor":
        """Rank 0's x on every rank, in place."""
        if self.size > 1 and x.numel():
            import torch.distributed as dist

            options = dist.BroadcastOptions()
            options.rootRank = 0
            self.group.broadcast([x], options).wait()
        return x


ALONE = Shard()
