"""Model families: the keys of config.json → ModelConfig, and tensor names → parameters.

A family is one module here, named as its `model_type`, that defines FAMILY, and one line in
`FAMILIES`. A key that is neither understood nor known to be harmless is refused, because ignoring
a key that matters would give wrong results silently.
"""

import os
from collections.abc import Callable, Container
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from model.config import CheckpointError, ModelConfig, conversion_hint, read_json
from model.families.config_keys.keys import Keys
from model.families.family import Family, stated_dtype
from model.families.layer_formats import with_layer_formats
from model.families.nested import NESTED, nested_names, text_family, text_keys
from model.families.tensor_names import TensorNames
from model.gguf import is_gguf, read_gguf
from model.gguf.config import config_values
from model.gguf.names import stored_formats, tensor_names
from model.stored_tensors import StoredTensors

FAMILIES = (
    "deepseek_v2",
    "deepseek_v3",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "granite",
    "hunyuan_v1_dense",
    "kimi_k2",
    "llama",
    "minimax_m2",
    "ministral3",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
)

_MODELOPT = "hf_quant_config.json"


@cache
def family(model_type: str) -> Family:
    """The family of this model_type, which must be one of FAMILIES."""
    found: Family = import_module(f"model.families.{model_type}").FAMILY
    return found


def load_config(
    checkpoint: str | Path, notice: Callable[[str], None] = lambda text: None
) -> ModelConfig:
    """Read config.json and the stop ids of generation_config.json in a checkpoint directory.

    Or read the metadata of a GGUF file, which contain both.

    What the config leaves to the weights, or contradicts, is read from them: a dtype that is
    missing or "auto", and a head that is stored though it should be the embedding; `notice` is
    called with a sentence about it. Raises CheckpointError for a missing or malformed file, an
    unknown model_type, or a key that changes the mathematics and is not supported.
    """
    folder = Path(checkpoint)
    if is_gguf(folder):
        return _gguf_config(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint directory")
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{folder}: contains no config.json, so it is not a checkpoint{conversion_hint(folder)}"
        )
    stop_ids = None
    generation = folder / "generation_config.json"
    if os.path.lexists(generation):
        stop_ids = Keys(generation, read_json(generation)).token_ids("eos_token_id")
    values = read_json(path)
    if values.get("quantization_config") is None and os.path.lexists(folder / _MODELOPT):
        values["quantization_config"] = _modelopt_settings(folder / _MODELOPT)
    config, stored = parse_config(values, path, stop_ids), StoredTensors(folder)
    names = stored_names(config.model_type, stored)
    if names != stored_names(config.model_type, ()):  # for which parse_config found the formats
        config = with_layer_formats(config, names)
    if stated_dtype(_text_keys(Keys(path, values))) is None:
        dtype = stored.dtype(names.embedding) or stored.dtype(names.head)  # if it is tied to it
        config = replace(config, dtype=dtype or config.dtype)
    if config.tie_word_embeddings and stored.differ(names.embedding, names.head):
        notice(
            f"{path}: 'tie_word_embeddings' is true, but the stored {names.head} differs from the "
            "embedding; the stored one is used, as in transformers"
        )
        config = replace(config, tie_word_embeddings=False)
    return config


def _gguf_config(path: Path) -> ModelConfig:
    gguf = read_gguf(path)
    config = parse_config(config_values(gguf), path)
    # Norms are stored as they are used, with the family's offset added.
    norm = replace(config.norm, weight_offset=0.0)
    config = replace(config, norm=norm, stored_formats=stored_formats(gguf))
    return with_layer_formats(config, tensor_names(gguf))


def _modelopt_settings(path: Path) -> dict[str, Any]:
    """The quantization of a checkpoint of ModelOpt that has it in a file of its own."""
    settings = read_json(path).get("quantization")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: 'quantization' must be an object, not {settings!r:.60}")
    return {"quant_method": "modelopt", **settings}


def parse_config(
    values: dict[str, Any], source: str | Path, stop_ids: frozenset[int] | None = None
) -> ModelConfig:
    """The content of a config.json → ModelConfig; errors name `source`.

    `stop_ids` are those of generation_config.json, which are added to those of the config itself;
    None if there is no such file. Raises CheckpointError as load_config does.
    """
    keys = Keys(source, values)
    model_type = keys.get("model_type")
    known = sorted((*FAMILIES, *NESTED))
    if not isinstance(model_type, str) or model_type not in known:
        near = get_close_matches(str(model_type), known, 1)
        hint = f"; the nearest is {near[0]}, which is another architecture" if near else ""
        raise keys.fail(
            f"model_type {model_type!r} is not supported{hint}; supported: {', '.join(known)}"
        )
    if model_type not in NESTED:
        config = family(model_type).config(keys, stop_ids)
    else:
        nested = NESTED[model_type]
        own = family(text_family(keys, nested))
        text = replace(own, defaults={**own.defaults, **nested.defaults})
        config = replace(text.config(text_keys(keys, nested), stop_ids), model_type=model_type)
    return with_layer_formats(config, stored_names(model_type, ()))


def _text_keys(keys: Keys) -> Keys:
    """The keys of the text model, which are all of them unless the checkpoint has other parts."""
    nested = NESTED.get(keys.values["model_type"])
    return keys if nested is None else text_keys(keys, nested)


def stored_names(model_type: str, stored: Container[str]) -> TensorNames:
    """The names of a checkpoint's tensors, of which `stored` are there."""
    if model_type not in NESTED:
        return family(model_type).names
    nested = NESTED[model_type]
    candidates = nested_names(family(nested.text).names, nested)
    # The embedding may be quantized, and then has tensors of other names.
    return next((names for names in candidates if names.final_norm in stored), candidates[-1])


def is_of_another_part(model_type: str, name: str) -> bool:
    """Whether a stored tensor belongs to a part of the checkpoint that is not run."""
    return model_type in NESTED and name.startswith(NESTED[model_type].others)
