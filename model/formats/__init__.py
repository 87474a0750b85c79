"""How weights are stored: one object a format."""

from model.formats.dense import DENSE
from model.formats.mxfp4 import MXFP4

__all__ = ["DENSE", "MXFP4"]
