"""Names the command and its options in messages; errors name settings."""

import os
import shutil
import sys
from pathlib import Path

_OPTIONS = {
    # engine.EngineConfig
    "device": "--device",
    "dtype": "--dtype",
    "kv_dtype": "--kv-dtype",
    "max_batch_size": "--max-batch-size",
    "max_batch_tokens": "--max-batch-tokens",
    "kv_memory": "--kv-memory",
    "block_size": "--block-size",
    "prefix_cache": "--no-prefix-cache",
    "speculation": "--no-speculation",
    "dummy_weights": "--dummy-weights",
    "trust_kernels": "--trust-kernels",
    "tensor_parallel": "--tensor-parallel",
    # engine.SamplingParams
    "temperature": "-t/--temperature",
    "top_k": "--top-k",
    "top_p": "-p/--top-p",
    "seed": "-s/--seed",
    "max_new_tokens": "--max-new-tokens",
    "min_new_tokens": "--min-tokens",
    "min_p": "--min-p",
    "repetition_penalty": "--repetition-penalty",
    "presence_penalty": "--presence-penalty",
    "frequency_penalty": "--frequency-penalty",
    "bad_words": "--bad-words",
    "stop_ids": "--stop-token-id",
    "max_positions": "-n/--max-length",
    "ignore_eos": "--ignore-eos",
    # getp
    "checkpoint": "CHECKPOINT",
    "tokenizer": "-z/--tokenizer",
    "chat_template": "--chat-template",
    "raw": "--raw",
    "system": "-y/--system",
    "chat_template_kwargs": "--chat-template-kwargs",
    "thinking_budget": "--thinking-budget",
    "truncate": "--truncate",
    "stop": "--stop",
    "input": "-i/--input",
    "output": "-o/--output",
    "output_format": "--output-format",
    "column": "--column",
    "id_column": "--id-column",
    "parameter_column": "--parameter-column",
    "first": "--first",
    "shard": "--shard",
    "reference": "--reference",
    "require_agreement": "--require-agreement",
    "details": "--details",
    "json": "--json",
    "restart": "--restart",
    "accept_different_rounding": "--accept-different-rounding",
    "max_errors": "--max-errors",
    "flush_interval": "--flush-interval",
    "line": "--line",
    "replicas": "--replicas",
    "ray_address": "--ray-address",
    "phase": "--phase",
    "batch": "--batch",
    "query": "--query",
    "context": "--context",
    "gpu": "--gpu",
    "measure": "--measure",
    "price": "--price",
    "plot": "--plot",
    "trace": "--trace",
    "format": "--format",
    "host": "--host",
    "port": "--port",
    "api_key": "--api-key",
    "insecure": "--insecure",
    "data": "--data",
    "max_queue": "--max-queue",
}


def option_name(setting: str) -> str:
    """Return the option that sets `setting`; the setting itself if there is none."""
    return _OPTIONS.get(setting, setting)


def program() -> list[str]:
    """Return the words that start this program again in the same shell."""
    script = sys.argv[0]
    if Path(script).name != "run.py":
        return ["getp"]
    if shutil.which("python") == sys.executable:
        return ["python", script]
    python = os.path.relpath(sys.executable)
    return [sys.executable if python.startswith(os.pardir) else python, script]
