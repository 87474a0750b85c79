"""Kernels of the larger operations, which the modules of the same names above launch.

The kernel of the embedding, which has one variant, is here with its launch.
"""
