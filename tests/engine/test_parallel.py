"""Several ranks give the results of one; each reads only its share of the weights."""

import random
import shutil
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine import (
    Completion,
    Engine,
    EngineConfig,
    EngineError,
    Grammar,
    Request,
    SamplingParams,
    kernels,
)
from engine.execution import model_runner
from engine.execution.capture import CaptureMode
from engine.execution.model_runner import ModelRunner
from engine.memory_plan import MemoryPlan
from engine.parallel import channel as channel_module
from engine.parallel import worker
from engine.parallel.channel import Channel
from engine.parallel.step_message import StepMessage
from engine.parallel.worker_pool import WorkerPool
from model import CheckpointError, ModelConfig, Transformer, load_config
from model import loader as weights
from model.checkpoint_files import CheckpointFiles
from model.checks.verify import Kernels
from model.cost.operations import parameter_bytes
from model.layers.attention import Attention
from model.layers.mlp import Mlp, Moe
from model.ops.backend import Backend, Compute, choose_backend
from model.ops.cpu.backend import CpuBackend
from model.sharding import Shard
from tests.adapters import expert_lora, write_adapter
from tests.checkpoints import edit_config, write_mxfp4_pair
from tests.engine.captures import Repeating, Taping
from tests.engine.test_decode_graphs import FromTensors

CPU = torch.device("cpu")
NEAR = 1e-3  # logits this close can change places with the order of a sum


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], WorkerPool]]:
    """Number of ranks → their processes, which the tests of this file share."""
    made = cache(WorkerPool)
    yield made
    for size in (2, 4):
        made(size).close()


