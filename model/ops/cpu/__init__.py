"""The operations on a CPU: `backend.CpuBackend`, over native kernels and torch's oneDNN."""
