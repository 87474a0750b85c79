"""Loads the checkpoint, tokenizer, sampling parameters and engine for the given settings.

Importing torch takes a second, so modules that need it are imported inside functions: a mistyped
option is reported at once.
"""

import secrets
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from getp import EMBEDDED, checkpoints, hub
from getp.checkpoints import embedded_model, find_model
from getp.cli.settings import Settings
from getp.cli.wording import option_name
from getp.errors import GetpError, UsageProblem, worded
from getp.terminal import print_message, warn

if TYPE_CHECKING:
    from engine import Engine, SamplingParams
    from getp.cluster.driver import Cluster
    from getp.defaults import Defaults, FormatValues, Origin
    from getp.job.formats.table import Columns
    from getp.text.answer_text import AnswerOptions
    from tokenizer import Tokenizer


def checkpoint_folder(settings: Settings) -> Path:
    """Return the directory of the given checkpoint, or of the embedded model."""
    return settings.folder or embedded_model()


def checkpoint_name(settings: Settings) -> str:
    """Return the checkpoint's name for reports."""
    if settings.checkpoint is None:
        return EMBEDDED
    return hub.model_name(checkpoint_folder(settings))


def find_files(settings: Settings) -> Settings:
    """Return the settings with the checkpoint's directory, also of one that is named on the hub.

    Raises UsageProblem for a checkpoint or a tokenizer that does not exist, and GetpError if it
    cannot be downloaded.
    """
    prompt, name = settings.prompt, settings.checkpoint
    if prompt.tokenizer is not None:
        tokenizer = hub.find_checkpoint(prompt.tokenizer, "tokenizer")
        if not tokenizer.exists():
            raise UsageProblem(
                f"-z/--tokenizer {tokenizer} does not exist: give a tokenizer.json, its directory "
                "or the name of a model, OWNER/NAME"
            )
        settings = replace(settings, prompt=replace(prompt, tokenizer=str(tokenizer)))
    if name is None:
        return settings
    if settings.mode == "plan":
        from getp.analysis.lookup import is_known

        if is_known(name):
            return replace(settings, folder=Path(name))
        return replace(settings, folder=_find_planned(name, _needed_part(settings)))
    return replace(settings, folder=find_model(name, _needed_part(settings)))


def _find_planned(name: str, part: hub.Part) -> Path:
    """Return the folder or config.json of a model to plan, which is not a well-known one."""
    from getp.analysis.lookup import unknown_model
    from model.cost.known_models import closest_known_models

    try:
        return hub.find_checkpoint(name, part)
    except GetpError as error:
        if not closest_known_models(name):
            raise
        raise unknown_model(name, str(error)) from None


def _needed_part(settings: Settings) -> hub.Part:
    """Return what the mode needs of the checkpoint."""
    if settings.mode == "doctor" or (settings.mode == "plan" and settings.prompt.input is None):
        return "config"
    if settings.mode in ("plan", "decode", "eval") or settings.engine.dummy_weights:
        return "tokenizer"
    return "weights"


def tokenizer_path(settings: Settings) -> Path:
    """Return the file or directory of the tokenizer."""
    return Path(settings.prompt.tokenizer or checkpoint_folder(settings))


def load_tokenizer(settings: Settings) -> "Tokenizer":
    """Load the tokenizer. Raises TokenizerError."""
    return checkpoints.load_tokenizer(tokenizer_path(settings))


