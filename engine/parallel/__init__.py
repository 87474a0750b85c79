"""Tensor and expert parallelism: processes (ranks) that compute one model together."""
