"""The options of mode serve."""

from cloup import OptionGroup

from getp.cli.click_types import Decorator, Integer, in_group
from getp.cli.modes import Subject

_serve = in_group(OptionGroup("Server"), Subject.SERVE)

SERVE_OPTIONS: tuple[Decorator, ...] = (
    _serve(
        "--host",
        default="127.0.0.1",
        show_default=True,
        metavar="ADDRESS",
        help="Address to listen on. One that other machines can reach needs --api-key.",
    ),
    _serve(
        "--port",
        type=Integer(0, 65535),
        default=8000,
        show_default=True,
        help="Port to listen on (0: a free one, which is printed).",
    ),
    _serve(
        "--api-key",
        envvar="GETP_API_KEY",
        metavar="KEY",
        help="Key that clients must send. The variable GETP_API_KEY keeps it out of the list of "
        "processes.  [default: none]",
    ),
    _serve(
        "--insecure",
        is_flag=True,
        help="Let other machines use the server without a key.",
    ),
    _serve(
        "--data",
        metavar="FOLDER",
        help="Folder for files and batches; unfinished batches in it are resumed. Without it there "
        "are no batches.",
    ),
    _serve(
        "--model-name",
        metavar="NAME",
        help="Name of the model for clients.  [default: the checkpoint's]",
    ),
    _serve(
        "--max-queue",
        type=Integer(min=0),
        default=1024,
        show_default=True,
        metavar="N",
        help="Online requests that may wait; further ones are refused with status 429.",
    ),
)
"""Options of mode serve, in the order of the help."""
