"""Weight formats: how the values of a weight are stored in a checkpoint and kept in memory.

One module per format, each with the interface of `WeightFormat`. Nothing here imports torch at
module level, because configs and the cost model, which must load quickly, refer to formats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from model.formats import awq, compressed_tensors, fp8, gptq, mxfp4, nvfp4
from model.formats.dense import DENSE, HEAD, PER_HEAD
from model.formats.float8 import FP8
from model.formats.format import StoredTensor, WeightFormat, full_interface
from model.formats.integers import INT4, INT8
from model.formats.mxfp4 import MXFP4
from model.formats.rules import FormatRules

if TYPE_CHECKING:
    from model.families.config_keys.keys import Keys

__all__ = [
    "DENSE",
    "FP8",
    "HEAD",
    "INT4",
    "INT8",
    "MXFP4",
    "PER_HEAD",
    "QUANTIZATIONS",
    "FormatRules",
    "StoredTensor",
    "WeightFormat",
    "full_interface",
]

QUANTIZATIONS: dict[str, Callable[[Keys], FormatRules]] = {
    "awq": awq.read_settings,
    "compressed-tensors": compressed_tensors.read_settings,
    "fp8": fp8.read_settings,
    "gptq": gptq.read_settings,
    "modelopt": nvfp4.read_settings,
    "mxfp4": mxfp4.read_settings,
}
"""quant_method of a `quantization_config` → the formats of the weights, from its settings."""
