"""Tensor and expert parallelism: the processes that compute one model together."""
