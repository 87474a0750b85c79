"""Writes LoRA adapters in PEFT's format, and merges them as their definition says."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from model import load_config

Tensors = dict[str, torch.Tensor]
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "bias": "none",
    "lora_dropout": 0.1, "target_modules": ["q_proj"], "fan_in_fan_out": False,
    "inference_mode": True, "use_dora": False, "use_rslora": False, "modules_to_save": None,
    "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {}, "peft_version": "0.21.2",
    "base_model_name_or_path": "somewhere", "loftq_config": {}, "megatron_core": "megatron.core",
    "layer_replication": None, "trainable_token_indices": None, "qalora_group_size": 16,
}  # fmt: skip


def write_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None
) -> Path:
    """Write an adapter; `tensors` by names without "base_model.model."."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    named = {f"base_model.model.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def random_lora(
    checkpoint: Path, module: str, rank: int = 4, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random A and B of a linear layer."""
    outputs, inputs = load_file(checkpoint / "model.safetensors")[f"{module}.weight"].shape
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, inputs, generator=generator) * 0.2,
        f"{module}.lora_B.weight": torch.randn(outputs, rank, generator=generator) * 0.2,
    }


def write_changed(folder: Path, checkpoint: Path, changes: dict[str, torch.Tensor]) -> Path:
    """Write a copy of a checkpoint with tensors added to some of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in checkpoint.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    for name, change in changes.items():
        tensors[name] = (tensors[name].double() + change.double()).float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def expert_lora(
    checkpoint: Path, layer: int, seed: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A and B of all experts of a layer as PEFT names them, and their products [experts, out, in].

    Compared with PEFT 0.21.2.
    """
    config, generator = load_config(checkpoint), torch.Generator().manual_seed(seed)
    assert config.moe is not None
    count, size, hidden = config.moe.num_experts, config.moe.intermediate_size, config.hidden_size
    module, tensors, products = f"model.layers.{layer}.mlp.experts", {}, {}
    sizes = {"gate_up_proj": (2 * size, hidden, ".base_layer"), "down_proj": (hidden, size, "")}
    for name, (outputs, inputs, nested) in sizes.items():
        a = torch.randn(count * 4, inputs, generator=generator) * 0.2
        b = torch.randn(outputs, 4 * count, generator=generator) * 0.2
        tensors[f"{module}{nested}.lora_A.weight"] = a
        tensors[f"{module}{nested}.lora_B.weight"] = b
        products[name] = torch.einsum(
            "ore,eri->eoi", b.view(outputs, 4, count), a.view(count, 4, inputs)
        )
    return tensors, products
