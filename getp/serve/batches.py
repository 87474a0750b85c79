"""Batches: their states, their records on disk, and the share of the engine that each gets."""

import copy
import fcntl
import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from engine import Request
from getp.errors import GetpError, worded
from getp.files import open_output
from getp.job.job import Job
from getp.openai.body import CHAT_URL, TEXT_URL
from getp.serve import config
from getp.serve.batch_run import BatchRun
from getp.serve.engine_thread import EngineThread, Finished
from getp.serve.errors import ApiError, not_found
from getp.serve.files import FileStore, new_key
from getp.terminal import print_message, warn
from tokenizer import Tokenizer

UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
_ID = re.compile(r"batch_[0-9a-f]{24}")
_WINDOW = re.compile(r"([0-9]{1,4})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_TIMES = "in_progress expires finalizing completed failed expired cancelling cancelled".split()
_MAX_METADATA = 16, 64, 512  # entries; characters of a name and of a value
_EXPIRED = {"code": "batch_expired", "message": "the batch expired before this request ran"}


class Batch:
    """One batch: its record, which clients see, and its run while it is active."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        self.run: BatchRun | None = None
        self.opening = False  # or writing results: in a worker's thread
        self.blocked = False  # it cannot go on with this server

    @property
    def status(self) -> str:
        """The state, one of OpenAI's."""
        return str(self.record["status"])

    @property
    def id(self) -> str:
        """The id."""
        return str(self.record["id"])

    def as_json(self) -> dict[str, Any]:
        """Return the record with the counts of now."""
        found = copy.deepcopy(self.record)
        if self.run is not None:
            journal = self.run.journal
            done, failed = journal.done, journal.failed
            counts = {"total": journal.total, "completed": done - failed, "failed": failed}
            found["request_counts"] = counts
        return found

    def enter(self, status: str) -> None:
        """Change the state, now."""
        self.record["status"] = status
        self.record[f"{status}_at"] = int(time.time())


class Batches:
    """All batches of a folder; gives their requests to the engine's thread, in equal shares."""

    def __init__(self, folder: Path, job: Job, tokenizer: Tokenizer, thread: EngineThread) -> None:
        """job: the settings of each batch's job. Raises GetpError if the folder cannot be used."""
        self._job, self._tokenizer, self._thread = job, tokenizer, thread
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder = folder / "batches"
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._lock = (folder / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.files = FileStore(folder / "files")
        except BlockingIOError:
            raise GetpError(
                "{data} {folder} is used by another server: give another folder", folder=folder
            ) from None
        except FileExistsError:
            raise GetpError(
                "cannot use {data} {folder}: it is not a folder", folder=folder
            ) from None
        except OSError as error:
            raise GetpError(
                "cannot use {data} {folder}: {reason}", folder=folder, reason=error.strerror
            ) from error
        self._batches = {batch.id: batch for batch in self._saved()}
        self._active: tuple[Batch, ...] = ()
        self._changing = threading.Lock()
        self._workers = ThreadPoolExecutor(2, "batches")
        self.closed = False
        unfinished = sum(each.status in UNFINISHED for each in self._batches.values())
        if unfinished:
            print_message(f"getp: resuming {unfinished} unfinished batches in {folder}")
        thread.batches = self
        self.tick()

    # For clients; in the event loop.

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        """Create a batch from a client's body. Raises ApiError."""
        endpoint, window = body.get("endpoint"), str(body.get("completion_window"))
        if endpoint not in (CHAT_URL, TEXT_URL):
            raise _invalid("endpoint", f"{CHAT_URL!r} or {TEXT_URL!r}")
        match = _WINDOW.fullmatch(window)
        if match is None:
            raise _invalid("completion_window", "a time such as '24h'")
        file_id, metadata = body.get("input_file_id"), body.get("metadata")
        if not isinstance(file_id, str):
            raise _invalid("input_file_id", "the id of a file")
        if self.files.get(file_id).purpose != "batch":
            raise _invalid("input_file_id", "a file with the purpose 'batch'")
        _check_metadata(metadata)
        limit = config.MAX_UNFINISHED_BATCHES
        if sum(each.status in UNFINISHED for each in self.all()) >= limit:
            raise ApiError(429, f"{limit} batches are unfinished: try again later", "queue_full")
        now = int(time.time())
        batch = Batch(
            {
                "id": f"batch_{new_key()}",
                "object": "batch",
                "endpoint": endpoint,
                "errors": None,
                "input_file_id": file_id,
                "completion_window": window,
                "status": "validating",
                "output_file_id": None,
                "error_file_id": None,
                "created_at": now,
                **{f"{name}_at": None for name in _TIMES},
                "expires_at": now + int(match[1]) * _SECONDS[match[2]],
                "request_counts": {"total": 0, "completed": 0, "failed": 0},
                "metadata": metadata,
            }
        )
        self._save(batch)
        self._batches[batch.id] = batch
        self.tick()
        return batch.as_json()

    def get(self, batch_id: str) -> Batch:
        """Return a batch. Raises ApiError if there is none with this id."""
        found = self._batches.get(batch_id)
        if found is None:
            raise not_found("batch", batch_id)
        return found

    def all(self) -> list[Batch]:
        """Return all batches, the newest first."""
        batches = list(self._batches.values())
        return sorted(batches, key=lambda each: (each.record["created_at"], each.id), reverse=True)

    def cancel(self, batch_id: str) -> dict[str, Any]:
        """End a batch; what is finished is kept. Raises ApiError if it has ended already."""
        batch = self.get(batch_id)
        with self._changing:
            if batch.status not in ("validating", "in_progress", "cancelling"):
                raise ApiError(400, f"the batch is {batch.status} already", "invalid_state")
            batch.enter("cancelling")
            self._save(batch)
        self.tick()
        return batch.as_json()

    def uses(self, file_id: str) -> bool:
        """Return whether an unfinished batch needs a file."""
        return any(
            batch.record["input_file_id"] == file_id and batch.status in UNFINISHED
            for batch in self._batches.values()
        )

    def tick(self) -> None:
        """Move every batch on as far as it can; call it regularly."""
        if self.closed:
            return
        with self._changing:
            waiting = [each for each in self._batches.values() if each.status in UNFINISHED]
            for batch in sorted(waiting, key=lambda each: (each.record["created_at"], each.id)):
                self._advance(batch)
            runs = [each for each in waiting if each.run is not None and not each.blocked]
            self._active = tuple(runs)

    def close(self) -> None:
        """Release everything; unfinished batches go on at the next start."""
        self.closed = True
        self._workers.shutdown()
        for batch in self._batches.values():
            if batch.run is not None:
                batch.run.close()
        self._lock.close()

    # For the engine's thread.

    def take(self, number: int) -> tuple[Request, Finished] | None:
        """Return the next request, of the batch with the fewest requests in the engine."""
        runs = [batch.run for batch in self._active if batch.run is not None and batch.run.active]
        for run in sorted(runs, key=lambda each: len(each.in_engine)):
            request = run.take(number)
            if request is not None:
                return request, run.record
        return None

    @property
    def more(self) -> bool:
        """Whether there are requests now or soon."""
        return any(batch.run is not None and batch.run.active for batch in self._active)

    # The life of a batch.

    def _advance(self, batch: Batch) -> None:
        run = batch.run
        if batch.opening or batch.blocked:
            return
        if run is None:
            if sum(each.run is not None for each in self._batches.values()) < (
                config.MAX_ACTIVE_BATCHES
            ):
                self._work(batch, self._open)
            return
        expired = batch.status != "finalizing" and time.time() >= batch.record["expires_at"]
        if (expired or batch.status == "cancelling") and not run.stopped:
            run.stopped = True
            for number in list(run.in_engine):
                self._thread.engine.cancel(number)
        if run.error is not None and not run.in_engine:
            self._block(batch, run.error)
        elif run.ended:
            end = "cancelled" if batch.status == "cancelling" else "completed"
            if expired and run.journal.done < run.journal.total:
                end = "expired"
            if end != "cancelled":
                batch.enter("finalizing")
            self._work(batch, partial(self._finalize, end=end))

    def _work(self, batch: Batch, function: Callable[[Batch], None]) -> None:
        """Call a function with the batch in a worker's thread."""
        batch.opening = True

        def work() -> None:
            try:
                function(batch)
            except Exception as error:
                self._block(batch, worded(error, self._job.name_of))
            batch.opening = False
            self.tick()
            self._thread.wake()

        self._workers.submit(work)

    def _open(self, batch: Batch) -> None:
        """Read the input and the journal, and let the engine take requests."""
        path = self._folder / f"{batch.id}.jsonl"
        source = str(self.files.path(batch.record["input_file_id"]))
        job = replace(self._job, input=source, output=str(path))
        try:
            batch.run = BatchRun(
                job, batch.record["endpoint"], self._tokenizer, self._thread.engine
            )
        except GetpError as error:
            if batch.status != "validating":
                raise
            message = worded(error, self._job.name_of).replace(source, "the input file")
            entry = {"code": "invalid_file", "message": message, "line": None, "param": None}
            batch.record["errors"] = {"object": "list", "data": [entry]}
            batch.enter("failed")
            return self._save(batch)
        with self._changing:
            if batch.status == "validating":
                batch.enter("in_progress")
                self._save(batch)

    def _finalize(self, batch: Batch, end: str) -> None:
        """Write the results, then the state, then remove the journal."""
        run = batch.run
        assert run is not None
        batch.record = batch.as_json()
        counts = batch.record["request_counts"]

        def write_errors(file: BinaryIO) -> None:
            run.write(file, ok=False)
            if end == "expired":
                run.write_unfinished(file, _EXPIRED)

        for kind, needed, write in (
            ("output", counts["completed"], partial(run.write, ok=True)),
            ("error", counts["failed"] or end == "expired", write_errors),
        ):
            if needed:
                name = f"{batch.id}_{kind}"
                stored = self.files.add(f"{name}.jsonl", "batch_output", write, name)
                batch.record[f"{kind}_file_id"] = stored.id
        batch.enter(end)
        self._save(batch)
        run.journal.remove()
        batch.run = None
        run.close()

    def _block(self, batch: Batch, reason: str) -> None:
        """Leave a batch as it is, because it cannot go on now."""
        batch.blocked = True
        warn(f"batch {batch.id} waits for the next start of the server: {reason}")

    def _save(self, batch: Batch) -> None:
        with open_output(str(self._folder / f"{batch.id}.json")) as file:
            file.write(json.dumps(batch.record).encode())

    def _saved(self) -> list[Batch]:
        """Return the batches of earlier servers."""
        found = []
        for path in sorted(self._folder.glob("batch_*.json")):
            try:
                record = json.loads(path.read_bytes())
                assert _ID.fullmatch(record["id"])
                assert record["id"] == path.stem
            except (ValueError, LookupError, TypeError, OSError, AssertionError) as error:
                warn(f"{path} does not describe a batch: {error}; it is ignored")
                continue
            found.append(Batch(record))
        return found


def _invalid(name: str, wanted: str) -> ApiError:
    return ApiError(400, f"{name!r} must be {wanted}", "invalid_value", name)


def _check_metadata(metadata: object) -> None:
    """Raise ApiError unless a client's metadata is small and flat."""
    entries, longest_name, longest_value = _MAX_METADATA
    if metadata is None:
        return
    if (
        not isinstance(metadata, dict)
        or len(metadata) > entries
        or not all(
            isinstance(value, str) and len(name) <= longest_name and len(value) <= longest_value
            for name, value in metadata.items()
        )
    ):
        raise _invalid("metadata", f"an object with at most {entries} short strings")
