"""The result file of a job: what a line of it says, and the whole of it from the journal."""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine import Completion
from getp.errors import GetpError
from getp.files import STANDARD, in_place, json_line, token_line, writing
from getp.job.inputs import Source, plain_name
from getp.job.journal import Journal
from getp.job.openai_api import response_body
from getp.job.request_reader import Failure, Task
from getp.terminal import say
from getp.text.answer_text import texts_by_channel
from tokenizer import Tokenizer

Form = Literal["tokens", "jsonl"]


def output_form(output: str, source: Source) -> Form:
    """Return what is written: JSONL to `*.jsonl`, token ids elsewhere; `-` is as the input."""
    if output == STANDARD:
        return "jsonl" if source.kind == "jsonl" else "tokens"
    return "jsonl" if plain_name(output).endswith(".jsonl") else "tokens"


def errors_path(output: str) -> str:
    """Return where the errors of a job go that writes token ids to `output`."""
    return f"{output}.errors.jsonl"


@dataclass(frozen=True)
class Renderer:
    """Makes the line of a request that has ended. `job` and `created` are the job's own."""

    form: Form
    tokenizer: Tokenizer
    model: str
    job: str  # its fingerprint, from which ids come: a resumed job gives the same
    created: int

    def done(self, task: Task, completion: Completion) -> bytes:
        """Return the line of a request that succeeded."""
        if self.form == "tokens":
            return token_line(completion.token_ids)
        texts = texts_by_channel(
            self.tokenizer, completion.token_ids, task.prompt_ids, task.chat, task.stops
        )
        key = self._key(task.index)
        body = response_body(
            key, self.created, self.model, task.chat, texts, completion, self.tokenizer
        )
        response = {"status_code": 200, "request_id": f"req_{key}", "body": body}
        return self._record(key, task.custom_id, response, None)

    def failed(self, failure: Failure) -> bytes:
        """Return the line of one that failed: of the errors file, or of the JSONL result."""
        error = {"code": failure.code, "message": failure.message, "line": failure.line}
        if self.form == "jsonl":
            return self._record(self._key(failure.index), failure.custom_id, None, error)
        return json_line({"line": failure.line, "index": failure.index, **error})

    def _key(self, index: int) -> str:
        return hashlib.blake2b(f"{self.job}/{index}".encode(), digest_size=12).hexdigest()

    def _record(self, key: str, custom_id: str | None, response: object, error: object) -> bytes:
        return json_line(
            {"id": f"batch_req_{key}", "custom_id": custom_id, "response": response, "error": error}
        )


def write_results(journal: Journal, total: int, output: str, form: Form) -> None:
    """Write the result of a finished job, in input order. Raises GetpError.

    The errors come first: once the result is there, all is there. What standard output or a pipe
    does not take goes to a file in the working directory, since no second run could bring it.
    """
    if form == "tokens":
        _write_errors(journal, total, output)
    try:
        _write(journal, total, output, form)
    except (GetpError, OSError) as error:
        if not in_place(output):
            raise
        if output == STANDARD:  # else what is still buffered would fail once more at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        rescue = f"getp-results-{os.getpid()}.{'jsonl' if form == 'jsonl' else 'txt'}"
        _write(journal, total, rescue, form)
        trouble = (
            f"cannot write {output}: {error.strerror}" if isinstance(error, OSError) else error
        )
        raise GetpError(f"{trouble}; the results are in {rescue} instead") from error


def _write(journal: Journal, total: int, output: str, form: Form) -> None:
    with writing(output) as file:
        for index in range(total):
            ok, line = journal.read(index)
            file.write((line if ok or form == "jsonl" else b"") + b"\n")


def _write_errors(journal: Journal, total: int, output: str) -> None:
    if not journal.failed:
        if not in_place(output):
            Path(errors_path(output)).unlink(missing_ok=True)  # an earlier run's
        return
    failures = (line for ok, line in map(journal.read, range(total)) if not ok)
    if in_place(output):
        for line in failures:
            failure = json.loads(line)
            say(f"getp: line {failure['line']} failed: {failure['message']}")
        return
    with writing(errors_path(output)) as file:
        for line in failures:
            file.write(line + b"\n")
