"""The `getp` command. It handles Ctrl-C before it imports anything that takes long."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType


def main() -> None:
    """Run the command and exit with its status."""
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handled:  # if not, it is ignored, as in the background of a script
        signal.signal(signal.SIGINT, _on_ctrl_c)
    try:
        from getp.cli.main import main as command

        command()
    except KeyboardInterrupt:
        _end()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
        if handled:  # Python would print a traceback while it shuts down
            signal.signal(signal.SIGINT, lambda number, frame: os._exit(status))
        raise


def _on_ctrl_c(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; end at once during an import, which may turn it into any error.

    With Ray there are processes to stop, so that it is always raised.
    """
    while frame is not None and "ray" not in sys.modules:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end()
        frame = frame.f_back
    raise KeyboardInterrupt


def _end() -> None:
    with suppress(OSError):
        os.write(2, b"getp: error: interrupted\n")
    os._exit(130)