@pytest.fixture(scope="module")
def folder(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Name → checkpoint: those of `checkpoint`, MXFP4, and a vocabulary that ranks cannot halve."""

    @cache
    def make(name: str) -> Path:
        own = tmp_path_factory.mktemp("parallel")
        if name == "mxfp4":
            write_mxfp4_pair(own / "packed", own / "dense")
            return own / "packed"
        if name == "odd-vocabulary":
            shutil.copytree(checkpoint("qwen2"), own, dirs_exist_ok=True)
            tensors = load_file(own / "model.safetensors")
            tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:509]
            save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
            edit_config(own, vocab_size=509)
            return own
        return checkpoint(name)

    return make


def load(logprobs: int | None = None, temperature: float = 0.0) -> list[Request]:
    rng = random.Random(7)
    return [
        Request(
            rng.choices(range(1, 509), k=rng.randint(1, 150)),
            SamplingParams(
                max_new_tokens=rng.randint(5, 40),
                ignore_eos=True,
                temperature=temperature,
                top_p=0.9,
                seed=i,
                logprobs=logprobs,
            ),
            i,
        )
        for i in range(8)
    ]


def run(
    folder: Path, requests: list[Request], workers: WorkerPool | None = None, **settings: Any
) -> dict[int, Completion]:
    config = EngineConfig(dtype="float32", **{"kv_memory": 16 << 20, **settings})
    with Engine(folder, config, workers=workers) as engine:
        return {c.request_id: c for c in engine.generate(requests)}


def near_ties(alone: dict[int, Completion], found: dict[int, Completion]) -> int:
    """The number of requests that differ; each must differ first where two tokens nearly tie."""
    ties = 0
    for i, completion in alone.items():
        pairs = zip(completion.token_ids, found[i].token_ids, strict=True)
        at = next((k for k, (mine, other) in enumerate(pairs) if mine != other), None)
        if at is not None:
            assert completion.logprobs is not None
            (_, first), (_, second) = completion.logprobs[at].top
            assert first - second < NEAR, (i, at)
            ties += 1
    return ties


def test_an_adapter_over_mxfp4_experts_is_that_of_one_rank(
    folder: Callable[[str], Path], ranks: Callable[[int], WorkerPool], tmp_path: Path
) -> None:
    source = folder("mxfp4")
    tensors, _ = expert_lora(source, 1)
    adapter = str(write_adapter(tmp_path, tensors, {"target_parameters": ["experts"]}))
    given: dict[str, Any] = {"adapter": ((adapter, 1.0),)}
    alone = run(source, load(logprobs=2)[:3], **given)
    assert near_ties(alone, run(source, load()[:3], ranks(2), **given)) <= 1


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("qwen2", 2),
        ("qwen2", 4),  # with 2 KV heads
        ("gpt_oss", 2),
        ("mxfp4", 2),
        ("qwen3_moe", 2),
        ("mixtral", 2),
        ("llama-biases-linear-rope", 2),
        ("odd-vocabulary", 2),
        ("phi3-longrope", 2),
        ("granite", 2),
        ("glm4_moe", 2),
        ("gemma4_text-experts", 2),
        ("gemma4_text-shared", 2),
        ("nanochat", 2),
        ("deepseek_v3", 2),
        ("qwen3_5_moe_text", 2),
    ],
)
def test_several_ranks_give_the_tokens_and_logits_of_one(
    name: str, size: int, folder: Callable[[str], Path], ranks: Callable[[int], WorkerPool]
) -> None:
    alone = run(folder(name), load(logprobs=2))
    assert sorted(alone) == list(range(8))
    greedy = run(
        folder(name), load(), workers=ranks(size)
    )  # each rank finds the argmax of its part
    assert near_ties(alone, greedy) <= 1
    gathered = run(folder(name), load(logprobs=2), workers=ranks(size))  # rank 0 gathers the logits
    assert near_ties(alone, gathered) <= 1
    for i, completion in alone.items():
        for mine, other in zip(completion.logprobs or (), gathered[i].logprobs or (), strict=True):
            if mine.top[0][0] != other.top[0][0]:
                break  # a near tie: the tokens differ from here on
            assert other.logprob == pytest.approx(mine.logprob, abs=1e-4)
    sampled = run(folder(name), load(temperature=0.8), workers=ranks(size))
    expected = run(folder(name), load(temperature=0.8))
    assert {i: c.token_ids for i, c in sampled.items()} == {
        i: c.token_ids for i, c in expected.items()
    }


def test_prompts_and_grammars_are_those_of_one_rank(
    folder: Callable[[str], Path], ranks: Callable[[int], WorkerPool]
) -> None:
    pytest.importorskip("llguidance")
    embedded = Path(__file__).resolve().parents[2] / "data/model/tokenizer.json"
    params = SamplingParams(
        max_new_tokens=12,
        temperature=0.8,
        seed=3,
        prompt_logprobs=2,
        grammar=Grammar("regex", "[a-f]{4}-[0-9]+"),
    )
    requests = [Request([*range(5, 60)], params, 0), Request([7, 8], replace(params, seed=4), 1)]
    found = []
    for workers in (None, ranks(2)):
        config = EngineConfig(dtype="float32", kv_memory=16 << 20, max_batch_tokens=16)
        with Engine(folder("odd-vocabulary"), config, workers=workers) as engine:
            engine.tokenizer_json = embedded.read_text
            found.append(sorted(engine.generate(requests), key=lambda c: c.request_id))
    for alone, parallel in zip(*found, strict=True):
        assert alone.error is None
        assert parallel.token_ids == alone.token_ids
        scores = zip(alone.prompt_logprobs or (), parallel.prompt_logprobs or (), strict=True)
        for mine, other in scores:
            assert other.logprob == pytest.approx(mine.logprob, abs=1e-4)
            assert [id_ for id_, _ in other.top] == [id_ for id_, _ in mine.top]


def test_a_step_is_one_broadcast_unless_it_is_long(
    folder: Callable[[str], Path],
    ranks: Callable[[int], WorkerPool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: Counter[str] = Counter()
    broadcast, step = Channel._broadcast, Channel.send_step

    def count(self: Channel, values: torch.Tensor) -> None:
        sent["broadcasts"] += 1
        broadcast(self, values)

    def count_step(self: Channel, message: StepMessage) -> None:
        before = sent["broadcasts"]
        step(self, message)
        sent["long" if len(message.packed()) > 4094 else "short"] += 1
        sent["in steps"] += sent["broadcasts"] - before

    requests = [Request([i % 500 + 1] * 480, SamplingParams(max_new_tokens=4), i) for i in range(9)]
    alone = run(folder("qwen2"), requests, max_batch_tokens=8192)
    monkeypatch.setattr(Channel, "_broadcast", count)
    monkeypatch.setattr(Channel, "send_step", count_step)
    found = run(folder("qwen2"), requests, max_batch_tokens=8192, workers=ranks(2))
    assert {i: c.token_ids for i, c in found.items()} == {i: c.token_ids for i, c in alone.items()}
    assert sent["long"] == 1
    assert sent["short"] >= 3
    assert sent["in steps"] == sent["short"] + 2 * sent["long"]


_ints = st.lists(st.integers(0, 2**31 - 1), max_size=5)
_pairs = st.lists(st.tuples(st.integers(0, 999), st.integers(0, 999)), max_size=3)


@given(st.data())
def test_a_packed_message_is_unpacked_unchanged(data: st.DataObject) -> None:
    decodes, chunks, groups = (data.draw(st.integers(0, 3)) for _ in range(3))

    def draw(count: int) -> list[int]:
        return data.draw(st.lists(st.integers(0, 999), min_size=count, max_size=count))

    tables = [
        (row, [array("i", data.draw(_ints)) for _ in range(groups)]) for row in data.draw(_ints)
    ]
    message = StepMessage(
        decodes,
        draw(decodes + chunks),
        draw(decodes + chunks),
        draw(chunks),
        draw(chunks),
        [value % 2 for value in draw(chunks)],
        data.draw(_ints),
        tables,
        data.draw(st.booleans()),
        *(data.draw(_pairs) for _ in range(4)),
    )
    assert StepMessage.unpacked(message.packed(), groups) == message


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "name", ["qwen2", "gpt_oss", "mxfp4", "qwen3_moe", "mixtral", "phi3-longrope", "granite"]
)
def test_a_rank_reads_only_its_share_of_the_checkpoint(
    name: str, size: int, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if size == 4 and name != "qwen2":
        size = 2  # 4 does not divide their heads or experts
    config = load_config(folder(name))
    read, bytes_read = CheckpointFiles.read, 0

    def counted(self: CheckpointFiles, *args: Any) -> torch.Tensor:
        nonlocal bytes_read
        tensor = read(self, *args)
        bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    monkeypatch.setattr(CheckpointFiles, "read", counted)
    shares = []
    for number in range(size):
        bytes_read = 0
        shares.append(loaded(config, folder(name), Shard(number, size)))
        assert bytes_read == parameter_bytes(config, "float32", size)
    whole = loaded(config, folder(name), Shard())
    assert parts_of(whole).keys() == parts_of(shares[0]).keys()
    for part, tensor in parts_of(whole).items():
        found = [parts_of(share)[part] for share in shares]
        if part.startswith(("k of", "v of")):  # several ranks hold the same heads
            found = found[:: max(1, size // config.num_kv_heads)]
        assert torch.equal(torch.cat(found, dim=1 if "down of" in part else 0), tensor), part


def loaded(config: ModelConfig, folder: Path, shard: Shard) -> Transformer:
    backend = choose_backend(torch.device("cpu"), torch.float32)
    model = Transformer(config.held(backend), shard)
    weights.load(model, folder, backend)
    return model


def parts_of(model: Transformer) -> dict[str, torch.Tensor]:
    """The tensors of a model that ranks divide; the name says along which dimension."""
    found: dict[str, Any] = {"embedding": model.embedding}
    for i, layer in enumerate(model.layers):
        attention = layer.attention
        assert isinstance(attention, Attention)
        own = attention.heads
        widths = [n * own.head_dim for n in (own.heads, *[own.kv_heads] * 2)]
        qkv: Any = attention.qkv.weight
        for name, rows in zip("qkv", qkv.split(widths), strict=True):
            found[f"{name} of {i}"] = rows
        found[f"down of attention {i}"] = attention.out.weight
        if attention.sinks is not None:
            found[f"sinks of {i}"] = attention.sinks
        if isinstance(layer.mlp, Moe):
            found[f"experts of {i}"] = torch.stack([*layer.mlp.experts.gate_up])
        elif isinstance(layer.mlp, Mlp):
            gate_up: Any = layer.mlp.gate_up.weight
            for name, rows in zip(("gate", "up"), gate_up.chunk(2), strict=True):
                found[f"{name} of {i}"] = rows
            found[f"down of mlp {i}"] = layer.mlp.down.weight
    return found


def test_impossible_rank_counts_are_refused_with_the_possible_ones(
    folder: Callable[[str], Path],
) -> None:
    with pytest.raises(
        EngineError, match=r"6 heads, 2 KV heads, 6 experts.* split 4 ways; possible: 1, 2, 6"
    ):
        Engine(folder("gpt_oss"), EngineConfig(tensor_parallel=4))
    with pytest.raises(EngineError, match="split 3 ways; possible: 1, 2, 4"):
        Engine(folder("qwen2"), EngineConfig(tensor_parallel=3))


def test_the_error_of_a_killed_rank_names_it(folder: Callable[[str], Path]) -> None:
    requests = [Request([1, 2], SamplingParams(max_new_tokens=400, ignore_eos=True))] * 4
    with Engine(folder("qwen2"), EngineConfig(dtype="float32", tensor_parallel=2)) as engine:
        (process,) = engine.workers.processes

        def kill(token: int) -> None:
            process.kill()

        requests[1] = Request([3], SamplingParams(max_new_tokens=400), 1, kill)
        with pytest.raises(EngineError, match=r"rank 1 of 2 died: killed by signal 9 .SIGKILL"):
            list(engine.generate(requests))
    assert process.returncode == -9
    # The engine can be warmed up again.
    with engine:
        (done,) = engine.generate([Request([1, 2], SamplingParams(max_new_tokens=4))])
        processes = engine.workers.processes
        assert len(done.token_ids) == 4
    assert processes[0].returncode == 0


def test_errors_on_other_ranks_are_raised_on_rank_0(ranks: Callable[[int], WorkerPool]) -> None:
    ranks(2).start(CPU)
    with pytest.raises(CheckpointError, match="rank 1: /nowhere"):
        ranks(2).call("make_runner", ("/nowhere", "float32", "auto", None, (), 1), lambda: None)
    own = WorkerPool(2)
    own.start(CPU)

    def compute_without_a_runner() -> None:
        with own.collective():
            assert own.channel is not None
            own.send_step(StepMessage(0, [], [], [], [], [], [], [], True))
            own.channel.gather_reports("")

    with pytest.raises(EngineError, match="rank 1 of 2 died: AssertionError"):
        compute_without_a_runner()
    assert not own.ready


def test_out_of_memory_on_any_rank_ends_the_run_with_advice(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(folder("qwen2"), EngineConfig(dtype="float32", tensor_parallel=2)) as engine:
        with pytest.raises(EngineError, match=r"rank 1 of 2 died.* lower max_batch_tokens"):
            engine.workers.call("allocate", (1 << 40, 16, 64, 4), lambda: None)
        assert not engine.workers.ready
    with Engine(folder("qwen2"), EngineConfig(dtype="float32", tensor_parallel=2)) as engine:
        forward, steps = engine.runner.forward, Counter[str]()

        def fail_at_the_third(batch: Any) -> torch.Tensor:
            steps["run"] += 1
            if steps["run"] == 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(batch)

        monkeypatch.setattr(engine.runner, "forward", fail_at_the_third)
        (process,) = engine.workers.processes
        with pytest.raises(EngineError, match=r"2 ranks compute together.* lower max_batch_tokens"):
            list(engine.generate(load()))
        assert process.returncode is not None


def test_collectives_are_aborted_when_a_rank_has_died(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, aborted = WorkerPool(2), threading.Event()
    own.start(CPU)
    assert own.channel is not None
    monkeypatch.setattr(own.channel, "abort", aborted.set)
    own.watch()
    assert not aborted.wait(0.5)
    own.processes[0].kill()
    assert aborted.wait(30)
    own._waiting = False
    own.close()
    assert own._watcher is None


class InThreads(WorkerPool):
    """Two ranks in one process: the second runs in a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, replays: Counter[int]) -> None:
        super().__init__(2)
        monkeypatch.setattr(worker, "GpuCapture", lambda stats: Repeating(replays))
        store = dist.HashStore()
        self._other = threading.Thread(
            target=lambda: worker.run(Channel(1, 2, store, CPU, True), CPU), daemon=True
        )
        self._other.start()
        self.attach(Channel(0, 2, store, CPU, True))

    def close(self) -> None:
        channel = self.channel  # kept until the other end is done
        super().close()
        self._other.join()
        del channel


