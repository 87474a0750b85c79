"""Mistral: Llama with a sliding window."""

from model.families.family import Family, layers
from model.families.keys import Keys


def _fields(keys: Keys) -> dict[str, object]:
    return {"layers": layers(keys, keys.optional_integer("sliding_window"))}


FAMILY = Family("sliding_window layer_types", _fields)
