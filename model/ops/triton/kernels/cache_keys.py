"""The keys of compiled kernels in Triton's cache on disk."""

import sys

from triton.runtime.jit import JITCallable


def fix_cache_keys() -> None:
    """Compute the keys of all kernels in one order, the same in every process.

    Triton 3.6 and 3.7 take constants of the functions that a kernel calls into its key only if the
    keys of these functions were computed before (`DependenciesFinder._update_hash`). So the key
    depends on which kernel is launched first, and compiled kernels would not be found again.
    """
    package = __name__.partition(".kernels")[0]
    for name, module in sorted(sys.modules.items()):
        if name.startswith(package):
            for each in list(vars(module).values()):
                if isinstance(each, JITCallable):
                    _ = each.cache_key