def sampling_defaults(settings: Settings, tokenizer: "Tokenizer") -> "Defaults":
    """Return what options and the checkpoint's generation_config.json say about requests.

    Without a given seed it is random. Raises UsageProblem, CheckpointError.
    """
    from engine import EngineError, SamplingParams
    from getp.defaults import Defaults
    from getp.text.prompts import bad_word_ids
    from model.generation import unsupported_generation

    options = settings.sampling
    for name in ("stop", "bad_words"):
        if "" in getattr(options, name):
            raise UsageProblem(f"{option_name(name)} must not be empty")
    values, origins = length_and_sampling(settings)
    if options.generation_config == "auto":
        for setting in unsupported_generation(checkpoint_folder(settings)):
            warn(f"generation_config.json asks for {setting}, which is not supported: ignored")
    eos_ids = frozenset[int]() if options.ignore_eos else tokenizer.stop_ids
    try:
        params = SamplingParams(
            **values,
            seed=secrets.randbelow(2**32) if options.seed is None else options.seed,
            stop_ids=eos_ids | frozenset(options.stop_token_ids),
            ignore_eos=options.ignore_eos,
            bad_words=bad_word_ids(tokenizer, options.bad_words),
        )
    except EngineError as error:
        raise UsageProblem(worded(error, option_name)) from None
    return Defaults(params, origins)


def answer_options(settings: Settings, chat: bool) -> "AnswerOptions":
    """Return how answers become text; chat: apply the chat template."""
    from getp.text.answer_text import AnswerOptions

    options = settings.sampling
    return AnswerOptions(
        chat,
        options.stop,
        options.include_stop,
        not options.keep_special_tokens,
        options.min_new_tokens or 0,
    )


def sampling_params(
    settings: Settings, tokenizer: "Tokenizer", own: "FormatValues"
) -> "SamplingParams":
    """Return the parameters of a prompt on the terminal, and print what holds.

    own: what holds where neither an option nor the checkpoint sets it. Raises UsageProblem,
    CheckpointError.
    """
    from getp.defaults import describe

    defaults = sampling_defaults(settings, tokenizer)
    origin = "random" if settings.sampling.seed is None else option_name("seed")
    seed = f"{defaults.params.seed} ({origin})"
    print_message(f"getp: {describe(defaults, own, None, option_name, seed)}", dim=True)
    return defaults.fill(own)


def length_and_sampling(settings: Settings) -> "tuple[dict[str, Any], dict[str, Origin]]":
    """Return the fields of SamplingParams that options or the checkpoint set, and their origins."""
    from getp.defaults import SAMPLING
    from model.generation import recommended_sampling

    options, folder = settings.sampling, checkpoint_folder(settings)
    names = (*SAMPLING, "max_new_tokens", "min_new_tokens")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.given_length is not None or "max_new_tokens" in given:
        given.setdefault("max_new_tokens", None)
        given["max_positions"] = options.given_length or None  # 0: the model's limit
    recommended = {}
    if options.generation_config == "auto":
        recommended = recommended_sampling(folder, ignored=given)
    return {**recommended, **given}, {
        **dict.fromkeys(recommended, "checkpoint"),
        **dict.fromkeys(given, "option"),
    }


def identity(settings: Settings) -> dict[str, str]:
    """Return fingerprints of the files that results depend on, for journals."""
    from getp import fingerprint

    adapters = " ".join(
        f"{fingerprint.of_adapter(Path(folder))}:{weight:g}"
        for folder, weight in settings.engine.adapter
    )
    return {
        "checkpoint": fingerprint.of_checkpoint(checkpoint_folder(settings)),
        "tokenizer": fingerprint.of_tokenizer(tokenizer_path(settings)),
        **({"adapters": adapters} if adapters else {}),  # older journals lack it
        "weights": "dummy" if settings.engine.dummy_weights else "the checkpoint's",
    }


def load_engine(settings: Settings) -> "Engine":
    """Create the engine, which loads weights in `warm_up`. Raises UsageProblem, EngineError."""
    import torch

    from engine import Engine
    from engine.parallel import channel

    ranks, given = channel.torchrun_size(), settings.parallel.tensor_parallel
    if ranks > 1 and given not in (None, ranks):
        raise UsageProblem(
            f"--tensor-parallel {given} contradicts torchrun, which started {ranks} processes: "
            "remove the option"
        )
    ranks = given or ranks
    _check_ranks(settings, ranks)
    device = settings.engine.device
    if device.startswith("cuda"):
        index, count = torch.device(device).index or 0, torch.cuda.device_count()
        if index >= count:
            remedy = f"use --device cuda:{count - 1} or lower" if count else "use --device cpu"
            if not count:
                remedy = f"install the build of torch for your GPU, or {remedy}"
            raise UsageProblem(
                f"--device {device}: GPUs that torch finds on this machine: {count}; {remedy}"
            )
    config = replace(settings.engine, tensor_parallel=ranks)
    engine = Engine(checkpoint_folder(settings), config, notice=warn)
    engine.tokenizer_json = lambda: load_tokenizer(settings).to_json()
    return engine


