"""Training of the embedded model: optimizer, learning rate, the loop, checkpoints."""

from __future__ import annotations

import itertools
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from examples import Batch, as_texts, batches, collate, encode
from model_files import MODEL
from network import Network, Shape, checkpoint_tensors
from questions import FAMILIES, evaluation_set
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor


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
    quantize_after: float = 0.25
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
        network.quantized = step > recipe.quantize_after * recipe.steps
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
