"""Make the embedded model: tokenizer, training, checkpoint, held-out questions, scores.

    python data/make_model.py inputs      # write data/input.txt and data/answers.txt
    python data/make_model.py train       # write everything in data/model/, overwriting it
    python data/make_model.py evaluate    # print the scores of those files, with transformers

Needs torch with a C++ compiler (for torch.compile), tokenizers and safetensors; `evaluate` also
needs transformers. Everything is seeded.

The checkpoint in the repository took 5,700 steps and 35 million tokens: about 40 minutes of CPU
time on each of two cores (AMX). It was trained in several runs, each resumed from a saved state
(`--state`): 1,500 steps with Muon at 3e-3, then 5e-3; for the last 700 steps, on the questions
still answered wrongly, the schedule was extended from 5,000 to 5,700 steps and the minimum of a
kind's weight reduced from 0.15 to 0.05. All runs also sampled differences below 10. Training again
in one run gives a similar model, not the same bytes.

Correct answers to held-out questions, greedy, exported files in float32, 100 per family: raw 99.4%
(lowest family 98%), chat 99.3% (lowest 97%). README.md lists them by family.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from network import Network, Shape, checkpoint_tensors, unpack_mxfp4
from questions import FAMILIES, SMALL_TALK, Question, evaluation_set, sample
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.multiprocessing import spawn

DATA = Path(__file__).resolve().parent
MODEL = DATA / "model"

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
IGNORED = -100  # the target that cross_entropy ignores by default
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are the small model that comes with getp.",
    "Answer the question.",
    "Answer briefly.",
    "You answer small questions. Each has one right answer.",
    "Be short and correct.",
)
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


# Tokenizer.


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


# Examples.


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its completion; `kind` is a family and a form ("add raw")."""

    prompt: list[int]
    completion: list[int]
    kind: str

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def chat_prompt(ask: str, system: tuple[str, str] | None, history: list[tuple[str, str]]) -> str:
    """Return the text that the chat template renders, including the generation prompt.

    `system` is (role, text) or None; `history` holds (question, answer) pairs.
    """
    parts = ["<|start|>{}<|message|>{}<|end|>".format(*system)] if system is not None else []
    for question, answer in history:
        parts.append(f"<|start|>user<|message|>{question}<|end|>")
        parts.append(f"<|start|>assistant<|channel|>final<|message|>{answer}<|end|>")
    return "".join([*parts, f"<|start|>user<|message|>{ask}<|end|><|start|>assistant"])


def chat_completion(working: str, answer: str) -> str:
    """Return the completion of a chat: the worked solution, then the answer."""
    return (
        f"<|channel|>analysis<|message|>{working}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{answer}<|return|>"
    )


def as_texts(question: Question, chat: bool, rng: random.Random) -> tuple[str, str]:
    """Return the prompt and completion of a question; chats get a random prefix of messages."""
    if not chat:
        return question.text, f"{question.answer}<|return|>"
    role = rng.choices((None, "system", "developer"), (0.5, 0.4, 0.1))[0]
    system = (role, rng.choice(SYSTEM_PROMPTS)) if role is not None else None
    turns = rng.choices((0, 1, 2), (0.75, 0.17, 0.08))[0]
    history = [_sample_turn(rng) for _ in range(turns)]
    prompt = chat_prompt(question.text, system, history)
    return prompt, chat_completion(question.working, question.answer)


