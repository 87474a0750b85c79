"""The values of all options as frozen dataclasses, one a subject."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from getp.limits import length_limit

if TYPE_CHECKING:
    from engine import EngineConfig

_Options = TypeVar("_Options")


@dataclass(frozen=True)
class PromptOptions:
    """Where prompts and their token ids come from."""

    input: str | None
    tokenizer: str | None
    system: str | None
    chat_template: bool | None  # None: the mode's default


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are sampled and when a request ends."""

    temperature: float
    top_p: float
    top_k: int
    seed: int | None  # None: random
    max_length: int | None
    steps: int | None  # the former name of max_length
    max_new_tokens: int | None
    stop: tuple[str, ...]
    ignore_eos: bool

    @property
    def given_length(self) -> int | None:
        """The value of -n/--max-length; None: not given."""
        return self.steps if self.max_length is None else self.max_length

    @property
    def max_positions(self) -> int | None:
        """The maximum tokens per request, prompt included; None: the model's limit."""
        return length_limit(self.given_length, self.max_new_tokens)


@dataclass(frozen=True)
class JobOptions:
    """What happens to results, and how a job is run."""

    output: str | None
    report: str | None
    restart: bool
    max_errors: int | None
    flush_interval: float  # seconds
    grace: float  # seconds
    schedule: Literal["throughput", "first"]


@dataclass(frozen=True)
class ParallelOptions:
    """Over how many processes a model and a job are split."""

    tensor_parallel: int | None
    replicas: int | None  # None: one engine without Ray; 0: as many as there is room for
    ray_address: str | None


@dataclass(frozen=True)
class TokenFileOptions:
    """What is done with a token file."""

    line: int | None
    reference: str | None
    expected: str | None


@dataclass(frozen=True)
class StepOptions:
    """Which step is planned or profiled, and how that is shown."""

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
    """What a plan assumes; EngineConfig would refuse the dtype float8."""

    dtype: str
    max_batch_size: int | None
    max_batch_tokens: int | None
    fused: bool
    price: tuple[float, ...]
    plot: str | None


@dataclass(frozen=True)
class Settings:
    """Everything that a command line says."""

    mode: str
    checkpoint: str | None  # None: the embedded model
    prompt: PromptOptions
    sampling: SamplingOptions
    job: JobOptions
    parallel: ParallelOptions
    token_file: TokenFileOptions
    step: StepOptions
    plan: PlanOptions
    engine: "EngineConfig"  # the defaults in mode plan, which has no engine


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
        _pick(ParallelOptions, given),
        _pick(TokenFileOptions, given),
        _pick(StepOptions, given),
        _pick(PlanOptions, given),
        engine,
    )


def _pick(kind: type[_Options], given: Mapping[str, Any]) -> _Options:
    """Return a dataclass with the given value for each of its fields."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: given[name] for name in names})
