"""Tensor and expert parallelism: ranks, the processes over which one model is split.

Owns the worker processes, the connections between ranks and the messages that they exchange. Never
splits weights (`model.sharding`) or schedules. The main class is `CoordinatorRunner`.
"""
