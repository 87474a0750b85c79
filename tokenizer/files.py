"""Reading the files of a tokenizer, which come from an unknown author."""

import os
from pathlib import Path

from tokenizer.errors import TokenizerError


def read_file(path: Path, limit: int) -> bytes | None:
    """Return the content of a regular file of at most `limit` bytes; None if there is no file.

    Anything else, such as a named pipe or a link to a device, might never end. Raises
    TokenizerError.
    """
    try:
        if not os.path.lexists(path):
            return None
        if not path.is_file():
            raise TokenizerError(f"{path} is not a regular file or a link to one")
        with open(path, "rb", opener=_open_without_waiting) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise TokenizerError(f"{path} has {size} bytes, more than the limit of {limit}")
            return file.read(size)
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from error


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # it may have become a named pipe in the meantime
