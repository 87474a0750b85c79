"""Weight formats: how the values of a weight are stored in a checkpoint and kept in memory.

One module per format, each with the interface of `WeightFormat`. Nothing here imports torch at
module level, because configs and the cost model, which must load quickly, refer to formats.
"""

from collections.abc import Callable, Mapping
from typing import Any

from model.formats import mxfp4
from model.formats.dense import DENSE, HEAD
from model.formats.format import StoredTensor, WeightFormat, full_interface
from model.formats.mxfp4 import MXFP4

__all__ = [
    "DENSE",
    "HEAD",
    "MXFP4",
    "QUANTIZATIONS",
    "StoredTensor",
    "WeightFormat",
    "full_interface",
]

QUANTIZATIONS: dict[str, Callable[[Mapping[str, Any]], dict[str, WeightFormat]]] = {
    "mxfp4": mxfp4.read_settings,
}
"""quant_method of a `quantization_config` → fields of ModelConfig, from its settings."""
