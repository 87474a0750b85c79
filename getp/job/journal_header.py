"""The header of a journal: its first line, which identifies the job that the journal belongs to."""

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

from getp import fingerprint
from getp.errors import GetpError
from getp.files import MAX_LINE_BYTES

Header = dict[str, Any]
"""The "fingerprint" and the values that a resumed job keeps."""

ROUNDING = "rounding"
"""The key of what rounding depends on; journals of older versions lack it."""

_OLD_IDS = "tokens"  # what older journals call the output format "ids"


def with_checksum(content: bytes) -> bytes:
    """Return the line of a journal with this content."""
    return b"%08x %s\n" % (zlib.crc32(content), content)


def checked_content(line: bytes) -> bytes | None:
    """Return the content of a line; None if it is damaged."""
    content = line[9:-1]
    return content if line == with_checksum(content) else None


def header_line(header: Header) -> bytes:
    """Return the first line of a journal."""
    return with_checksum(json.dumps(header).encode())


def read_header(line: bytes) -> Header | None:
    """Return the header in a first line; None if the line is damaged or is not a header."""
    try:
        found = json.loads(checked_content(line) or b"")
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict) and isinstance(found.get("fingerprint"), dict):
        return found
    return None


def noted_rounding(path: str) -> dict[str, Any] | None:
    """Return what a journal at this path says of its rounding; None if there is no journal."""
    if not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as file:
            header = read_header(file.readline(MAX_LINE_BYTES))
    except OSError:
        return None  # opening the journal says why
    found = None if header is None else header.get(ROUNDING, {})
    return found if isinstance(found, dict) else None


_NEUTRAL = {
    "min_p": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "min_new_tokens": 0,
    "logit_bias": [],
    "bad_words": [],
    "thinking": None,
    "answer": {},
}


def comparable(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fingerprint as this version writes it, without values that have no effect."""
    # Older journals name no dtype of the KV cache, which always had the compute dtype.
    found = {"kv_dtype": fingerprint.get("dtype"), **fingerprint}
    if found.get("output format") == _OLD_IDS:
        found["output format"] = "ids"
    for name, neutral in _NEUTRAL.items():  # older journals lack them
        if name in found and found[name] == neutral:
            del found[name]
    temperature = found.get("temperature")
    if found.get("input format") != "text":  # older journals have one for all requests
        return {"openai temperature": temperature, **found}
    # No line can set its own temperature.
    unused = ("top_p", "top_k", "min_p") if temperature == 0 else ()
    return {name: value for name, value in found.items() if name not in unused}


def refuse_changes(path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise GetpError if two fingerprints differ; it names each value that does."""
    changes, fields = fingerprint.changes(old, new)
    if changes:
        raise GetpError(
            f"this job was started with {changes}. Repeat the original command to resume, or add "
            "{restart} to start over (journal: {journal})",
            **fields,
            journal=path,
        )
