"""Model families: the keys of config.json → ModelConfig, and tensor names → parameters.

A family is one module here, named as its `model_type`, that defines FAMILY, and one line in
`FAMILIES`. A key that is neither understood nor known to be harmless is refused, because ignoring
a key that matters would give wrong results silently.
"""

import os
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from model.config import CheckpointError, ModelConfig, conversion_hint, read_json
from model.families.family import Family
from model.families.keys import Keys

FAMILIES = (
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)


@cache
def family(model_type: str) -> Family:
    """The family of this model_type, which must be one of FAMILIES."""
    found: Family = import_module(f"model.families.{model_type}").FAMILY
    return found


def load_config(checkpoint: str | Path) -> ModelConfig:
    """Read config.json and the stop ids of generation_config.json in a checkpoint directory.

    Raises CheckpointError for a missing or malformed file, an unknown model_type, or a key that
    changes the mathematics and is not supported.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint directory")
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{folder}: contains no config.json, so it is not a checkpoint{conversion_hint(folder)}"
        )
    stop_ids: frozenset[int] = frozenset()
    generation = folder / "generation_config.json"
    if os.path.lexists(generation):
        stop_ids = Keys(generation, read_json(generation)).token_ids("eos_token_id")
    return parse_config(read_json(path), path, stop_ids)


def parse_config(
    values: dict[str, Any], source: str | Path, stop_ids: frozenset[int] = frozenset()
) -> ModelConfig:
    """The content of a config.json → ModelConfig; errors name `source`.

    `stop_ids` are added to those of the config itself. Raises CheckpointError as load_config does.
    """
    keys = Keys(source, values)
    model_type = keys.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise keys.fail(
            f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return family(model_type).config(keys, stop_ids)
