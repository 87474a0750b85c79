"""A rank's share of a model that several ranks compute together, and how they exchange results."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Shard:
    """Which of `size` ranks this is; alone, every share is the whole and exchanges do nothing.

    Attention is shared by heads, dense MLPs by their inner size, experts whole, the embedding and
    the head by vocabulary. Collectives run on the device, in the same order on every rank, and
    wait for no host where the device has streams of its own.
    """

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, repr=False)  # torch.distributed.ProcessGroup

    def part(self, count: int) -> slice:
        """This rank's equal part of `count` things; `count` is a multiple of the size."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def kv_part(self, kv_heads: int) -> slice:
        """This rank's KV heads; where there are fewer than ranks, several ranks keep the same."""
        if kv_heads >= self.size:
            return self.part(kv_heads)
        first = self.rank * kv_heads // self.size
        return slice(first, first + 1)

    def vocab_part(self, vocab: int) -> slice:
        """This rank's tokens of the vocabulary; the last rank may have fewer."""
        each = -(-vocab // self.size)
        return slice(min(self.rank * each, vocab), min((self.rank + 1) * each, vocab))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's x, in place: the same bits on every rank."""
        if self.size > 1 and x.numel():
            self.group.allreduce([x]).wait()
        return x

    def vocab_columns(self, logits: torch.Tensor, vocab: int) -> torch.Tensor:
        """Every rank's logits [rows, its part] → [rows, vocab] on rank 0; nothing elsewhere."""
        if self.size == 1 or not len(logits):
            return logits
        each = -(-vocab // self.size)
        own = torch.nn.functional.pad(logits, (0, each - logits.shape[1])).contiguous()
        options = dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(own) for _ in range(self.size)] if self.rank == 0 else []
        self.group.gather([parts] if parts else [], [own], options).wait()
        return torch.cat(parts, dim=1)[:, :vocab] if parts else own[:, :0]

    def likeliest(
        self, values: torch.Tensor, tokens: torch.Tensor, vocab: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's largest logit and its token, the first of equal ones, on every rank.

        values [rows] and tokens int64 [rows]: the largest logit of this rank's part of the
        vocabulary, and where in the part it is. float64 holds both exactly, for one exchange.
        """
        if self.size == 1 or not len(tokens):
            return values, tokens
        tokens = tokens + self.vocab_part(vocab).start
        own = torch.stack((values.double(), tokens.double()))
        every = own.new_empty(self.size, *own.shape)
        self.group.allgather([list(every.unbind())], [own]).wait()
        highest, best = every[:, 0].max(0, keepdim=True)
        return highest.squeeze(0), every[:, 1].gather(0, best).squeeze(0).long()

    def from_first(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's x, in place."""
        if self.size > 1 and x.numel():
            options = dist.BroadcastOptions()
            options.rootRank = 0
            self.group.broadcast([x], options).wait()
        return x


ALONE = Shard()
