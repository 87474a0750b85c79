"""EngineConfig: the settings of an engine. Importing this module does not import torch."""

import re
from dataclasses import dataclass
from numbers import Integral

from engine.errors import EngineError
from model.config import DTYPES, KV_DTYPES, QUANTIZED

DEVICE = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?")  # torch wraps indices above 127 silently

_INTEGERS = ("max_batch_size", "max_batch_tokens", "kv_memory", "block_size", "tensor_parallel")


@dataclass(frozen=True)
class EngineConfig:
    """How to run a checkpoint. `engine.resolve` chooses settings left at None or "auto".

    Raises TypeError for a value of the wrong type and EngineError for one that is out of range.
    """

    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto uses a GPU if there is one
    dtype: str = "auto"  # auto (the checkpoint's own), bfloat16, float16 or float32
    # Of the KV cache: auto (the compute dtype), one of DTYPES, fp8 (e4m3) or int8. Those of 8 bits
    # hold twice as many tokens as bfloat16; `model.ops.kv_values` states their errors.
    kv_dtype: str = "auto"
    quantize: str | None = None  # int8, int4 or fp8: convert dense weights as they load
    max_batch_size: int | None = None  # requests that run at once
    max_batch_tokens: int | None = None  # tokens computed in one step
    kv_memory: int | None = None  # bytes of the KV cache; None: sized from available memory
    block_size: int = 16  # positions of a KV cache block
    prefix_cache: bool = True  # reuse the KV of common prompt prefixes
    speculation: bool = True  # by prompt lookup, on a CPU; results are the same
    dummy_weights: bool = False  # random weights: only config.json is read
    # LoRA adapters, by directory, and the factor of their changes; they are added to the weights.
    adapter: tuple[tuple[str, float], ...] = ()
    tensor_parallel: int = 1  # ranks (processes) that the model is split over
    trust_kernels: bool = False  # on a GPU, use the default kernels without checking them

    def __post_init__(self) -> None:
        """Check every setting that can be checked without the checkpoint and the hardware."""
        for name in ("device", "dtype", "kv_dtype"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, not {getattr(self, name)!r}")
        for name in _INTEGERS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, Integral):
                raise TypeError(f"{name} must be an integer, not {value!r}")
        if not all(isinstance(f, str) and isinstance(w, int | float) for f, w in self.adapter):
            raise TypeError(f"adapter must be pairs (directory, weight), not {self.adapter!r}")
        if not DEVICE.fullmatch(self.device):
            raise EngineError(
                "{device} must be auto, cpu, cuda or cuda:N, not {given}", given=repr(self.device)
            )
        if self.dtype not in ("auto", *DTYPES):
            raise EngineError(
                "{dtype} must be auto, {known}, not {given}",
                known=", ".join(DTYPES),
                given=repr(self.dtype),
            )
        if self.kv_dtype not in ("auto", *KV_DTYPES):
            raise EngineError(
                "{kv_dtype} must be auto, {known}, not {given}",
                known=", ".join(KV_DTYPES),
                given=repr(self.kv_dtype),
            )
        if self.quantize is not None and self.quantize not in QUANTIZED:
            raise EngineError(
                "{quantize} must be {known}, not {given}",
                known=", ".join(QUANTIZED),
                given=repr(self.quantize),
            )
        for name in ("max_batch_size", "max_batch_tokens", "block_size", "tensor_parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EngineError(f"{{{name}}} must be 1 or more, not {value}")
