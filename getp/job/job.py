"""A job's settings, its check before the run, its fingerprint and its journal."""

import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from engine.resolve import KERNEL_CHOICES, dtype_name
from getp import __version__
from getp.defaults import describe
from getp.errors import GetpError, NameOf, UsageProblem
from getp.files import check_writable, is_stream
from getp.job.formats import output_format
from getp.job.formats.interface import InputFormat
from getp.job.formats.table import Columns
from getp.job.inputs import Part, Source, scan
from getp.job.job_engine import JobEngine
from getp.job.journal import Journal
from getp.job.journal_header import ROUNDING, Header, noted_rounding
from getp.job.ordering import Schedule
from getp.job.request_reader import RequestDefaults
from getp.ownership import errors_path, is_remote, local_name, remove_leftovers
from getp.report.html_report import check_html
from getp.rounding import check_resumed
from getp.terminal import print_message, warn
from getp.text.answer_text import AnswerOptions
from getp.text.result_file import read_results
from getp.units import counted


@dataclass(frozen=True)
class Job:
    """The settings of a job."""

    input: str
    output: str
    checkpoint: str  # name of the checkpoint, for results and the report
    defaults: RequestDefaults
    seed_given: bool = True  # if not, a resumed job uses the random seed of the first run
    identity: Mapping[str, str] = field(default_factory=dict)  # fingerprints of the files
    format: InputFormat | None = None  # of the input; None: by its files
    columns: Columns | None = None  # of an input that is a table; None: the usual ones
    part: Part = field(default_factory=Part)
    output_format: str | None = None  # a name in OUTPUT_FORMATS; None: by the output's suffix
    reading_hint: str | None = None  # how to read token ids, for the end of the run
    report: str | None = None
    price: float | None = None  # of a device per hour, for the report
    reference: str | None = None  # a result file to compare the results with
    required_agreement: float | None = None  # share of the answers that must equal the reference
    details: bool = False  # print the whole report
    restart: bool = False
    accept_different_rounding: bool = False  # of requests in the journal, in 16 bits
    flush_s: float = 1.0
    grace_s: float = 10.0
    max_errors: int | None = None
    schedule: Schedule = "throughput"
    expected_s: float | None = None  # how long the whole job will take; None: not known
    name_of: NameOf = str  # how messages name settings

    @property
    def journal_path(self) -> str:
        """The path of the journal, beside the output."""
        return f"{os.path.realpath(local_name(self.output))}.journal"


def read(job: Job) -> Source:
    """Make the first pass over the input and check that results can be written. Raises GetpError.

    Call it before anything slow, so that a mistyped path is reported at once.
    """
    source = scan(job.input, job.columns, job.part, job.format)
    if not source.total:
        warn(f"{source.name} has no requests")
    if source.ignored:
        warn(
            f"{source.name}: ignoring {counted(source.ignored, 'extra line')} after the "
            f"{counted(source.total, 'prompt')} announced on line 1"
        )
    files = {"input": job.input}
    if list(source.files) != [job.input]:
        files = {f"input file {path}": path for path in source.files if not is_remote(path)}
        print_message(
            f"getp: {job.input}: {counted(source.total, 'request')} in "
            f"{counted(len(source.files), f'{source.format.name} file')}"
        )
    if job.reference is not None:
        files["reference"] = job.reference
        form = output_format(job.output, source.format, job.output_format).name
        if form not in ("ids", "jsonl") or is_stream(job.output):
            raise UsageProblem(
                "{reference} compares a file of token ids or JSONL, but the output is {given}: "
                "give {output} a file with the suffix .jsonl, or {output_format} ids",
                given="a stream" if is_stream(job.output) else form,
            )
        answers = len(read_results(job.reference))
        if answers != source.total:
            raise GetpError(
                f"{job.reference} has {counted(answers, 'answer')}, but {source.name} has "
                f"{counted(source.total, 'request')}: give results of the same requests"
            )
    check_writable(job.output, "output", files)
    if not is_stream(job.output):
        beside = {"journal": job.journal_path, "errors file": errors_path(job.output)}
        for role, path in beside.items():
            check_writable(path, role, files, is_journal=role == "journal")
        files |= beside
    if job.report is not None:
        check_writable(job.report, "report", files | {"output": job.output})
        check_html(job.report)
    _announce_replacements(job, source)
    return source


def _announce_replacements(job: Job, source: Source) -> None:
    """Say which existing files the job will replace with its own."""
    written = [job.output, *([job.report] if job.report is not None else [])]
    if (
        not is_stream(job.output)
        and not output_format(job.output, source.format, job.output_format).holds_failures
    ):
        written.insert(1, errors_path(job.output))
    existing = [path for path in written if not is_stream(path) and os.path.exists(path)]
    if existing:
        verbs = "exists: it" if len(existing) == 1 else "exist: they"
        print_message(f"getp: {', '.join(existing)} {verbs} will be replaced when the job is done")


