"""Kernels of the larger operations. The modules of `model.ops.triton` launch them.

Only the embedding's launch is here as well: its kernel has one variant.
"""
