"""Fingerprints of checkpoints and tokenizers: hashes of their contents, independent of paths.

And what differs between two fingerprints of jobs, as messages name it.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from model.config import open_regular
from model.gguf import is_gguf, read_gguf

_MAX_WHOLE_BYTES = 64 << 20  # smaller files are hashed completely
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10  # larger files: this many evenly spaced samples

_CHECKPOINT_FILES = (
    "config.json", "generation_config.json", "hf_quant_config.json", "*.safetensors",
)  # fmt: skip
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip

# Keys of a job's fingerprint that do not say what they are; they are part of the file format.
_LABELS = {
    "capped": "length limit given",
    "openai temperature": "temperature of OpenAI requests",
}


def of_checkpoint(folder: Path) -> str:
    """Return the fingerprint of a checkpoint's configuration and weights: a directory or a GGUF.

    Large weight files are sampled: training changes every part of them. Raises CheckpointError for
    anything that is not a regular file.
    """
    if is_gguf(folder):
        return _of_paths(read_gguf(folder).files)
    return _of_files(folder, _CHECKPOINT_FILES)


def of_adapter(folder: Path) -> str:
    """Return the fingerprint of an adapter's directory. Raises CheckpointError."""
    return _of_files(folder, ("adapter_config.json", "adapter_model.safetensors"))


def of_tokenizer(path: Path) -> str:
    """Return the fingerprint of a tokenizer: of a directory, a tokenizer.json or a GGUF file."""
    if is_gguf(path):
        return _of_paths(read_gguf(path).files)
    if path.is_dir():
        return _of_files(path, _TOKENIZER_FILES)
    return _of_files(path.parent, (path.name, *_TOKENIZER_FILES[1:]))


def _of_files(folder: Path, patterns: tuple[str, ...]) -> str:
    return _of_paths(file for pattern in patterns for file in sorted(folder.glob(pattern)))


def _of_paths(files: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            if size <= _MAX_WHOLE_BYTES:
                digest.update(stream.read(size))
                continue
            for sample in range(_SAMPLES):
                stream.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def changes(
    old: Mapping[str, Any], new: Mapping[str, Any], now: str = "now"
) -> tuple[str, dict[str, str]]:
    """Return the text that names what differs, for a GetpError, and the fields of that text.

    now: the word before each new value.
    """
    # A value is a field, so that braces in it stay. A name without spaces is a setting.
    fields: dict[str, str] = {}
    texts = []
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            label = _LABELS.get(name, name)
            key = name.replace(" ", "_")
            fields |= {f"old_{key}": repr(old.get(name)), f"new_{key}": repr(new.get(name))}
            setting = f"{{{name}}}" if key == label else label
            texts.append(f"{setting} {{old_{key}}}, {now} {{new_{key}}}")
    return "; ".join(texts), fields
