"""The sampling that a checkpoint recommends: in generation_config.json, or in GGUF's metadata."""

import os
from collections.abc import Container
from pathlib import Path
from typing import Any

from model.config import read_json
from model.families.config_keys.keys import Keys
from model.gguf import Gguf, is_gguf, read_gguf

GENERATION_CONFIG = "generation_config.json"

# Keys that change the tokens and are not supported, with the values that switch them off.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
}

_GGUF_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def recommended_sampling(checkpoint: Path, ignored: Container[str] = ()) -> dict[str, Any]:
    """Return what generation_config.json has of the sampling and the lengths that are supported.

    `do_sample: false` means temperature 0, and `do_sample: true` without a temperature means 1, as
    in transformers. A top_k of -1 is returned as 0 (all tokens). The keys in `ignored` are not
    read. Raises CheckpointError for an invalid value.
    """
    keys = _keys(checkpoint)
    found: dict[str, Any] = {}
    sampled = None if "temperature" in ignored else keys.get("do_sample")
    if sampled not in (None, True, False):
        raise keys.fail(f"'do_sample' must be true or false, not {sampled!r}")
    for name, read in _READERS.items():
        if name not in ignored and keys.get(name) is not None:
            found[name] = read(keys, name)
    if sampled is not None:
        found["temperature"] = found.get("temperature", 1.0) if sampled else 0.0
    return found


def unsupported_generation(checkpoint: Path) -> list[str]:
    """Return the settings of generation_config.json that change tokens and are not supported."""
    return [
        f"{name} {value!r}"[:80]
        for name, neutral in _UNSUPPORTED.items()
        if (value := _keys(checkpoint).get(name)) is not None and value not in neutral
    ]


def _keys(checkpoint: Path) -> Keys:
    if is_gguf(checkpoint):
        return Keys(checkpoint, _of_gguf(read_gguf(checkpoint)))
    file = checkpoint / GENERATION_CONFIG
    stored = read_json(file) if os.path.lexists(file) else {}
    # In JSON 50.0 is the same number as 50.
    return Keys(file, {name: _without_fraction(value) for name, value in stored.items()})


def _of_gguf(gguf: Gguf) -> dict[str, Any]:
    found = {
        own: gguf.metadata[f"general.sampling.{key}"]
        for key, own in _GGUF_KEYS.items()
        if f"general.sampling.{key}" in gguf.metadata
    }
    return {name: _without_fraction(value) for name, value in found.items()}


def _without_fraction(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _temperature(keys: Keys, name: str) -> float:
    value = keys.get(name)
    if not _is_number(value) or not 0 <= value < 1e9:
        raise keys.fail(f"'{name}' must be a number of 0 or more, not {value!r}")
    return float(value)


def _top_p(keys: Keys, name: str) -> float:
    return _positive_number(keys, name, 1)


def _top_k(keys: Keys, name: str) -> int:
    return max(0, keys.integer(name, minimum=-1))


def _min_p(keys: Keys, name: str) -> float:
    value = keys.get(name)
    if not _is_number(value) or not 0 <= value <= 1:
        raise keys.fail(f"'{name}' must be a number from 0 to 1, not {value!r}")
    return float(value)


def _repetition_penalty(keys: Keys, name: str) -> float:
    return _positive_number(keys, name, 100)


def _positive_number(keys: Keys, name: str, most: int) -> float:
    value = keys.get(name)
    if not _is_number(value) or not 0 < value <= most:
        raise keys.fail(f"'{name}' must be a number above 0 and at most {most}, not {value!r}")
    return float(value)


def _min_new_tokens(keys: Keys, name: str) -> int:
    return keys.integer(name, minimum=0)


def _max_new_tokens(keys: Keys, name: str) -> int:
    return keys.integer(name)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_READERS = {
    "temperature": _temperature,
    "top_p": _top_p,
    "top_k": _top_k,
    "min_p": _min_p,
    "repetition_penalty": _repetition_penalty,
    "min_new_tokens": _min_new_tokens,
    "max_new_tokens": _max_new_tokens,
}
