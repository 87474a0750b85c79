"""Timings against peers and against limits; see each file."""

import model  # noqa: F401  before torch: it says how threads wait
