"""The main job: read → warm_up → inference → finish → write → report."""

import sys
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine import Completion, Request, SamplingParams
from getp.answer import Answer
from getp.errors import GetpError, Interrupted
from getp.files import (
    STANDARD,
    FailedRequest,
    Prompt,
    TokenIds,
    check_writable,
    errors_path,
    read_numbered_text,
    write_errors,
    write_report,
    write_token_file,
)
from getp.progress import progress
from getp.prompts import chat_template, encode_prompt, request_seed
from getp.report import Measurements, final_line, print_report
from tokenizer import Tokenizer, TokenizerError

if TYPE_CHECKING:
    from engine import Engine

SOME_FAILED = 3
"""Exit status of a job that ran to its end with some requests failed."""


@dataclass(frozen=True)
class Job:
    """What the user asked for."""

    input: str
    output: str
    checkpoint: str  # its name, for the report
    params: SamplingParams  # of every request; the seed is the job's
    stops: tuple[str, ...] = ()
    chat: bool = False  # put each prompt into the chat template
    system: str | None = None
    report: str | None = None


def read(job: Job) -> list[Prompt]:
    """Read the prompts and see that the results can be written. Raises GetpError.

    Comes before anything slow: whoever mistypes a path learns it at once.
    """
    prompts, ignored = read_numbered_text(job.input)
    if ignored:
        _say(f"warning: {job.input}: ignoring {ignored} lines after the {len(prompts)} prompts")
    check_writable(job.output, [job.input])
    if job.report is not None:
        check_writable(job.report, [job.input, job.output])
    return prompts


def run_job(job: Job, prompts: list[Prompt], tokenizer: Tokenizer, engine: "Engine") -> int:
    """Do the whole job; return the exit status. Raises Interrupted on Ctrl-C."""
    if job.chat:
        chat_template(tokenizer)  # its absence is one error, not one for each request
    measured = Measurements()
    results = Results(prompts, measured)
    try:
        measured.warm_up_s = _seconds(engine.warm_up)
        try:
            measured.inference_s = _seconds(lambda: inference(job, tokenizer, engine, results))
        finally:
            measured.finish_s = _seconds(engine.finish)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: {results.finished} of {len(prompts)} requests were done; "
            f"{job.output} was not written"
        ) from None
    results.write(job.output)
    report = measured.report(engine, job.checkpoint)
    if job.report is not None:
        write_report(job.report, report)
    print_report(report)
    # Tokens on standard output are a file of tokens: the line for scripts must not be in it.
    print(final_line(measured), file=sys.stderr if job.output == STANDARD else sys.stdout)
    return SOME_FAILED if results.failed else 0


class Results:
    """The token ids of every request in input order, and the requests that failed."""

    def __init__(self, prompts: list[Prompt], measured: Measurements) -> None:
        self.prompts = prompts
        self.failed: list[FailedRequest] = []
        self._rows: list[TokenIds | None] = [None] * len(prompts)
        self._measured = measured

    @property
    def finished(self) -> int:
        """Requests that succeeded so far."""
        return self._measured.done

    def take(self, completion: Completion) -> None:
        """Keep what the engine gave back, in whatever order."""
        index = completion.request_id
        if completion.finish_reason in ("error", "cancelled"):
            message = completion.error or "the request was cancelled"
            return self.fail(index, f"request_{completion.finish_reason}", message)
        self._rows[index] = array("i", completion.token_ids)
        self._measured.add(completion)

    def fail(self, index: int, code: str, message: str) -> None:
        """Note a request that came to nothing; the others are not concerned."""
        self._measured.failed += 1
        self.failed.append(FailedRequest(self.prompts[index].line, index, code, message))

    def write(self, output: str) -> None:
        """Write the errors, then the token ids: once those are there, all is there."""
        self.failed.sort(key=lambda failed: failed.index)
        if output == STANDARD:
            for failed in self.failed:
                _say(f"line {failed.line} failed: {failed.message}")
        elif self.failed:
            write_errors(errors_path(output), self.failed)
            _say(
                f"{len(self.failed)} of {len(self.prompts)} requests failed: "
                f"see {errors_path(output)}"
            )
        else:
            _remove(errors_path(output))
        write_token_file(output, (row or () for row in self._rows))


def inference(job: Job, tokenizer: Tokenizer, engine: "Engine", results: Results) -> None:
    """Run every request through the engine, which takes them as it has room."""
    with progress(len(results.prompts), lambda: engine.stats.output_tokens) as advance:
        for completion in engine.generate(build_requests(job, tokenizer, results, advance)):
            results.take(completion)
            advance()


def build_requests(
    job: Job, tokenizer: Tokenizer, results: Results, advance: Callable[[], None]
) -> Iterator[Request]:
    """Yield a request for each prompt that can be asked; the others fail here, alone."""
    for index, prompt in enumerate(results.prompts):
        try:
            ids = _encode(job, tokenizer, prompt)
        except _BadPromptError as error:
            results.fail(index, error.code, str(error))
            advance()
            continue
        params = replace(job.params, seed=request_seed(job.params.seed, index))
        yield Request(ids, params, index, _stop_watcher(job, tokenizer, ids))


class _BadPromptError(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _encode(job: Job, tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    if prompt.text is None:
        raise _BadPromptError("invalid_utf8", "the prompt is not valid UTF-8")
    if not prompt.text:
        raise _BadPromptError("empty_prompt", "the prompt is empty")
    try:
        return encode_prompt(tokenizer, prompt.text, job.chat, job.system)
    except TokenizerError as error:
        raise _BadPromptError("not_encodable", str(error)) from error


def _stop_watcher(
    job: Job, tokenizer: Tokenizer, prompt_ids: list[int]
) -> Callable[[int], bool] | None:
    """Return what ends a request at a stop string; its last token is kept, as a stop token is."""
    if not job.stops:
        return None  # then no text is needed while tokens come
    answer = Answer(tokenizer, prompt_ids, job.chat, job.stops)

    def on_token(token_id: int) -> bool:
        answer.push(token_id)
        return answer.stopped

    return on_token


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _remove(path: str) -> None:
    """Remove what an earlier run may have left."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise GetpError(f"cannot remove {path}: {error.strerror}") from error


def _say(message: str) -> None:
    print(f"getp: {message}", file=sys.stderr)
