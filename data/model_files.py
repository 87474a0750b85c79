"""The checkpoint's files except the weights: tokenizer, chat template and configs."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

from examples import SYSTEM_PROMPTS
from network import Shape
from questions import FAMILIES, SMALL_TALK, sample
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

MODEL = Path(__file__).resolve().parent / "model"

SPECIAL = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|call|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
)
STOPS = ("<|return|>", "<|endoftext|>", "<|call|>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>
{%- else -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}
"""


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer in which digits and capitals stay single tokens.

    Words are merged, together with the space before them; a single capital or digit never is.
    Every byte has a token, so any text can be encoded.
    """
    rng = random.Random(0)
    texts = list(SYSTEM_PROMPTS) * 20
    texts += [f"{ask} {answer}" for ask, answer in SMALL_TALK] * 5
    texts += ["system", "user", "assistant", "developer", "analysis", "final"] * 200
    for name in FAMILIES:
        for _ in range(300):
            question = sample(name, rng, held_out=False)
            texts += [question.text, question.answer, question.working]
    tokenizer = Tokenizer(models.BPE())
    pattern = r" ?[A-Z]?[a-z]+|[A-Z]|[0-9]| |[^A-Za-z0-9 ]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(shape: Shape) -> Tokenizer:
    """Write every file of the checkpoint except the weights."""
    MODEL.mkdir(exist_ok=True)
    tokenizer = train_tokenizer(shape.vocab_size)
    if tokenizer.get_vocab_size() != shape.vocab_size:
        raise ValueError(
            f"the vocabulary has {tokenizer.get_vocab_size()} tokens instead of {shape.vocab_size}"
        )
    tokenizer.save(str(MODEL / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    stops = [ids[name] for name in STOPS]
    _write_json(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|return|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": shape.max_position_embeddings,
        },
    )
    (MODEL / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    common = {"bos_token_id": ids["<|startoftext|>"], "pad_token_id": ids["<|endoftext|>"]}
    _write_json("generation_config.json", {**common, "do_sample": False, "eos_token_id": stops})
    sizes = asdict(shape)
    rope = {
        "rope_type": "yarn",
        "factor": shape.rope_factor,
        "beta_fast": sizes.pop("beta_fast"),
        "beta_slow": sizes.pop("beta_slow"),
        "truncate": False,
        "original_max_position_embeddings": sizes.pop("original_max_position_embeddings"),
    }
    _write_json(
        "config.json",
        {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            **sizes,
            "layer_types": shape.layer_types,
            "rope_scaling": rope,
            "attention_bias": True,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initial_context_length": shape.original_max_position_embeddings,
            "initializer_range": 0.02,
            "router_aux_loss_coef": 0.01,
            "output_router_logits": False,
            "tie_word_embeddings": False,
            "use_cache": True,
            "torch_dtype": "bfloat16",
            **common,
            "eos_token_id": ids["<|return|>"],
            "quantization_config": {
                "quant_method": "mxfp4",
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
            },
        },
    )
    return tokenizer


def _write_json(name: str, content: dict[str, object]) -> None:
    (MODEL / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
