"""The operations as Triton kernels, one source for NVIDIA and AMD: `backend.TritonBackend`."""
