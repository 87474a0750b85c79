"""Scores of the exported checkpoint on held-out questions, computed with transformers."""

from __future__ import annotations

import random
from typing import Any

import torch
from examples import as_texts
from model_files import MODEL, STOPS
from mxfp4 import unpack_mxfp4
from questions import FAMILIES, evaluation_set
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from training import all_kinds


def chat_answer(text: str) -> str:
    """Return the text of a chat completion's final channel, or "" if it has none."""
    _, found, rest = text.rpartition("<|channel|>final<|message|>")
    return rest.removesuffix("<|return|>").strip() if found else ""


def raw_answer(text: str) -> str:
    """Return the text of a raw completion without its stop token."""
    return text.removesuffix("<|return|>").removesuffix("<|endoftext|>").strip()


def load_with_transformers() -> Any:
    """Load the exported files into transformers' gpt-oss network, dequantized, in float32."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig.from_pretrained(MODEL)
    del config.quantization_config
    model = GptOssForCausalLM(config)
    weights: dict[str, Tensor] = {}
    stored = load_file(MODEL / "model.safetensors")
    for name, tensor in stored.items():
        if name.endswith("_blocks"):
            name = name.removesuffix("_blocks")
            tensor = unpack_mxfp4(tensor, stored[f"{name}_scales"]).transpose(-1, -2)
        if not name.endswith("_scales"):
            weights[name] = tensor.float()
    model.load_state_dict(weights)
    return model.eval()


def generate(prompts: list[str], new_tokens: int, rows: int = 128) -> list[str]:
    """Return greedy completions of the exported model, including special tokens."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    model = load_with_transformers()
    encoded = [e.ids for e in tokenizer.encode_batch(prompts)]
    stops = [tokenizer.token_to_id(name) for name in STOPS]
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        width = max(len(encoded[i]) for i in chosen)
        ids = torch.tensor([[0] * (width - len(encoded[i])) + encoded[i] for i in chosen])
        mask = torch.tensor(
            [[0] * (width - n) + [1] * n for n in (len(encoded[i]) for i in chosen)]
        )
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=stops[1],
            )
        for i, row in zip(chosen, out[:, width:].tolist(), strict=True):
            texts[i] = _until_stop(tokenizer.decode(row, skip_special_tokens=False))
    return texts


def _until_stop(text: str) -> str:
    """Return the text up to and including its first stop token."""
    ends = [text.index(stop) + len(stop) for stop in STOPS if stop in text]
    return text[: min(ends)] if ends else text


def evaluate(per_family: int) -> None:
    """Print the exported model's scores on held-out questions, by family and form."""
    questions = evaluation_set(per_family, seed=31)
    rng = random.Random(11)
    right: dict[str, float] = dict.fromkeys(all_kinds(), 0.0)
    for form, answer_of, new_tokens in (("raw", raw_answer, 24), ("chat", chat_answer, 96)):
        prompts = [as_texts(q, form == "chat", rng)[0] for q in questions]
        for question, text in zip(questions, generate(prompts, new_tokens), strict=True):
            good = answer_of(text) == question.answer
            right[f"{question.family} {form}"] += good / per_family
            if not good:
                print(f"wrong {form}: {question.text} {question.answer!r} {text!r}")
    print("| family | raw | chat |\n|---|---|---|")
    for name in FAMILIES:
        print(f"| {name} | {right[f'{name} raw']:.1%} | {right[f'{name} chat']:.1%} |")
    means = [
        sum(right[f"{name} {form}"] for name in FAMILIES) / len(FAMILIES)
        for form in ("raw", "chat")
    ]
    print(f"| all | {means[0]:.2%} | {means[1]:.2%} |")
