"""Benchmarks: getp against other engines and hardware limits. Each module describes one.

Uses the packages as their users do; nothing else imports a benchmark.
"""

import model  # noqa: F401  before torch: sets how OpenMP threads wait
