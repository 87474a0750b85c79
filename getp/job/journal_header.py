"""The header of a journal: its first line, which identifies the job that the journal belongs to."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

from getp.errors import GetpError

Header = dict[str, Any]
"""The "fingerprint" and the values that a resumed job keeps."""

ROUNDING = "rounding"
"""The key of what rounding depends on; journals of older versions lack it."""

# Fingerprint keys that do not say what they are; the keys are part of the file format.
_LABELS = {"capped": "length limit given"}


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


def refuse_changes(path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise GetpError if two fingerprints differ; it names each value that does."""
    changes, fields = changed_values(old, new)
    if changes:
        raise GetpError(
            f"this job was started with {changes}. Repeat the original command to resume, or add "
            "{restart} to start over (journal: {journal})",
            **fields,
            journal=path,
        )


def changed_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Return the text of a GetpError that names what differs, and the values that it names."""
    # A value is a field, so that braces in it stay. A name without spaces is a setting.
    fields: dict[str, str] = {}
    changes = []
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            label = _LABELS.get(name, name)
            key = name.replace(" ", "_")
            fields |= {f"old_{key}": repr(old.get(name)), f"new_{key}": repr(new.get(name))}
            setting = f"{{{name}}}" if key == label else label
            changes.append(f"{setting} {{old_{key}}}, now {{new_{key}}}")
    return "; ".join(changes), fields