def choose_kernels(job: Job, engine: JobEngine) -> None:
    """Choose those of the journal if there is one: the rest of the job rounds like its start."""
    earlier = None if is_stream(job.output) or job.restart else noted_rounding(job.journal_path)
    preferred = None if earlier is None else earlier.get(KERNEL_CHOICES, {})
    engine.choose_kernels(preferred, job.expected_s)


def open_journal(job: Job, source: Source, engine: JobEngine) -> Journal:
    """Open the journal beside the output; a temporary one if the output is not a regular file.

    The kernels are chosen first, since rounding depends on them.
    """
    choose_kernels(job, engine)
    header = {
        "fingerprint": _fingerprint(job, source, engine),
        "seed": job.defaults.params.seed,
        "created": int(os.environ.get("SOURCE_DATE_EPOCH") or time.time()),
        ROUNDING: {**engine.rounding, "getp": __version__},
    }
    if is_stream(job.output):
        descriptor, path = tempfile.mkstemp(".journal", "getp-")
        os.close(descriptor)
        journal = Journal(path, header, source.indices, job.flush_s)
        journal.remove()  # removes only the name: the file exists until it is closed
        return journal
    path = job.journal_path
    journal = Journal(path, header, source.indices, job.flush_s, job.restart)
    try:
        _check_rounding(job, journal, header, engine)
    except BaseException:
        journal.close()
        raise
    for file in (local_name(job.output), errors_path(job.output)):
        remove_leftovers(file)
    if journal.damaged:
        damaged = counted(journal.damaged, "damaged record")
        warn(f"{path} has {damaged}; the requests concerned run again")
    if journal.done:
        print_message(f"getp: resuming: {journal.done} of {source.total} requests are done already")
    return journal


def _check_rounding(job: Job, journal: Journal, header: Header, engine: JobEngine) -> None:
    """Raise GetpError if the rest of the job would round differently than its first part."""
    if journal.done == journal.total:
        return
    now = header[ROUNDING]
    before = journal.header.get(ROUNDING) or now  # journals of older versions lack it
    accepted = job.accept_different_rounding
    check_resumed(journal.path, before, now, engine.dtype, accepted, job.name_of)


def print_defaults(job: Job, source: Source, seed: int) -> None:
    """Print what holds for requests that do not set their own values; seed: the journal's."""
    origin = job.name_of("seed") if job.seed_given else "random"
    if seed != job.defaults.params.seed:
        origin = "from the previous run"
    form = source.format
    line = describe(
        job.defaults, form.defaults, form.openai_defaults, job.name_of, f"{seed} ({origin})"
    )
    print_message(f"getp: {line}")


def _fingerprint(job: Job, source: Source, engine: JobEngine) -> dict[str, Any]:
    """Return the settings that a resumed job must not change, by name and as JSON values."""
    defaults, form = job.defaults, source.format
    params = asdict(defaults.fill(form.defaults))
    if not job.seed_given:
        params["seed"] = "random"
    params["stop_ids"] = sorted(params["stop_ids"])
    named = {
        "input": source.digest,
        "input format": source.format.name,
        "output format": output_format(job.output, source.format, job.output_format).name,
        **({"first": job.part.first} if job.part.first is not None else {}),
        **({"shard": list(job.part.shard)} if job.part.shard is not None else {}),
        **job.identity,
        "device": engine.device.type,
        "dtype": dtype_name(engine.dtype),
        "kv_dtype": engine.kv_dtype,
        **({"quantize": engine.config.quantize} if engine.config.quantize else {}),
        **params,
        "stop": defaults.answer.stops,
        "answer": _changed(replace(defaults.answer, chat=False, stops=()), AnswerOptions()),
        "chat template": defaults.answer.chat,
        "system": defaults.system,
        "capped": defaults.is_set("max_positions"),
        **set_options(defaults),
    }
    if form.openai_defaults is not None:
        named["openai temperature"] = defaults.fill(form.openai_defaults).temperature
    as_json: dict[str, Any] = json.loads(json.dumps(named))
    return as_json


def set_options(defaults: RequestDefaults) -> dict[str, Any]:
    """Return options that older journals lack, as far as they are set."""
    found = {
        "chat_template_kwargs": defaults.variables or None,
        "thinking_budget": defaults.thinking_budget,
        "truncate": None if defaults.truncate == "none" else defaults.truncate,
    }
    return {name: value for name, value in found.items() if value is not None}


def _changed(options: AnswerOptions, neutral: AnswerOptions) -> dict[str, Any]:
    """Return the fields that differ, so that new ones do not refuse older journals."""
    before = asdict(neutral)
    return {name: value for name, value in asdict(options).items() if value != before[name]}
