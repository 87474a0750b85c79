"""The sections of gpu.py: checks, loads, single kernels, sweeps, switches and other engines."""
