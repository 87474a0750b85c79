"""Decides which sequences run in the next step and which KV blocks they use.

Owns the queue, the running sequences and the block pool, all of them integers: never touches a
tensor or a device. The main class is `Scheduler`.
"""
