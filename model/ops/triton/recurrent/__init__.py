"""Kernels of recurrent layers; the backend's part is `TritonRecurrentOps` in `operations.py`."""
