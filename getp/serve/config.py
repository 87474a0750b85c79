"""The settings of a server, and its limits."""

from dataclasses import dataclass
from pathlib import Path

from getp.job.job import Job

MAX_BODY_BYTES = 16 << 20
"""Of a request that is not an upload: about a million tokens of text."""

MAX_FILE_BYTES = 1 << 30
MAX_FILES = 10_000
MAX_ACTIVE_BATCHES = 16
"""Batches that run at once; others wait."""

MAX_UNFINISHED_BATCHES = 1000

MAX_SAMPLES = 128
"""Answers of one request: its prompts times n."""

MAX_HEADER_BYTES = 64 << 10
HEADER_S = 20.0
"""Seconds in which a client must send the head of a request, or read something of an answer."""

BODY_S = 60.0
"""Seconds in which a client must send the body of a request that is not an upload."""

UPLOAD_S = 3600.0
PIECE_S = 30.0
"""Longest pause between two pieces of a body."""

MAX_CONNECTIONS = 4096


@dataclass(frozen=True)
class ServeConfig:
    """Where a server listens, who may use it, and what its requests have in common."""

    host: str
    port: int  # 0: a free one
    model_name: str  # for clients
    job: Job  # the defaults of requests; its input and output are those of each batch
    api_key: str | None = None
    insecure: bool = False  # whether other machines may use it without a key
    data: Path | None = None  # folder of files and batches; None: there are none
    max_queue: int = 1024  # online requests that may wait
    grace_s: float = 10.0  # for running requests, after a signal
