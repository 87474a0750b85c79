"""Results of kernels that round differently: refused in 16 bits, unless the user accepts them.

In 16 bits, rounding often decides between two tokens that are nearly tied. In float32 it does so
only for tokens that are equally likely to the last digits, so a message is enough.
"""

from collections.abc import Mapping
from typing import Any

import torch

from engine.resolve import dtype_name
from getp import fingerprint
from getp.errors import GetpError, NameOf
from getp.terminal import print_message, warn

Rounding = Mapping[str, Any]
"""What the rounding of results depends on besides checkpoint and dtype."""


def check_resumed(
    journal: str, old: Rounding, new: Rounding, dtype: torch.dtype, accepted: bool, name_of: NameOf
) -> None:
    """Compare the rounding of a journal's requests with that of the rest of the job.

    accepted: whether results may round differently in 16 bits. Raises GetpError, or says what
    differs.
    """
    text, fields = fingerprint.changes(old, new)
    if not text:
        return
    fields |= {"name": dtype_name(dtype), "journal": journal}
    if dtype.itemsize > 2:
        notice = f"getp: this job was started with {text}: in {{name}}, this changes a result only"
        notice += " where two tokens are equally likely to the last digits"
        print_message(GetpError(notice, **fields).worded(name_of))
    elif accepted:
        notice = f"this job was started with {text}: where tokens are nearly tied, its results in "
        notice += "{name} are a mixture of both"
        warn(GetpError(notice, **fields).worded(name_of))
    else:
        raise GetpError(
            f"this job was started with {text}. In {{name}}, results depend on this where tokens "
            "are nearly tied. Resume the job as it was started, add {accept_different_rounding} to "
            "finish it like this, or {restart} to start over (journal: {journal})",
            **fields,
        )


def check_replica(
    replica: str, first: Rounding, other: Rounding, dtype: torch.dtype, accepted: bool
) -> None:
    """Compare the rounding of a replica with that of the first one. Raises GetpError.

    replica: its name and host, for the message.
    """
    text, fields = fingerprint.changes(other, first, "on the first replica")
    if text and dtype.itemsize <= 2 and not accepted:
        raise GetpError(
            f"{{replica}} has {text}. In {{name}}, a result would depend on the replica where "
            "tokens are nearly tied: use equal hosts, or add {accept_different_rounding}",
            **fields,
            replica=replica,
            name=dtype_name(dtype),
        )