def load_cluster(settings: Settings) -> "Cluster":
    """Create the replicas, which load weights in `warm_up`. Raises UsageProblem."""
    from engine.parallel import channel
    from getp.cluster.driver import Cluster

    if channel.torchrun_size() > 1:
        raise UsageProblem(
            "--replicas starts its own processes: run getp without torchrun, and use "
            "--tensor-parallel N to split each replica's model across N GPUs"
        )
    _check_ranks(settings, settings.engine.tensor_parallel)
    return Cluster(
        checkpoint_folder(settings),
        tokenizer_path(settings),
        settings.engine,
        replicas=settings.parallel.replicas or None,
        address=settings.parallel.ray_address,
        accept_different_rounding=settings.job.accept_different_rounding,
    )


def _check_ranks(settings: Settings, ranks: int) -> None:
    """Raise UsageProblem if the model cannot be split across this many GPUs."""
    from model import load_config
    from model.cost.operations import check_tensor_parallel

    try:
        check_tensor_parallel(load_config(checkpoint_folder(settings)), ranks)
    except ValueError as error:
        raise UsageProblem(f"--tensor-parallel {ranks}: {error}") from None


def check_system(settings: Settings) -> None:
    """Raise UsageProblem for a system prompt without a chat template."""
    if settings.prompt.system is not None and not settings.prompt.chat_template:
        raise UsageProblem(f"-y/--system needs --chat-template in mode {settings.mode}")


def check_variables(settings: Settings) -> None:
    """Raise UsageProblem for variables of the chat template, which the prompts do not use."""
    if settings.prompt.variables:
        raise UsageProblem(
            "--reasoning-effort and --chat-template-kwargs need --chat-template: prompts are "
            "completed as they are"
        )


def check_thinking(settings: Settings, tokenizer: "Tokenizer") -> None:
    """Raise UsageProblem for a budget of a model that does not mark its thinking."""
    from getp.text.parts.thinking import thinking_budget

    tokens = settings.sampling.thinking_budget
    if tokens is not None and thinking_budget(tokenizer, (), tokens) is None:
        raise UsageProblem(
            "--thinking-budget needs a model whose chat template marks its thinking, such as "
            "<think>"
        )


def check_json_report(settings: Settings) -> None:
    """Raise UsageProblem for a report as HTML in a mode that writes only JSON."""
    if (settings.job.report or "").endswith(".html"):
        raise UsageProblem(
            f"mode {settings.mode} writes its report as JSON: give --report a name with the suffix "
            ".json"
        )


def check_agreement(settings: Settings) -> None:
    """Raise UsageProblem for a required agreement without a reference."""
    options = settings.result_file
    if options.require_agreement is not None and options.reference is None:
        raise UsageProblem("--require-agreement needs --reference FILE")


def columns(settings: Settings) -> "Columns":
    """Return the columns of an input that is a table. Raises UsageProblem."""
    from getp.job.formats.table import Columns
    from getp.openai.body import FIELDS

    options, parameters = settings.table, {}
    for given in options.parameter_column:
        name, _, column = given.partition("=")
        if name not in FIELDS or name in ("prompt", "messages"):
            raise UsageProblem(
                f"--parameter-column {given}: {name!r} is not a parameter of a request, such as "
                "max_tokens or temperature"
            )
        parameters[name] = column or name
    return Columns(options.column, options.id_column, parameters)


def needed(settings: Settings, value: str | None, option: str) -> str:
    """Return the value of an option that a mode needs. Raises UsageProblem if it was not given."""
    if value is None:
        raise UsageProblem(f"mode {settings.mode} needs {option}")
    return value
