"""What one forward pass works on: flat tokens of many sequences, no padding."""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class GroupTables:
    """Where the KV of one layer group lies (layers that share an attention window).

    Block 0 is the null block: it is never written, always zero, and stands in block tables for
    blocks that were freed behind the window.
    """

    window: int | None
    block_table: torch.Tensor  # int32 [sequences, blocks]: block ids at absolute positions
    slots: torch.Tensor  # int64 [tokens]: block · block_size + offset that each token writes
    plan: Any = field(default=None, repr=False)  # what the device's attention derives once a step


@dataclass
class ForwardBatch:
    """The tokens of one step; sequences with a single query token come first.

    Every sequence writes its new tokens' KV before anything attends, layer by layer, so a
    sequence may read blocks that another one fills in the same step.

    Lengths are there twice: as lists for ops that loop over sequences on the host, as tensors on
    the device for kernels. A captured step is replayed with new tensors, so kernels read these.
    """

    token_ids: torch.Tensor  # int64 [tokens]
    positions: torch.Tensor  # int64 [tokens]
    query_lens: list[int]  # [sequences]: new tokens of each, their sum is `tokens`
    context_lens: list[int]  # [sequences]: tokens attended to, the new ones included
    num_single: int  # the first sequences, whose query length is 1
    groups: tuple[GroupTables, ...]
    logits_rows: torch.Tensor  # int64 [rows]: the tokens whose logits are wanted
    query_starts: torch.Tensor  # int32 [sequences + 1]: each one's first token, then `tokens`
    seen: torch.Tensor  # int32 [sequences]: `context_lens`
