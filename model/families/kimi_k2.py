"""Kimi K2: DeepSeek-V3 by another name."""

from model.families.deepseek_v3 import FAMILY

__all__ = ["FAMILY"]
