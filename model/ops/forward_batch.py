"""The input of one forward pass: the flat tokens of many sequences, without padding."""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class GroupTables:
    """The KV blocks of one layer group (layers that share an attention window).

    Block 0 is the null block: it is never written, always zero, and takes the place of blocks that
    were freed behind the window.
    """

    block_table: torch.Tensor  # int32 [sequences, blocks]: block ids at absolute positions
    slot_mapping: torch.Tensor  # int64 [tokens]: the block · block_size + offset each token writes
    plan: Any = field(default=None, repr=False)  # derived by a backend's attention, once per step


@dataclass
class ForwardBatch:
    """The tokens of one step; sequences with a single query token come first.

    In each layer every sequence writes its new tokens' KV before any attends, so a sequence may
    read blocks that another one fills in the same step.

    Lengths exist twice: as lists for operations that loop over sequences on the host, and as
    tensors on the device for kernels. A captured step is replayed with new tensors and without
    lists, so kernels read the tensors.
    """

    token_ids: torch.Tensor  # int64 [tokens]
    positions: torch.Tensor  # int64 [tokens]: rows of the rotary table, see RopeConfig.first_row
    host_query_lens: list[int]  # [sequences]: new tokens of each sequence; they sum to `tokens`
    host_context_lens: list[int]  # [sequences]: tokens attended to, the new ones included
    num_single: int  # sequences at the front whose query length is 1
    groups: tuple[GroupTables, ...]
    logits_rows: torch.Tensor  # int64 [rows]: indices of the tokens that need logits
    cu_seqlens_q: torch.Tensor  # int32 [sequences + 1]: each sequence's first token, then `tokens`
    context_lens: torch.Tensor  # int32 [sequences]: as host_context_lens
    # int64 [sequences]: rows of the states of recurrent layers; None: the model has none. A
    # sequence whose context consists of its new tokens begins without a state.
    state_rows: torch.Tensor | None = None
