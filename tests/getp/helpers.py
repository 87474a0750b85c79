"""Small tokenizers, and an engine without a model, for the tests of getp and tokenizer."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from engine import Completion, EngineConfig, EngineStats, Request, RequestError, RunSummary
from engine.summary import peak_resident_bytes
from getp.files import open_output, token_line
from model.cost.known_models import named_config
from tokenizer import ChatTemplate, Tokenizer

if TYPE_CHECKING:
    from engine import Engine

TEXTS = ["the quick brown fox", "What is 12 + 34?", "naïve café, déjà vu", "línea\nnueva", "你好"]
MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
CHAT_TEMPLATE = """\
{%- for m in messages -%}
<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""


@cache
def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE like GPT-2's: every byte is a token, so a text can split anywhere."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(text, special=True) for text in ("<eos>", "<bos>", *MARKERS)],
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


@cache
def metaspace() -> tokenizers.Tokenizer:
    """A SentencePiece-like BPE like Llama 2's: ▁ for spaces, unknown characters as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [*"abcdefgho", "he", "▁h", "▁a", "▁ab", "▁the"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("h", "e"), ("▁", "h"), ("▁", "a"), ("▁a", "b")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("▁"), " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@cache
def metaspace_by_words() -> tokenizers.Tokenizer:
    """The vocabulary of `metaspace`, with the Metaspace steps that newer files use instead."""
    backend = tokenizers.Tokenizer.from_str(metaspace().to_str())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    return backend


def small_tokenizer(template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """The byte-level tokenizer with harmony's markers and a chat template."""
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return Tokenizer(byte_level(), tokens, ChatTemplate(template, tokens) if template else None)


def write_tokenizer(folder: Path, template: str | None = CHAT_TEMPLATE) -> Path:
    """Write the byte-level tokenizer as the files of a checkpoint directory."""
    folder.mkdir(exist_ok=True)
    byte_level().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": {"__type": "AddedToken", "content": "<eos>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def write_tokens(path: str, rows: Iterable[Sequence[int]]) -> None:
    """Write a token file."""
    with open_output(path) as file:
        for row in rows:
            file.write(token_line(row) + b"\n")


class FakeEngine:
    """Has the interface of Engine; answers with `answer(prompt_ids)`, `batch` requests at once."""

    def __init__(
        self,
        answer: Callable[[Sequence[int]], Iterable[int]] = list,
        max_positions: int = 4096,
        batch: int = 4,
    ) -> None:
        self.config = EngineConfig()
        config = named_config("qwen2-0.5b")
        self.model_config = replace(config, max_positions=max_positions, stop_ids=frozenset())
        self.held_config = self.model_config
        self.max_positions = max_positions
        self.max_batch_size = batch
        self.tensor_parallel = 1
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.kv_dtype = "float32"
        self.rounding: dict[str, object] = {"kernels": "none", "tensor_parallel": 1}
        self.stats = EngineStats(kv_bytes=2**20, kv_blocks=8, peak_kv_blocks=2)
        self.requests: list[Request] = []
        self.warm = False
        self._answer = answer
        self._batch = batch

    def choose_kernels(self, preferred: Any = None, expected_s: Any = None) -> None:
        self.preferred, self.expected_s = preferred, expected_s

    def warm_up(self) -> None:
        self.warm = True

    def finish(self) -> None:
        self.warm = False

    def summary(self) -> RunSummary:
        return RunSummary(
            device="cpu",
            device_type="cpu",
            device_count=1,
            dtype="float32",
            tensor_parallel=self.tensor_parallel,
            max_batch_size=self.max_batch_size,
            config=self.held_config,
            stats=self.stats,
            peak_memory_bytes=peak_resident_bytes(),
        )

    def __enter__(self) -> "FakeEngine":
        self.warm_up()
        return self

    def __exit__(self, *exc: object) -> None:
        self.finish()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        assert self.warm
        waiting = iter(requests)
        while running := list(islice(waiting, self._batch)):
            self.stats.steps += 1
            self.stats.batch_sum += len(running)
            for request in reversed(running):  # completion order is not input order
                yield self._complete(request)

    def _complete(self, request: Request) -> Completion:
        self.requests.append(request)
        prompt, params = request.prompt_ids, request.params
        limit = min(params.max_positions or 10**9, self.model_config.max_positions) - len(prompt)
        if limit < 1:
            return Completion(
                request.request_id, [], "error", RequestError("the prompt is too long")
            )
        ids: list[int] = []
        for token_id in islice(self._answer(prompt), min(limit, params.max_new_tokens or 10**9)):
            ids.append(token_id)
            self.stats.output_tokens += 1
            self.stats.generated_tokens += 1
            ended = request.on_token is not None and request.on_token(token_id)
            if ended or token_id in params.stop_ids:
                return self._completion(request, ids, "stop")
        return self._completion(request, ids, "length")

    def _completion(self, request: Request, ids: list[int], reason: str) -> Completion:
        return Completion(
            request.request_id,
            ids,
            "stop" if reason == "stop" else "length",
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=2,
            arrived=1.0,
            first_token=1.5,
            finished=2.0,
        )


def fake_engine(
    answer: Callable[[Sequence[int]], Iterable[int]] = list, max_positions: int = 4096
) -> "Engine":
    """A FakeEngine that the type checker accepts as an Engine."""
    return cast("Engine", FakeEngine(answer, max_positions))
