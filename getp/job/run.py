"""The main job: read → warm_up → inference → finish → write → report."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from engine import Completion, Request
from getp.errors import SOME_FAILED, GetpError, Interrupted
from getp.files import STANDARD, check_writable, in_place, remove_leftovers, write_report
from getp.job.inputs import Source, scan
from getp.job.journal import Journal
from getp.job.ordering import Schedule, together
from getp.job.prefetch import Prefetcher
from getp.job.progress import progress
from getp.job.request_reader import Defaults, Failure, Task, TaskReader
from getp.job.results import Renderer, errors_path, output_form, write_results
from getp.job.signals import ParkedError, Stopping
from getp.report.job_report import Measurements, final_line, print_report
from getp.terminal import say
from getp.text.answer_text import StopWatcher
from getp.text.prompts import chat_template
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine import Engine
    from getp.cluster.driver import Cluster

_TOKENS_AHEAD = 1 << 19  # prompt tokens that may wait for the engine


@dataclass(frozen=True)
class Job:
    """What the user asked for."""

    input: str
    output: str
    checkpoint: str  # its name, for the report
    defaults: Defaults
    seed_given: bool = True  # else one that an earlier run has drawn is taken
    identity: Mapping[str, str] = field(default_factory=dict)  # fingerprints of what runs
    report: str | None = None
    restart: bool = False
    flush_s: float = 1.0
    grace_s: float = 10.0
    max_errors: int | None = None
    schedule: Schedule = "throughput"


def read(job: Job) -> Source:
    """Make the first pass over the input and see that results can be written. Raises GetpError.

    Comes before anything slow: whoever mistypes a path learns it at once.
    """
    source = scan(job.input)
    if source.ignored:
        say(
            f"getp: warning: {source.name}: ignoring {source.ignored} lines after the "
            f"{source.total} prompts"
        )
    check_writable(job.output, [job.input])
    beside = [] if in_place(job.output) else [_journal_path(job), errors_path(job.output)]
    for path in beside:
        check_writable(path, [job.input])
    if job.report is not None:
        check_writable(job.report, [job.input, job.output, *beside])
    return source


def run_job(job: Job, source: Source, tokenizer: Tokenizer, engine: "Engine | Cluster") -> int:
    """Do the whole job; return the exit status. Raises Interrupted when a signal ends it."""
    if job.defaults.chat:
        chat_template(tokenizer)  # its absence is one error, not one for each request
    with ExitStack() as stack:
        stopping = stack.enter_context(Stopping(job.grace_s))
        journal = stack.enter_context(open_journal(job, source, engine))
        run = Run(job, source, tokenizer, engine, journal, stopping)
        try:
            run.requests()
        except (KeyboardInterrupt, Interrupted):
            raise stopping.interrupted(f"interrupted: {run.how_to_go_on()}") from None
        except Exception:
            say(f"getp: {run.how_to_go_on()}")
            raise
        write_results(journal, source.total, job.output, run.renderer.form)
        journal.remove()
    if journal.failed and not in_place(job.output):
        where = job.output if run.renderer.form == "jsonl" else errors_path(job.output)
        say(f"getp: {journal.failed} of {source.total} requests failed: see {where}")
    report = run.measured.report(engine, job.checkpoint)
    if job.report is not None:
        write_report(job.report, report)
    print_report(report)
    # Results and the report on standard output are files: the line for scripts must not be in them.
    taken = STANDARD in (job.output, job.report)
    print(final_line(run.measured), file=sys.stderr if taken else sys.stdout)
    return SOME_FAILED if journal.failed else 0


def open_journal(job: Job, source: Source, engine: "Engine | Cluster") -> Journal:
    """Open the journal beside the output; a temporary one where the output is no file."""
    header = {
        "fingerprint": _fingerprint(job, source, engine),
        "seed": job.defaults.params.seed,
        "created": int(os.environ.get("SOURCE_DATE_EPOCH") or time.time()),
    }
    if in_place(job.output):
        descriptor, path = tempfile.mkstemp(".journal", "getp-")
        os.close(descriptor)
        journal = Journal(path, header, source.total, job.flush_s)
        journal.remove()  # the name alone: it lives as long as we do
        return journal
    path = _journal_path(job)
    journal = Journal(path, header, source.total, job.flush_s, job.restart)
    for file in (job.output, errors_path(job.output)):
        remove_leftovers(file)
    if journal.damaged:
        say(f"getp: warning: {path}: {journal.damaged} damaged records; their requests run again")
    if journal.done:
        say(f"getp: going on: {journal.done} of {source.total} requests are done already")
    if journal.header["seed"] != job.defaults.params.seed:
        say(f"getp: seed {journal.header['seed']}, as the run before")
    return journal


def _journal_path(job: Job) -> str:
    return f"{os.path.realpath(job.output)}.journal"


def _fingerprint(job: Job, source: Source, engine: "Engine | Cluster") -> dict[str, Any]:
    """Return what must be the same for results to be of one job, by name, as JSON has it."""
    params = asdict(job.defaults.params)
    if not job.seed_given:
        params["seed"] = "random"
    params["stop_ids"] = sorted(params["stop_ids"])
    named = {
        "input": source.digest,
        "input format": source.kind,
        "output format": output_form(job.output, source),
        **job.identity,
        "device": engine.device.type,
        "dtype": str(engine.dtype).removeprefix("torch."),
        **params,
        "stop": job.defaults.stops,
        "chat template": job.defaults.chat,
        "system": job.defaults.system,
        "capped": job.defaults.capped,
    }
    plain: dict[str, Any] = json.loads(json.dumps(named))
    return plain


class Run:
    """One process's share of a job: from the first request that is not done to the last."""

    def __init__(
        self, job: Job, source: Source, tokenizer: Tokenizer, engine: "Engine | Cluster",
        journal: Journal, stopping: Stopping,
    ) -> None:  # fmt: skip
        self._job = job
        self._source = source
        self._tokenizer = tokenizer
        self._engine = engine
        self._journal = journal
        self._stopping = stopping
        self.measured = Measurements(resumed=journal.done)
        header = journal.header
        params = replace(job.defaults.params, seed=header["seed"])
        self._defaults = replace(job.defaults, params=params)
        form = output_form(job.output, source)
        name = json.dumps(header["fingerprint"], sort_keys=True)
        self.renderer = Renderer(form, tokenizer, job.checkpoint, name, header["created"])
        self._running: dict[int, tuple[Task, StopWatcher]] = {}

    def requests(self) -> None:
        """Run everything that is not done. Raises Interrupted, GetpError."""
        if self._journal.done == self._source.total:
            return
        arrange = together if self._job.schedule == "throughput" else None
        with Prefetcher(self._tasks(), _cost, _TOKENS_AHEAD, arrange) as tasks:
            self.measured.warm_up_s = _seconds(self._engine.warm_up)
            try:
                self._stopping.patient = True
                self.measured.inference_s = _seconds(lambda: self._inference(tasks))
            finally:
                self._stopping.patient = False
                self.measured.finish_s = _seconds(self._engine.finish)
        if self._journal.done < self._source.total:
            raise self._stopping.interrupted("stopped")

    def how_to_go_on(self) -> str:
        """Return what is safe after a run that ended early, and what to do."""
        done = f"{self._journal.done} of {self._source.total} requests are done"
        if in_place(self._job.output):
            return f"{done}, but lost: a job can be gone on with only where -o names a file"
        how, most = "the same command goes on from there", self._job.max_errors
        if most is not None and self._journal.failed > most:
            how = "a higher --max-errors goes on from there, --restart starts over"
        return f"{done} and kept in {self._journal.path}; {how}"

    def _inference(self, tasks: Prefetcher[Task | Failure]) -> None:
        """Run every request through the engine, which takes them as it has room."""
        left = self._source.total - self._journal.done
        with progress(left, lambda: self._engine.stats.output_tokens) as advance:
            admitted = self._admitted(tasks.until(lambda: self._stopping.asked), advance)
            completions = self._engine.generate(admitted)
            try:
                for completion in completions:
                    self._take(completion)
                    advance()
            except ParkedError:
                return
            finally:
                if isinstance(completions, Iterator) and hasattr(completions, "close"):
                    completions.close()

    def _tasks(self) -> Iterator[Task | Failure]:
        """Read what is not done yet. Runs in the thread that works ahead."""
        moment = datetime.fromtimestamp(self._journal.header["created"])
        reader = TaskReader(
            self._source,
            self._defaults,
            self._tokenizer,
            moment,
            self._engine.model_config.max_positions,
        )
        with closing(self._source.lines()) as lines:
            for line in lines:
                task = reader.read(line, needed=line.index not in self._journal)
                if task is not None and line.index not in self._journal:
                    yield task

    def _admitted(
        self, tasks: Iterator[Task | Failure], advance: Callable[[], None]
    ) -> Iterator[Request]:
        """Yield a request for each task; those that cannot be asked fail here, alone."""
        for task in tasks:
            if isinstance(task, Failure):
                self._fail(task)
                advance()
                continue
            watcher = StopWatcher(
                self._tokenizer, task.prompt_ids, task.chat, task.stops, self._stopping.check
            )
            self._running[task.index] = task, watcher
            yield Request(task.prompt_ids, task.params, task.index, watcher)

    def _take(self, completion: Completion) -> None:
        """Keep what the engine gave back, in whatever order."""
        task, watcher = self._running.pop(completion.request_id)
        if completion.finish_reason in ("error", "cancelled"):
            message = str(completion.error or "the request was cancelled")
            return self._fail(_failure(task, f"request_{completion.finish_reason}", message))
        trouble = watcher.trouble
        if trouble is None:
            try:
                line = self.renderer.done(task, completion)
            except Exception as error:
                trouble = f"{type(error).__name__}: {error}"
        if trouble is not None:
            return self._fail(_failure(task, "internal_error", trouble))
        self._journal.append(task.index, True, line)
        self.measured.add(completion)

    def _fail(self, failure: Failure) -> None:
        """Note a request that came to nothing; the others are not concerned."""
        self._journal.append(failure.index, False, self.renderer.failed(failure))
        self.measured.failed += 1
        most = self._job.max_errors
        if most is not None and self._journal.failed > most:
            raise GetpError(
                f"{self._journal.failed} requests have failed, more than --max-errors {most}; "
                f"the last one: line {failure.line}: {failure.message}"
            )


def _failure(task: Task, code: str, message: str) -> Failure:
    return Failure(task.index, task.line, task.custom_id, code, message)


def _cost(task: Task | Failure) -> int:
    return len(task.prompt_ids) + 64 if isinstance(task, Task) else 64


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
