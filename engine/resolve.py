"""EngineConfig → Settings: the device, the dtype and the limits of a run on this machine."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.errors import EngineError
from model import ModelConfig, load_config
from model.config import QUANTIZED
from model.cost.batch_limits import (
    CPU_BATCH_SIZE,
    cpu_batch_tokens,
    default_batch_size,
    default_batch_tokens,
)
from model.cost.measure import hardware_name
from model.cost.operations import check_tensor_parallel
from model.loader import with_adapters
from model.ops.backend import Backend, KvDtypeError, choose_backend
from model.ops.cpu.bindings import library


@dataclass(frozen=True)
class Settings:
    """An EngineConfig with a value for every setting."""

    model: ModelConfig  # with the formats in memory, see `held_config`
    device: torch.device  # of rank 0
    dtype: torch.dtype
    max_batch_size: int
    max_batch_tokens: int
    block_size: int
    kv_memory: int | None  # bytes; None: sized from available memory
    tensor_parallel: int

    @property
    def on_cpu(self) -> bool:
        """Whether the model runs on a CPU."""
        return self.device.type == "cpu"


def resolve(config: EngineConfig, model: ModelConfig) -> Settings:
    """Choose the settings that `config` leaves open. Raises EngineError if it cannot run here."""
    device = choose_device(config.device)
    if config.tensor_parallel > 1:
        device = rank_0_device(model, config.tensor_parallel, device)
    dtype = choose_dtype(config.dtype, model.dtype, device)
    form = QUANTIZED.get(config.quantize or "")
    if form and form.held(choose_backend(device, dtype), stacked=False) != form:
        raise EngineError(
            "{quantize} {name} needs getp's native kernels for CPUs, which compute in bfloat16; "
            "this run would be on {where} in {type}: use {device} cpu and {dtype} bfloat16, or "
            "omit {quantize}",
            name=config.quantize,
            where=device if device.type != "cpu" or library() else "a CPU without them",
            type=dtype_name(dtype),
        )
    held = held_config(model, device, dtype)
    if device.type == "cpu":
        size = config.max_batch_size or CPU_BATCH_SIZE
        tokens = cpu_batch_tokens(model)
    else:
        memory = torch.cuda.get_device_properties(device).total_memory
        ranks = config.tensor_parallel
        size = config.max_batch_size or default_batch_size(held, dtype_name(dtype), memory, ranks)
        tokens = default_batch_tokens(size)
    return Settings(
        model=held,
        device=device,
        dtype=dtype,
        max_batch_size=size,
        max_batch_tokens=config.max_batch_tokens or tokens,
        block_size=config.block_size,
        kv_memory=config.kv_memory,
        tensor_parallel=config.tensor_parallel,
    )


def load_model_config(
    checkpoint: str | Path, config: EngineConfig, notice: Callable[[str], None] = lambda text: None
) -> ModelConfig:
    """The config of a checkpoint with the KV cache and the weights that the settings ask for."""
    stored = load_config(checkpoint, notice)
    adapters = () if config.dummy_weights else config.adapter
    found = with_adapters(stored, checkpoint, adapters)
    if found != stored:
        notice(
            "weights that an adapter changes lose the checkpoint's format: they are dense, "
            "which takes more memory, unless they are quantized as they are loaded"
        )
    found = replace(found, kv_dtype=config.kv_dtype)
    return found.quantized(config.quantize) if config.quantize else found


def choose_device(name: str) -> torch.device:
    """The device of a setting: auto, cpu, cuda or cuda:N. Raises EngineError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise EngineError(
            "{device} {name} does not exist: torch finds {count} GPUs", name=name, count=count
        )
    return device


def choose_dtype(name: str, checkpoint_dtype: str, device: torch.device) -> torch.dtype:
    """The compute dtype of a setting: auto, or one of `DTYPES`."""
    if name == "auto":
        name = checkpoint_dtype
        if name == "float16" and device.type == "cpu":
            name = "bfloat16"  # float16 is slow on CPUs, and bfloat16 has at least its range
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in settings and reports, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


KERNEL_CHOICES = "kernel choices"
"""The key in `rounding` of the choices of kernels other than the defaults."""


def rounding(
    device: torch.device, dtype: torch.dtype, tensor_parallel: int, choices: Mapping[str, Any]
) -> dict[str, Any]:
    """What the rounding of results depends on besides checkpoint and dtype, as JSON values.

    choices: kernels other than the defaults, by operation.
    """
    torch_version = str(torch.__version__)
    if device.type == "cpu":
        torch_version += f", {torch.backends.cpu.get_cpu_capability()}"
    return {
        "kernels": choose_backend(device, dtype).kernels(hardware_name(device)),
        "torch": torch_version,
        "tensor_parallel": tensor_parallel,
        **({KERNEL_CHOICES: dict(choices)} if choices else {}),
    }


def rank_0_device(model: ModelConfig, size: int, device: torch.device) -> torch.device:
    """The device of rank 0 of `size` ranks. Raises EngineError if that many cannot run."""
    try:
        check_tensor_parallel(model, size)
    except ValueError as error:
        raise EngineError("{tensor_parallel} {size}: {cause}", size=size, cause=error) from None
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise EngineError(
            "{device} {name} is one GPU, but {tensor_parallel} {size} needs {size}: use "
            "{device} cuda and select GPUs with CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES",
            name=device,
            size=size,
        )
    local = min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))  # torchrun on several hosts
    count = torch.cuda.device_count()
    if local > count:
        raise EngineError(
            "{tensor_parallel} {size} needs {local} GPUs on this host, but torch finds {count}",
            size=size,
            local=local,
            count=count,
        )
    return torch.device("cuda", 0)


def held_config(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> ModelConfig:
    """The config with the formats of weights in memory, which may differ from the checkpoint's.

    Weights become dense where no kernel reads their format, which changes the bytes of a step.
    Raises EngineError if the device has no operations for the config's KV cache.
    """
    return config.held(backend_of(config, device, dtype))


def backend_of(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of a model. Raises EngineError if it has no operations for its KV cache."""
    try:
        return choose_backend(device, dtype, config.kv_dtype)
    except KvDtypeError as error:
        raise EngineError(
            "{kv_dtype} {name} is not possible here: {cause}; use {kv_dtype} auto",
            name=config.kv_dtype,
            cause=error,
        ) from None
