"""The values of all options as frozen dataclasses, one per subject."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from engine import EngineConfig

_Options = TypeVar("_Options")


@dataclass(frozen=True)
class PromptOptions:
    """The source of prompts, the tokenizer and the use of the chat template."""

    input: str | None
    tokenizer: str | None
    system: str | None
    chat_template: bool | None  # None: the mode's default
    chat_template_kwargs: Mapping[str, Any]
    reasoning_effort: str | None

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of the chat template."""
        effort = self.reasoning_effort
        return {
            **self.chat_template_kwargs,
            **({"reasoning_effort": effort} if effort is not None else {}),
        }


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling and the limits of a request's length."""

    temperature: float | None  # None, here and below: not given
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    bad_words: tuple[str, ...]
    generation_config: Literal["auto", "none"]
    seed: int | None  # None: random
    max_length: int | None
    steps: int | None  # the old name of max_length
    max_new_tokens: int | None
    min_new_tokens: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    include_stop: bool
    keep_special_tokens: bool
    thinking_budget: int | None
    ignore_eos: bool

    @property
    def given_length(self) -> int | None:
        """The value of -n/--max-length; None: not given."""
        return self.steps if self.max_length is None else self.max_length


@dataclass(frozen=True)
class JobOptions:
    """The output of a job, and how it handles errors, signals and restarts."""

    output: str | None
    output_format: str | None  # None: by the suffix of the output
    shard: tuple[int, int] | None  # the number of the part of the input, and of all parts
    report: str | None
    restart: bool
    accept_different_rounding: bool
    max_errors: int | None
    truncate: Literal["none", "left", "right"]
    flush_interval: float  # seconds
    grace: float  # seconds
    schedule: Literal["throughput", "first"]


@dataclass(frozen=True)
class TableOptions:
    """The columns of an input that is a table, and how many requests to read."""

    column: str | None
    id_column: str | None
    parameter_column: tuple[str, ...]  # FIELD or FIELD=COLUMN
    first: int | None


@dataclass(frozen=True)
class ParallelOptions:
    """The number of processes for a model and for a job."""

    tensor_parallel: int | None
    replicas: int | None  # None: one engine without Ray; 0: as many as the resources allow
    ray_address: str | None


@dataclass(frozen=True)
class ResultFileOptions:
    """Options of modes decode and eval, which read a result file."""

    line: int | None
    reference: str | None
    require_agreement: float | None  # share of equal answers
    expected: str | None


@dataclass(frozen=True)
class StepOptions:
    """The step to plan or to profile, and the output format."""

    phase: Literal["prefill", "decode", "backward"] | None
    batch: int | None
    query: int | None
    context: int | None
    gpu: tuple[str, ...]
    measure: bool
    format: Literal["text", "json"]
    trace: str | None


@dataclass(frozen=True)
class PlanOptions:
    """The assumptions of a plan. They are separate because EngineConfig rejects float8."""

    dtype: str
    kv_dtype: str
    quantize: str | None
    max_batch_size: int | None
    max_batch_tokens: int | None
    fused: bool
    price: tuple[float, ...]
    plot: str | None


@dataclass(frozen=True)
class ServeOptions:
    """Where a server listens, who may use it, and where it keeps batches."""

    host: str
    port: int  # 0: a free one
    api_key: str | None
    insecure: bool
    data: str | None
    model_name: str | None
    max_queue: int


@dataclass(frozen=True)
class Settings:
    """The values of all options of a command line."""

    mode: str
    checkpoint: str | None  # as given; None: the embedded model
    prompt: PromptOptions
    sampling: SamplingOptions
    job: JobOptions
    table: TableOptions
    parallel: ParallelOptions
    result_file: ResultFileOptions
    step: StepOptions
    plan: PlanOptions
    serve: ServeOptions
    details: bool  # print the long tables, too
    json: bool  # print JSON instead of tables
    engine: "EngineConfig"  # the defaults in mode plan, which has no engine
    folder: Path | None = None  # where the checkpoint is; in mode plan also a well-known name


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Build the settings from click's values, by option name. Raises EngineError."""
    from engine import EngineConfig

    engine = EngineConfig()
    if given["mode"] != "plan":
        values = {**given, "tensor_parallel": given["tensor_parallel"] or 1}
        engine = _pick(EngineConfig, values)
    return Settings(
        given["mode"],
        given["checkpoint"],
        _pick(PromptOptions, given),
        _pick(SamplingOptions, given),
        _pick(JobOptions, given),
        _pick(TableOptions, given),
        _pick(ParallelOptions, given),
        _pick(ResultFileOptions, given),
        _pick(StepOptions, given),
        _pick(PlanOptions, given),
        _pick(ServeOptions, given),
        given["details"],
        given["json"],
        engine,
    )


def _pick(kind: type[_Options], given: Mapping[str, Any]) -> _Options:
    """Return a dataclass with the given value for each of its fields."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: given[name] for name in names})
