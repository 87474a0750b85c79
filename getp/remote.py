"""Files at URLs such as s3://bucket/file, by fsspec and the package for that kind of URL."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from getp.errors import GetpError

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return _URL.match(path) is not None


def local_name(path: str) -> str:
    """Return the path beside which a job keeps its own files: of a URL, the name alone.

    Files at a URL can neither be locked nor appended to.
    """
    return os.path.basename(path.rstrip("/")) if is_remote(path) else path


def remote_files(url: str) -> list[str]:
    """Return the URL itself or, for a pattern or a directory, the sorted URLs of its files."""
    with _reported(url):
        system, path = _file_system(url)
        if any(character in path for character in "*?["):
            found = system.glob(path)
        elif system.isdir(path):
            found = system.find(path)
        else:
            return [url]
        return sorted(str(system.unstrip_protocol(name)) for name in found)


@contextmanager
def open_remote(url: str, mode: str = "rb") -> Iterator[BinaryIO]:
    """Open a URL. Raises GetpError, also for errors while it is read or written."""
    with _reported(url, "write" if "w" in mode else "read"):
        system, path = _file_system(url)
        with system.open(path, mode) as file:
            yield cast(BinaryIO, file)


def check_remote(url: str) -> None:
    """Raise GetpError if the file system of a URL is not usable."""
    with _reported(url, "write"):
        _file_system(url)


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise GetpError(f"{url} needs the package fsspec: pip install fsspec") from None
    found: tuple[Any, str] = url_to_fs(url)
    return found


@contextmanager
def _reported(url: str, verb: str = "read") -> Iterator[None]:
    """Turn the errors of a file system, which are of many kinds, into GetpError."""
    try:
        yield
    except (GetpError, GeneratorExit):
        raise
    except ImportError as error:  # its message names the package to install
        raise GetpError(f"cannot {verb} {url}: {error}") from error
    except Exception as error:
        # The exceptions of remote file systems have no common class but Exception.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise GetpError(f"cannot {verb} {url}: {reason}") from error
