"""GGUF files as checkpoints: their metadata is the config, their tensors the weights.

A model file of llama.cpp contains everything that a Hugging Face directory does: the architecture,
the tensors, the tokenizer and the chat template. `header` reads what is in a file and checks it,
`config` translates the metadata into the keys of a config.json, so that the families read it, and
`files` reads the weights. Specification:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from model.gguf.header import Gguf, GgufTensor, is_gguf, read_gguf

__all__ = ["Gguf", "GgufTensor", "is_gguf", "read_gguf"]
