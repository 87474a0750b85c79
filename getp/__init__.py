"""What a user asks for: the command line, files of prompts, chat, results and reports.

Owns text, files and the terminal; never touches tensors. `getp.cli.main` is the command and
`getp.job.run` the main job.
"""

import model  # noqa: F401  before torch: it says how threads wait, and what is no warning

__version__ = "0.1.0"

EMBEDDED = "the embedded model"
"""What reports call the model that comes with getp."""