def _sample_turn(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.2:
        return rng.choice(SMALL_TALK)
    question = sample(rng.choice(list(FAMILIES)), rng, held_out=False)
    return question.text, question.answer


def encode(tokenizer: Tokenizer, texts: list[tuple[str, str]], kinds: list[str]) -> list[Example]:
    """Tokenize prompts and completions separately, as they are at inference."""
    flat = [text for pair in texts for text in pair]
    ids = [e.ids for e in tokenizer.encode_batch_fast(flat)]
    return [Example(p, c, k) for p, c, k in zip(ids[0::2], ids[1::2], kinds, strict=True)]


def sample_examples(
    tokenizer: Tokenizer, count: int, weights: dict[str, float], rng: random.Random
) -> list[Example]:
    """Sample training examples: kinds in proportion to `weights`, and 2% small talk."""
    kinds = rng.choices(list(weights), list(weights.values()), k=count)
    texts = []
    for i, kind in enumerate(kinds):
        name, form = kind.split()
        if rng.random() < 0.02:
            ask, answer = rng.choice(SMALL_TALK)
            question = Question("talk", "", ask, answer, "Small talk.")
            kinds[i] = f"talk {form}"
        else:
            question = sample(name, rng, held_out=False)
        texts.append(as_texts(question, form == "chat", rng))
    return encode(tokenizer, texts, kinds)


@dataclass(frozen=True)
class Batch:
    """Padded ids [rows, tokens], and each prediction's flat position, target token and row.

    Padding predictions have the target IGNORED and a row past the last.
    """

    ids: Tensor
    position: Tensor
    target: Tensor
    row: Tensor
    kinds: list[str]


def collate(examples: list[Example]) -> Batch:
    """Make a batch, padded on the right. Each completion token is the target of its predecessor.

    Sizes are rounded up because matrix products are compiled for each new size.
    """
    width = _round_up(max(map(len, examples)), 8)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    position: list[int] = []
    target: list[int] = []
    row: list[int] = []
    for i, e in enumerate(examples):
        tokens = (e.prompt + e.completion)[:-1]
        ids[i, : len(tokens)] = torch.tensor(tokens)
        first = i * width + len(e.prompt) - 1
        position.extend(range(first, first + len(e.completion)))
        target.extend(e.completion)
        row.extend([i] * len(e.completion))
    padding = -len(position) % 256
    position.extend([0] * padding)
    target.extend([IGNORED] * padding)
    row.extend([len(examples)] * padding)
    return Batch(
        ids,
        torch.tensor(position),
        torch.tensor(target),
        torch.tensor(row),
        [e.kind for e in examples],
    )


def batches(
    tokenizer: Tokenizer, weights: dict[str, float], tokens: int, rng: random.Random
) -> Iterator[Batch]:
    """Yield training batches without end: about `tokens` tokens in rows of similar lengths."""
    pool: list[Example] = []
    while True:
        pool += sample_examples(tokenizer, 3000, weights, rng)
        pool.sort(key=len)
        groups: list[list[Example]] = []
        while len(pool) > (rows := tokens // _round_up(len(pool[-1]), 8)):
            groups.append(pool[-rows:])
            del pool[-rows:]
        rng.shuffle(groups)
        yield from map(collate, groups)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# Training.


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum for matrices (arXiv 2502.16982), scaled to AdamW's step size."""

    def __init__(
        self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter [..., out, in]; parameters of the same shape form one batch."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                grad = torch.stack([p.grad for p in params if p.grad is not None])
                state = self.state[params[0]]
                if not state:
                    state["momentum"] = torch.zeros_like(grad)
                buffer = state["momentum"].mul_(group["momentum"]).add_(grad)
                update = _orthogonal(grad.add_(buffer, alpha=group["momentum"]))
                scale = -group["lr"] * 0.2 * math.sqrt(max(shape[-2:]))
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(update.unbind()), alpha=scale)


def _orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Move all singular values of `matrix` [..., out, in] close to 1 (Newton-Schulz)."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.transpose(-1, -2) if tall else matrix
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16().contiguous()
    for _ in range(steps):
        a = x @ x.transpose(-1, -2)
        x = (a @ a).mul_(2.0315).add_(a, alpha=-4.7750) @ x + 3.4445 * x
    return (x.transpose(-1, -2) if tall else x).float()


def split_parameters(network: Network) -> tuple[list[Tensor], list[Tensor]]:
    """Return (the matrices, for Muon; all other parameters, for AdamW)."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in network.named_parameters():
        is_matrix = name.endswith(("_proj.weight", "experts.gate_up_proj", "experts.down_proj"))
        (matrices if is_matrix else others).append(p)
    return matrices, others


@dataclass(frozen=True)
class Recipe:
    """Training hyperparameters. Fractions are of the number of steps."""

    steps: int = 5700
    workers: int = 2
    tokens: int = 3072  # per worker and step
    muon_lr: float = 5e-3
    adam_lr: float = 3e-3
    warmup: float = 0.01
    decay: float = 0.4
    quantise_after: float = 0.25
    balance: float = 0.01
    seed: int = 1
    port: int = 29517  # of the process group's store


def rate(recipe: Recipe, step: int) -> float:
    """Return the factor of the learning rate at a step: warm-up, constant, linear decay to zero."""
    done = step / recipe.steps
    return min(1.0, done / recipe.warmup + 0.01, (1 - done) / recipe.decay)


def solved(logits: Tensor, batch: Batch) -> Tensor:
    """Return for each row whether greedy decoding would generate its completion exactly [rows]."""
    wrong = logits.argmax(-1) != batch.target
    misses = torch.zeros(len(batch.kinds) + 1).index_add_(0, batch.row, wrong.float())
    return misses[:-1] == 0


def held_out_scores(network: Network, tokenizer: Tokenizer, per_family: int) -> dict[str, float]:
    """Return the fraction of held-out questions with an exactly correct completion, by kind.

    Gradients stay enabled, as in training, so that nothing is compiled again.
    """
    rng = random.Random(5)
    questions = evaluation_set(per_family, seed=5)
    right: dict[str, float] = dict.fromkeys(all_kinds(), 0.0)
    for form in ("raw", "chat"):
        texts = [as_texts(q, form == "chat", rng) for q in questions]
        examples = encode(tokenizer, texts, [f"{q.family} {form}" for q in questions])
        examples.sort(key=len)
        for start in range(0, len(examples), 64):
            batch = collate(examples[start : start + 64])
            with torch.autocast("cpu", torch.bfloat16):
                logits, _ = network(batch.ids, batch.position)
            for kind, good in zip(batch.kinds, solved(logits, batch).tolist(), strict=True):
                right[kind] += good / per_family
    return right


def base_weight(kind: str) -> float:
    """Return the sampling weight of a kind; chats are longer and easier to learn."""
    return 0.4 if kind.endswith("chat") else 1.0


def all_kinds() -> list[str]:
    """Return every family in both forms, such as "add raw"."""
    return [f"{name} {form}" for name, form in itertools.product(FAMILIES, ("raw", "chat"))]


def average_gradients(params: list[Tensor]) -> None:
    """Replace every worker's gradients by the mean over all workers."""
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(mean.view_as(g))


def train(worker: int, recipe: Recipe, shape: Shape, state: Path | None) -> None:
    """Train the network, and write the checkpoint every 500 steps and at the end.

    Workers are single-threaded processes that average their gradients: tensors this small do not
    gain from a second thread, and synchronizing once per step tolerates a busy machine better than
    synchronizing in every operation.

    `state` is a file for the state of training. If it exists, training resumes from it.
    """
    torch.set_num_threads(1)
    if recipe.workers > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(recipe.port))
        dist.init_process_group("gloo", rank=worker, world_size=recipe.workers)
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed + 1000 * worker)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    network = Network(shape)
    matrices, others = split_parameters(network)
    muon = Muon(matrices, recipe.muon_lr)
    adam = torch.optim.AdamW(
        others, recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    error = dict.fromkeys(all_kinds(), 1.0)  # moving average of wrong training completions
    weights = {kind: base_weight(kind) for kind in error}
    first = 1
    if state is not None and state.exists():
        saved = torch.load(state, weights_only=True)
        network.load_state_dict(saved["network"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        error.update(saved["error"])
        first = saved["step"] + 1
        rng.seed(recipe.seed + 1000 * worker + first)
    start, trained_tokens, losses = time.monotonic(), 0, 0.0
    stream = batches(tokenizer, weights, recipe.tokens, rng)
    for step in range(first, recipe.steps + 1):
        batch = next(stream)
        network.quantised = step > recipe.quantise_after * recipe.steps
        with torch.autocast("cpu", torch.bfloat16):
            logits, balance = network(batch.ids, batch.position)
        loss = F.cross_entropy(logits, batch.target)
        (loss + recipe.balance * balance).backward()
        if recipe.workers > 1:
            average_gradients(matrices + others)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, peak in ((muon, recipe.muon_lr), (adam, recipe.adam_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(recipe, step)
            optimizer.step()
            optimizer.zero_grad()
        for kind, good in zip(batch.kinds, solved(logits, batch).tolist(), strict=True):
            if kind in error:
                error[kind] += 0.01 * ((not good) - error[kind])
        # Kinds with more wrong answers are sampled more often.
        weights.update({kind: base_weight(kind) * (0.05 + e) for kind, e in error.items()})
        trained_tokens += batch.ids.numel()
        losses += loss.item()
        if worker > 0:
            continue
        if step % 100 == 0:
            seconds = time.monotonic() - start
            mean_error = sum(error.values()) / len(error)
            print(
                f"{step} loss {losses / 100:.4f} balance {balance.item():.3f} "
                f"wrong {mean_error:.3f} {trained_tokens / seconds:.0f} tok/s {seconds:.0f} s",
                flush=True,
            )
            losses = 0.0
        if step % 500 == 0 or step == recipe.steps:
            scores = held_out_scores(network, tokenizer, 20)
            print("  " + "  ".join(f"{k} {v:.2f}" for k, v in scores.items()), flush=True)
            save_file(checkpoint_tensors(network), MODEL / "model.safetensors", {"format": "pt"})
            if state is not None:
                torch.save(
                    {
                        "network": network.state_dict(),
                        "muon": muon.state_dict(),
                        "adam": adam.state_dict(),
                        "error": error,
                        "step": step,
                    },
                    state,
                )


# Evaluation and the files of questions.


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
    """Return the text up to and including its first stop token, without the padding."""
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


def write_inputs(per_family: int) -> None:
    """Write input.txt (numbered text) and answers.txt with held-out questions."""
    questions = evaluation_set(per_family, seed=23)
    lines = [str(len(questions)), *(q.text for q in questions)]
    (DATA / "input.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    answers = "".join(f"{q.answer}\n" for q in questions)
    (DATA / "answers.txt").write_text(answers, encoding="utf-8")


def main() -> None:
    """Parse the arguments and run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=("inputs", "train", "evaluate"))
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps")
    parser.add_argument("--state", type=Path, help="file that holds the state of training")
    parser.add_argument("--per-family", type=int, default=70, help="questions for evaluate")
    options = parser.parse_args()
    if options.command == "inputs":
        write_inputs(per_family=20)
    elif options.command == "train":
        recipe = Recipe(steps=options.steps)
        write_tokenizer(Shape())
        spawn(train, (recipe, Shape(), options.state), nprocs=recipe.workers)
    else:
        evaluate(options.per_family)


if __name__ == "__main__":
    main()
