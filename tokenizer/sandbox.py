"""The sandbox that chat templates run in: a process with limits on its memory and its time.

A template is a program by an unknown author. When it exceeds a limit, the process is killed, and
the next rendering starts another one; only the conversation that was being rendered fails.
"""

import atexit
import errno
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizer.errors import TemplateError

_MAX_SECONDS = 10.0  # of one rendering; real templates take milliseconds
_MAX_MEMORY = 512 << 20  # bytes of address space beyond those of the idle process
_MAX_TEXT = 16 << 20  # characters of the rendered text
_START_SECONDS = 60.0  # Python's files may be on a slow network disk
_WORKER = Path(__file__).with_name("sandbox_worker.py")


class Sandbox:
    """The process, which starts at the first use and serves all threads, one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self._stop)

    def variables(self, source: str) -> frozenset[str]:
        """Return the names of the variables that a template uses. Raises TemplateError."""
        return frozenset(self._call(source=source).split())

    def render(self, source: str, names: Mapping[str, Any], now: datetime | None = None) -> str:
        """Return the text that a template renders from the variables `names`.

        `now` is the template's time; None means the current time. Raises TemplateError.
        """
        return self._call(source=source, names=names, now=now and now.isoformat())

    def close(self) -> None:
        """End the process, unless another thread uses it. The next call starts another one."""
        if self._lock.acquire(blocking=False):
            try:
                self._stop()
            finally:
                self._lock.release()

    def _call(self, **request: Any) -> str:
        try:
            data = json.dumps(request, ensure_ascii=False, default=_as_json)
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"this cannot be given to a chat template: {error}") from error
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                reply = self._exchange(data.encode("utf-8", "surrogatepass"))
            except BaseException:  # also Ctrl-C: the reply would be taken for the next request's
                self._stop()
                raise
        text = reply[1:].decode("utf-8", "surrogatepass")
        if reply.startswith(b"-"):
            raise TemplateError(text)
        return text

    def _exchange(self, request: bytes) -> bytes:
        self._socket.settimeout(_MAX_SECONDS)
        try:
            self._socket.sendall(len(request).to_bytes(8, "little") + request)
            length = int.from_bytes(self._receive(8), "little")
            if length <= 4 * _MAX_TEXT + 1:  # UTF-8 has at most four bytes per character
                return self._receive(length)
            problem = "its process does not keep to the protocol"
        except TimeoutError:
            problem = f"it takes more than {_MAX_SECONDS:g} seconds"
        except OSError:  # the process has ended
            status = self._stop()
            problem = f"its process ended with status {status}"
            if status == errno.ENOMEM:
                problem = f"it needs more than {_MAX_MEMORY >> 20} MiB of memory"
        raise TemplateError(f"the chat template failed: {problem}")

    def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self._socket.recv(min(count - len(data), 1 << 20))
            if not piece:
                raise ConnectionError("the process has closed the connection")
            data += piece
        return bytes(data)

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._alive, watched = socket.socketpair()
        path = os.pathsep.join(str(entry) for entry in sys.path if entry)
        try:
            # By its path: the package would load the tokenizers library. `-S` saves a third of the
            # time. In a session of its own, Ctrl-C on the terminal does not reach it.
            limits = str(_MAX_MEMORY), str(_MAX_TEXT)
            with theirs, watched:
                self._process = subprocess.Popen(
                    [sys.executable, "-S", str(_WORKER), *limits, str(watched.fileno())],
                    pass_fds=[watched.fileno()],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
                    start_new_session=True,
                )
            self._socket.settimeout(_START_SECONDS)
            self._receive(1)
        except OSError as error:
            raise TemplateError(
                f"the process for chat templates did not start ({error}): check that "
                f"{sys.executable} can import jinja2"
            ) from error

    def _stop(self) -> int | None:
        """Kill the process if it runs; return its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        self._socket.close()
        self._alive.close()
        return process.wait()

    def _forget(self) -> None:
        """Leave the process to the parent of this process, which has just been forked."""
        self._lock = threading.Lock()
        if self._process is not None:
            self._process.returncode = 0  # nothing to wait for
            self._socket.close()
            self._alive.close()
        self._process = None


def _as_json(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is not JSON")