class Choosable(CpuBackend):
    """A backend that keeps the choices of kernels that it was given."""

    given: ClassVar[list[Mapping[str, Any]]] = []

    def with_choices(self, choices: Mapping[str, Any]) -> CpuBackend:
        self.given.append(choices)
        return self


def test_every_rank_runs_with_the_kernels_that_rank_0_has_chosen(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "choose_backend", Choosable)
    choices = {"linear": "torch"}
    verified: list[Any] = []

    def decide(verifier: Any, *_: Any) -> Kernels:
        verified.append(verifier.shard)
        return Kernels(choices)

    monkeypatch.setattr(kernels, "_decide", decide)
    ranks = InThreads(monkeypatch, Counter())
    engine = Engine(folder("qwen2"), EngineConfig(dtype="float32"), workers=ranks)
    engine.checks_kernels = True
    Choosable.given.clear()
    with engine:
        assert [shard.size for shard in verified] == [2]  # rank 0's share, and only there
        assert Choosable.given[-2:] == [choices, choices]
        assert engine.rounding["kernel choices"] == choices
    ranks.close()


@pytest.mark.parametrize("other", [40 << 20, 60 << 20])
def test_the_kv_cache_fits_the_rank_with_the_least_memory(
    other: int, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    main = threading.main_thread()
    monkeypatch.setattr(
        channel_module, "available_bytes",
        lambda device: 400 << 20 if threading.current_thread() is main else other,
    )  # fmt: skip
    ranks = InThreads(monkeypatch, Counter())
    with Engine(folder("qwen2"), EngineConfig(dtype="float32"), workers=ranks) as engine:
        assert engine.runner.block_bytes(16) == 4 * 2 * 16 * 1 * 16 * 4  # one of 2 KV heads
        needs = MemoryPlan.of(engine.settings)
        left = other // 2 - needs.activations - needs.logits
        assert 0.35 * left < engine.stats.kv_bytes <= 0.4 * left
    ranks.close()


@pytest.mark.parametrize("name", ["gpt_oss", "qwen2"])
def test_captured_steps_give_the_same_tokens_with_several_ranks(
    name: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other CPU backends do not take the sequences without tokens that pad a step with chunks.
    monkeypatch.setattr(model_runner, "choose_backend", Backend)
    expected = run(folder(name), load())
    capture = ModelRunner.capture

    def capture_from_tensors(self: ModelRunner, *args: Any) -> None:
        self.model = FromTensors(self.model)  # type: ignore[assignment]
        capture(self, *args)

    monkeypatch.setattr(ModelRunner, "capture", capture_from_tensors)
    mine, theirs = Counter[int](), Counter[int]()
    ranks = InThreads(monkeypatch, theirs)
    settings: dict[str, Any] = {"max_batch_size": 10, "max_batch_tokens": 128}
    config = EngineConfig(dtype="float32", kv_memory=16 << 20, **settings)
    engine = Engine(folder(name), config, workers=ranks)
    engine.make_capture = lambda stats: Repeating(mine)
    with engine:
        found = {c.request_id: c.token_ids for c in engine.generate(load())}
    ranks.close()
    assert found == {i: c.token_ids for i, c in expected.items()}
    assert mine == theirs
    assert sum(mine.values()) > 30


def test_steps_are_captured_by_every_rank_or_by_none(
    folder: Callable[[str], Path], ranks: Callable[[int], WorkerPool]
) -> None:
    notices: list[str] = []
    replays = Counter[int]()
    expected = run(folder("qwen2"), load())
    engine = Engine(
        folder("qwen2"),
        EngineConfig(dtype="float32", kv_memory=16 << 20),
        workers=ranks(2),
        notice=notices.append,
    )
    # The other rank runs on a CPU, which has no graphs.
    engine.make_capture = lambda stats: Repeating(replays)
    with engine:
        found = {c.request_id: c.token_ids for c in engine.generate(load())}
    assert found == {i: c.token_ids for i, c in expected.items()}
    assert not replays
    assert len(notices) == 2  # of the two modes
    assert all("rank 1: there is no GPU" in notice for notice in notices)


class Partly(Taping):
    """Captures whole steps up to a number of sizes, and any number of parts."""

    def __init__(self, sizes: int):
        super().__init__()
        self._sizes = sizes

    def __call__(self, compute: Compute) -> Compute:
        replay = Repeating.__call__(self, compute)  # in step with the other rank
        self._sizes -= 1
        if self._sizes < 0:
            raise RuntimeError("too many captures")
        return replay


def test_a_rank_that_fails_leads_all_ranks_to_the_next_mode(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails at a size that the other rank can capture: both stop there."""
    monkeypatch.setattr(model_runner, "choose_backend", Backend)
    capture = ModelRunner.capture

    def capture_from_tensors(self: ModelRunner, own: Any, mode: CaptureMode, *rest: Any) -> None:
        model = self.model
        if mode == CaptureMode.WHOLE:
            self.model = FromTensors(model)  # type: ignore[assignment]
        try:
            capture(self, own, mode, *rest)
        finally:
            self.model = model

    monkeypatch.setattr(ModelRunner, "capture", capture_from_tensors)
    notices: list[str] = []
    ranks = InThreads(monkeypatch, Counter())
    captures: dict[int, list[Partly]] = {2: [], 99: []}

    def captures_up_to(sizes: int) -> Partly:
        captures[sizes].append(Partly(sizes))
        return captures[sizes][-1]

    monkeypatch.setattr(worker, "GpuCapture", lambda stats: captures_up_to(2))
    engine = Engine(
        folder("gpt_oss"),
        EngineConfig(dtype="float32", kv_memory=16 << 20),
        workers=ranks,
        notice=notices.append,
    )
    engine.make_capture = lambda stats: captures_up_to(99)
    with engine:
        assert engine.runner.captured
    ranks.close()
    assert notices == [
        "decode steps are captured in parts, with attention and experts outside of graphs, because "
        "a capture failed: rank 1: too many captures"
    ]
    assert captures[99][0]._sizes == 99 - 3
    assert captures[99][1].segments == captures[2][1].segments > 0
