"""Timings compared with other engines and with hardware limits; see each file."""

import model  # noqa: F401  before torch: it says how threads wait
