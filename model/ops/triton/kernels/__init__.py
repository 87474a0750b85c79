"""Kernels of the larger operations; the modules of the same names above launch them."""
