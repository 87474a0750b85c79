"""The safetensors files of a checkpoint directory."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.config import CheckpointError, conversion_hint, open_regular, read_json
from model.formats import StoredTensor

# Mapped pages count as resident memory until a file is closed, so files are closed after this many.
_REOPEN_BYTES = 512 << 20


class CheckpointFiles:
    """Which tensor is in which file; reads whole tensors or parts of them.

    Raises CheckpointError for missing, damaged or truncated files. Files stay open until the
    stack is closed.
    """

    config_name = "config.json"

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        self.folder, self._stack = folder, stack
        self._open: dict[str, Any] = {}
        self._mapped_bytes = 0
        index = folder / "model.safetensors.index.json"
        if os.path.lexists(folder / "model.safetensors"):
            names = dict.fromkeys(self._keys("model.safetensors"), "model.safetensors")
        elif os.path.lexists(index):
            names = self._read_index(index)
        else:
            raise CheckpointError(
                f"{folder}: contains neither model.safetensors nor model.safetensors.index.json"
                f"{conversion_hint(folder)}"
            )
        self.file_of = names
        self._order = {name: i for i, name in enumerate(sorted(names, key=lambda n: (names[n], n)))}

    def path(self, name: str) -> Path:
        """The file that contains a tensor."""
        return self.folder / self.file_of[name]

    def order(self, name: str) -> int:
        """The position of a tensor when all files are read in order."""
        return self._order[name]

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a tensor, from the file's header."""
        file = self.file_of[name]
        with self._as_checkpoint_errors(file):
            view = self._handle(file).get_slice(name)
            return tuple(view.get_shape()), view.get_dtype()

    def read(self, stored: StoredTensor) -> torch.Tensor:
        """The tensor, mapped from its file, or a copy of the part of it that this rank needs."""
        file, part = self.file_of[stored.name], stored.part
        # A tensor that is needed as a whole is mapped instead of copied.
        if all(s.indices(n) == (0, n, 1) for s, n in zip(part, stored.shape, strict=False)):
            part = ()
        with self._as_checkpoint_errors(file):
            handle = self._handle(file)
            tensor: torch.Tensor = (
                handle.get_slice(stored.name)[part] if part else handle.get_tensor(stored.name)
            )
        self._mapped_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def close_if_large(self) -> None:
        """Close all files once much of them is mapped; they are reopened when needed."""
        if self._mapped_bytes > _REOPEN_BYTES:
            self._stack.close()
            self._open.clear()
            self._mapped_bytes = 0

    def _read_index(self, index: Path) -> dict[str, str]:
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
            raise CheckpointError(f"{index}: 'weight_map' must map tensor names to file names")
        for name in sorted(set(names.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index}: {name!r} is not a file of this directory")
            if not os.path.lexists(self.folder / name):
                raise CheckpointError(f"{self.folder / name}: missing, but the index lists it")
        stored = {tensor: file for file in set(names.values()) for tensor in self._keys(file)}
        for tensor, file in names.items():
            if stored.get(tensor) != file:
                raise CheckpointError(f"{self.folder / file}: tensor {tensor!r} is missing")
        # A shard may contain a tensor that the index omits: it is reported as unexpected.
        return stored

    def _keys(self, file: str) -> list[str]:
        return list(self._handle(file).keys())

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            open_regular(self.folder / file).close()  # the library would open anything
            with self._as_checkpoint_errors(file):
                self._open[file] = self._stack.enter_context(
                    safe_open(self.folder / file, framework="pt")
                )
        return self._open[file]

    @contextlib.contextmanager
    def _as_checkpoint_errors(self, file: str) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder / file}: damaged or truncated ({error}); download it again"
            ) from None
