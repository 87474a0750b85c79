"""What an engine can be asked for, and what it says where it cannot."""

import os
from dataclasses import replace

import torch

from model import ModelConfig
from model.cost.operations import check_tensor_parallel
from model.ops.backend import choose_backend

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class EngineError(ValueError):
    """The engine cannot run as it was asked to; the message says what to change."""


def device_named(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N. Raises EngineError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise EngineError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineError(f"device {name!r} does not exist: torch sees {torch.cuda.device_count()}")
    return device


def dtype_named(name: str, own: str, device: torch.device) -> torch.dtype:
    """Which type to compute in; own: the checkpoint's. Raises EngineError."""
    if name == "auto":
        # float16 is slow on CPUs, and bfloat16 has at least its range.
        name = "bfloat16" if own == "float16" and device.type == "cpu" else own
    if name not in _DTYPES:
        raise EngineError(f"dtype must be auto, {', '.join(_DTYPES)}, not {name!r}")
    return _DTYPES[name]


def at_least_1(name: str, value: int | None, default: int) -> int:
    """The value, or the default for None. Raises EngineError."""
    value = default if value is None else value
    if value < 1:
        raise EngineError(f"{name} must be 1 or more, not {value}")
    return value


def check_ranks(config: ModelConfig, size: int, device: torch.device) -> torch.device:
    """Where rank 0 of so many computes. Raises EngineError if there cannot be so many."""
    try:
        check_tensor_parallel(config, size)
    except ValueError as error:
        raise EngineError(f"tensor parallelism of {size}: {error}") from None
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise EngineError(
            f"device {device} is one GPU, and tensor parallelism takes {size}: give cuda, and"
            " choose them with CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES"
        )
    here = min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))  # with torchrun, several hosts
    if here > torch.cuda.device_count():
        raise EngineError(
            f"tensor parallelism takes {here} GPUs here: torch sees {torch.cuda.device_count()}"
        )
    return torch.device("cuda", 0)


def held_config(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> ModelConfig:
    """The config as the weights are held, which is not always as they are stored.

    What a step reads depends on it: MXFP4 becomes dense where no kernel takes it packed.
    """
    if config.mxfp4_experts and not choose_backend(device, dtype).keeps_mxfp4:
        return replace(config, mxfp4_experts=False)
    return config
