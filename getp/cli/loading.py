"""Loads the checkpoint, tokenizer, sampling parameters and engine for the given settings.

Importing torch takes a second, so modules that need it are imported inside functions: a mistyped
option is reported at once.
"""

import re
import secrets
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from getp import EMBEDDED
from getp.cli.settings import Settings
from getp.cli.wording import option_name
from getp.errors import GetpError, UsageProblem
from getp.terminal import print_message, warn

if TYPE_CHECKING:
    from engine import Engine, SamplingParams
    from getp.cluster.driver import Cluster
    from getp.defaults import Defaults, Origin
    from tokenizer import Tokenizer

_GETP = Path(__file__).parents[1]


def checkpoint_folder(settings: Settings) -> Path:
    """Return the given checkpoint, or the embedded model, from the package or the source tree."""
    if settings.checkpoint is not None:
        return Path(settings.checkpoint)
    for folder in (_GETP / "data" / "model", _GETP.parent / "data" / "model"):
        if folder.is_dir():
            return folder
    raise GetpError("the embedded model is missing from this installation: give a CHECKPOINT")


def checkpoint_name(settings: Settings) -> str:
    """Return the checkpoint's name for reports."""
    if settings.checkpoint is None:
        return EMBEDDED
    return Path(settings.checkpoint).resolve().name


def check_checkpoint(settings: Settings) -> None:
    """Raise UsageProblem if the given checkpoint is not a directory with a model in it."""
    if settings.checkpoint is None:
        return
    folder = Path(settings.checkpoint)
    if not folder.exists():
        if any(letter.isspace() for letter in settings.checkpoint):
            hint = "A prompt is given with -i/--input"
        else:
            name = settings.checkpoint
            model = name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else "OWNER/NAME"
            hint = f"getp does not download models: hf download {model} --local-dir {folder}"
        raise UsageProblem(f"the directory {folder} does not exist. {hint}")
    if not folder.is_dir():
        raise UsageProblem(f"{folder} is a file: give the directory, {folder.parent}")
    if not any((folder / name).exists() for name in ("config.json", "tokenizer.json")):
        raise UsageProblem(
            f"{folder} is not a Hugging Face model directory (no config.json, no tokenizer.json)"
        )


def tokenizer_path(settings: Settings) -> Path:
    """Return the file or directory of the tokenizer."""
    return Path(settings.prompt.tokenizer or checkpoint_folder(settings))


def load_tokenizer(settings: Settings) -> "Tokenizer":
    """Load the tokenizer. Raises TokenizerError."""
    from tokenizer import Tokenizer

    return Tokenizer.load(tokenizer_path(settings))


def sampling_defaults(settings: Settings, tokenizer: "Tokenizer") -> "Defaults":
    """Return what options and the checkpoint's generation_config.json say about requests.

    Without a given seed it is random. Raises UsageProblem, CheckpointError.
    """
    from engine import SamplingParams
    from getp.defaults import Defaults
    from model.generation import unsupported_generation

    options = settings.sampling
    if "" in options.stop:
        raise UsageProblem("--stop must not be empty")
    values, origins = length_and_sampling(settings)
    for setting in unsupported_generation(checkpoint_folder(settings)):
        warn(f"generation_config.json asks for {setting}, which is not supported: it is ignored")
    params = SamplingParams(
        **values,
        seed=secrets.randbelow(2**32) if options.seed is None else options.seed,
        stop_ids=frozenset() if options.ignore_eos else tokenizer.stop_ids,
        ignore_eos=options.ignore_eos,
    )
    return Defaults(params, origins)


def sampling_params(settings: Settings, tokenizer: "Tokenizer") -> "SamplingParams":
    """Return the parameters of a prompt on the terminal, and print what holds.

    Raises UsageProblem, CheckpointError.
    """
    from getp.defaults import TEXT, describe

    defaults = sampling_defaults(settings, tokenizer)
    origin = "random" if settings.sampling.seed is None else option_name("seed")
    seed = f"{defaults.params.seed} ({origin})"
    print_message(f"getp: {describe(defaults, TEXT, None, option_name, seed)}")
    return defaults.fill(TEXT)


def length_and_sampling(settings: Settings) -> "tuple[dict[str, Any], dict[str, Origin]]":
    """Return the fields of SamplingParams that options or the checkpoint set, and their origins."""
    from model.generation import recommended_sampling

    options, folder = settings.sampling, checkpoint_folder(settings)
    names = ("temperature", "top_p", "top_k", "max_new_tokens")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.given_length is not None or "max_new_tokens" in given:
        given.setdefault("max_new_tokens", None)
        given["max_positions"] = options.given_length or None  # 0: the model's limit
    recommended = recommended_sampling(folder, ignored=given)
    return {**recommended, **given}, {
        **dict.fromkeys(recommended, "checkpoint"),
        **dict.fromkeys(given, "option"),
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
    return Engine(checkpoint_folder(settings), config, notice=warn)


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


def needed(settings: Settings, value: str | None, option: str) -> str:
    """Return the value of an option that a mode needs. Raises UsageProblem if it was not given."""
    if value is None:
        raise UsageProblem(f"mode {settings.mode} needs {option}")
    return value
