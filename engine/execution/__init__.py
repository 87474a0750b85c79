"""Runs a scheduled step on its device: builds the batch, runs or replays the model, samples.

Owns the model, the KV tensors, the captured steps and the sampler's state. Never decides
what runs next (`engine.scheduling`). The main class is `ModelRunner`.
"""
