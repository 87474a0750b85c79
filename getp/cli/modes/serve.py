"""Mode serve: OpenAI's API over HTTP, online and in batches."""

from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from getp.cli import loading
from getp.cli.settings import Settings
from getp.cli.wording import option_name
from getp.errors import GetpError

if TYPE_CHECKING:
    from getp.serve.config import ServeConfig
    from tokenizer import Tokenizer

_PACKAGES = ("starlette", "uvicorn", "python_multipart", "prometheus_client")


def run(settings: Settings) -> int:
    """Serve until a signal arrives; return the exit status. Raises GetpError."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise GetpError(f"mode serve needs {', '.join(missing)}: pip install 'getp[serve]'")
    from getp.serve.server import serve

    tokenizer = loading.load_tokenizer(settings)
    loading.check_thinking(settings, tokenizer)
    config = _config(settings, tokenizer)
    if settings.parallel.replicas is None:
        return serve(config, loading.load_engine(settings), tokenizer)
    with closing(loading.load_cluster(settings)) as cluster:
        return serve(config, cluster, tokenizer)


def _config(settings: Settings, tokenizer: "Tokenizer") -> "ServeConfig":
    from getp.job.job import Job
    from getp.job.request_reader import RequestDefaults
    from getp.serve.config import ServeConfig

    options = settings.serve
    name = options.model_name or _model_name(settings)
    defaults = loading.sampling_defaults(settings, tokenizer)
    answer = loading.answer_options(settings, chat=False)
    job = Job(
        input="",
        output="",
        checkpoint=name,
        defaults=RequestDefaults(
            defaults.params,
            defaults.origins,
            answer,
            thinking_budget=settings.sampling.thinking_budget,
        ),
        seed_given=settings.sampling.seed is not None,
        identity=loading.identity(settings),
        name_of=option_name,
    )
    return ServeConfig(
        options.host,
        options.port,
        name,
        job,
        options.api_key,
        options.insecure,
        None if options.data is None else Path(options.data),
        options.max_queue,
        settings.job.grace,
    )


def _model_name(settings: Settings) -> str:
    """Return the name of the model for clients."""
    if settings.checkpoint is None:
        return "embedded"
    return loading.checkpoint_name(settings)
