"""Results do not depend on how requests are batched, chunked, cached or preempted."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import Completion, Engine, EngineConfig, Request, SamplingParams
from engine.execution.model_runner import ModelRunner
from model.ops.cpu.bindings import library
from model.ops.forward_batch import ForwardBatch
from tests.checkpoints import Peer


def load(count: int = 10, longest: int = 60) -> list[Request]:
    """Greedy and sampled requests of many lengths, half of them with a common prefix.

    longest: bounds their new tokens.
    """
    rng = random.Random(5)
    shared = rng.choices(range(1, 512), k=70)
    requests = []
    for i in range(count):
        own = rng.choices(range(1, 512), k=rng.randint(1, 60))
        params = SamplingParams(
            temperature=0.0 if i % 3 else 0.8,
            top_p=0.9,
            seed=i,
            max_new_tokens=min(rng.randint(5, 60), longest),
            ignore_eos=True,
        )
        requests.append(Request(shared + own if i % 2 else own, params, i))
    return requests


def run(
    folder: Path, requests: list[Request], lookahead: int = 0, **settings: Any
) -> tuple[dict[int, Any], Engine]:
    engine = Engine(folder, EngineConfig(**{"dtype": "float32", "kv_memory": 32 << 20, **settings}))
    engine.lookahead = lookahead
    with engine:
        return {c.request_id: c.token_ids for c in engine.generate(requests)}, engine


# few_blocks: enough for one of the longest requests and little more.
@pytest.mark.parametrize(
    ("name", "few_blocks"),
    [
        ("gpt_oss", 21),
        ("qwen2-window-yarn", 44),
        ("qwen3_moe", 14),
        ("deepseek_v3", 14),
        ("qwen3_5_text", 14),
    ],
)
def test_batching_chunking_caching_and_preemption_do_not_change_tokens(
    name: str, few_blocks: int, checkpoint: Callable[[str], Path]
) -> None:
    folder, requests = checkpoint(name), load()
    alone, _ = run(folder, requests, max_batch_size=1, prefix_cache=False)
    assert sorted(alone) == list(range(10))

    for lookahead in (0, 1):
        batched, engine = run(folder, requests, lookahead, prefix_cache=False)
        assert engine.stats.peak_batch == 10
        assert batched == alone

    chunked, engine = run(folder, requests, 1, max_batch_tokens=13, prefix_cache=False)
    assert chunked == alone

    cached, engine = run(folder, requests * 2, 1)
    # A recurrent layer needs a snapshot, of which the second sequence with a prefix is the first.
    assert engine.stats.cached_tokens > (300 if engine.runner.states else 500)
    assert cached == alone

    block = engine.stats.kv_bytes // (engine.stats.kv_blocks + 1)
    small = few_blocks * block
    for lookahead in (0, 1):
        preempted, engine = run(folder, requests, lookahead, kv_memory=small, max_batch_tokens=64)
        assert engine.stats.preemptions > 0
        assert preempted == alone


@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss-wide",
        "qwen3",
        "qwen3, KV in int8",
        "qwen3, KV in fp8",
        "qwen3_moe",
        "granite-wide",
        "phi3-partial-rotary-wide",
        "olmo2-wide",
        "ministral3-wide",
        "hunyuan_v1_dense-wide",
        "qwen3_5_text-wide",
        "glm4_moe-wide",
        "deepseek_v3-wide",
        "deepseek_v3-wide, KV in int8",
        "gemma4_text-experts-wide",
        "gemma4_text-shared-wide",
        "nanochat-wide",
    ],
)
def test_batching_does_not_change_tokens_in_bfloat16_with_native_kernels(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    """The native kernels sum each row in the same order, whatever the batch contains."""
    if library() is None:
        pytest.skip("no native kernels were built here")
    name, _, kv_dtype = name.partition(", KV in ")
    folder, requests = checkpoint(name), load()
    settings: dict[str, Any] = {"dtype": "bfloat16", "max_batch_size": 1, "prefix_cache": False}
    settings["kv_dtype"] = kv_dtype or "auto"
    with Engine(folder, EngineConfig(kv_memory=32 << 20, **settings)) as engine:
        assert engine.runner.captured  # recorded: torch computes no operation
        engine.runner.uncapture()
        alone = {c.request_id: c.token_ids for c in engine.generate(requests)}
        most_cached = 300 if engine.runner.states else 500
    settings["max_batch_size"] = 10
    batched, engine = run(folder, requests, **settings)
    assert engine.stats.peak_batch == 10
    assert batched == alone
    # The longest first, for steps in which no prompt ends: no row needs logits.
    longest_first = sorted(requests, key=lambda request: -len(request.prompt_ids))
    chunked, _ = run(folder, longest_first, max_batch_tokens=13, **settings)
    assert chunked == alone
    # Requests with a common prefix read its blocks together.
    settings["prefix_cache"] = True
    cached, engine = run(folder, requests * 2, **settings)
    assert engine.stats.cached_tokens > most_cached
    assert cached == alone
    few_blocks = 7 * (1 + len(engine.runner.groups))
    small = few_blocks * (engine.stats.kv_bytes // (engine.stats.kv_blocks + 1))
    preempted, engine = run(folder, requests, kv_memory=small, max_batch_tokens=64, **settings)
    assert engine.stats.preemptions > 0
    assert preempted == alone
    settings["prefix_cache"] = True
    cached, engine = run(folder, requests * 2, **settings)
    assert engine.stats.cached_tokens > most_cached
    assert cached == alone


def test_stale_nan_in_free_blocks_changes_no_result(checkpoint: Callable[[str], Path]) -> None:
    requests = load()
    expected, _ = run(checkpoint("gpt_oss"), requests)
    engine = Engine(checkpoint("gpt_oss"), EngineConfig(dtype="float32", kv_memory=32 << 20))
    with engine:
        for cache in engine.runner.kv_caches:
            cache[:, 1:] = float("nan")
        assert {c.request_id: c.token_ids for c in engine.generate(requests)} == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_non_finite_logits_fail_only_their_own_request(
    lookahead: int, dtype: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """For every kind of sampling, in the prompt or later; other requests are not affected."""
    folder = shutil.copytree(checkpoint("qwen3"), tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][511] = float("nan")
    tensors["model.embed_tokens.weight"][510] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    sampled: dict[str, Any] = {"temperature": 1.0, "seed": 3}
    kinds: list[dict[str, Any]] = [{}, sampled, {**sampled, "top_p": 0.9}, {"logprobs": 2}]
    good = load()
    bad = [
        Request([7, 8, token], SamplingParams(**kind, max_new_tokens=9), 100 + i)
        for i, (token, kind) in enumerate((t, k) for t in (510, 511) for k in kinds)
    ]
    expected, _ = run(folder, good, lookahead, dtype=dtype)
    engine = Engine(folder, EngineConfig(dtype=dtype, kv_memory=32 << 20))
    engine.lookahead = lookahead
    with engine:
        found = {c.request_id: c for c in engine.generate([*bad[:4], *good, *bad[4:], *bad])}
    assert {i: c.token_ids for i, c in found.items() if i < 100} == expected
    for request in bad:
        failed = found[request.request_id]
        assert (failed.finish_reason, failed.token_ids) == ("error", [])
        assert "the model's logits are not finite" in str(failed.error)
    assert ("use dtype float32" in str(failed.error)) == (dtype == "bfloat16")


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_stop_id_ends_the_output_and_is_kept(
    lookahead: int, checkpoint: Callable[[str], Path]
) -> None:
    request = Request([5, 6, 7], SamplingParams(max_new_tokens=20, ignore_eos=True))
    free = run(checkpoint("qwen2"), [request])[0][0]
    at = next(i for i in range(3, 20) if free[i] not in free[:i])
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, stop_ids=frozenset({free[at]}))
    with Engine(checkpoint("qwen2"), EngineConfig(dtype="float32", kv_memory=32 << 20)) as engine:
        engine.steps.lookahead = lookahead
        (done,) = engine.generate([Request([5, 6, 7], params)])
        assert done.token_ids == free[: at + 1]
        assert done.finish_reason == "stop"
        # The checkpoint's own stop id has the same effect, unless it is ignored.
        engine.model_config = replace(engine.model_config, stop_ids=frozenset({free[at]}))
        (done,) = engine.generate([Request([5, 6, 7], SamplingParams(max_new_tokens=20))])
        assert done.token_ids == free[: at + 1]


def test_requests_that_come_later_join_the_running_batch(
    checkpoint: Callable[[str], Path],
) -> None:
    requests = [
        Request([5, 6, 7 + i], SamplingParams(max_new_tokens=20, ignore_eos=True), i)
        for i in range(3)
    ]
    expected, _ = run(checkpoint("qwen2"), requests)
    config = EngineConfig(dtype="float32", kv_memory=32 << 20, speculation=False)
    with Engine(checkpoint("qwen2"), config) as engine:
        source = [requests[0], None, None, requests[1], None, requests[2]]
        done = {c.request_id: c.token_ids for c in engine.generate(source)}
    assert done == expected
    assert engine.stats.peak_batch == 3
    assert engine.stats.steps == 23  # the last request starts three steps after the first


@pytest.mark.parametrize("lookahead", [0, 1])
def test_on_token_receives_every_token_and_can_end_the_request(
    lookahead: int,
    checkpoint: Callable[[str], Path],
) -> None:
    seen: list[int] = []

    def on_token(token: int) -> bool:
        seen.append(token)
        return len(seen) == 7

    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    with Engine(checkpoint("qwen2"), EngineConfig(dtype="float32", kv_memory=32 << 20)) as engine:
        engine.steps.lookahead = lookahead
        (done,) = engine.generate([Request([5, 6, 7], params, on_token=on_token)])
    assert done.token_ids == seen
    assert len(seen) == 7
    assert done.finish_reason == "stop"


@pytest.mark.parametrize("lookahead", [0, 1])
def test_limits_count_new_tokens_and_positions(
    lookahead: int, checkpoint: Callable[[str], Path]
) -> None:
    def length(**limits: int) -> tuple[int, str]:
        params = SamplingParams(ignore_eos=True, **limits)  # type: ignore[arg-type]
        (done,) = engine.generate([Request([5, 6, 7], params)])
        return len(done.token_ids), done.finish_reason

    with Engine(checkpoint("qwen2"), EngineConfig(dtype="float32", kv_memory=32 << 20)) as engine:
        engine.steps.lookahead = lookahead
        assert length(max_new_tokens=4) == (4, "length")
        assert length(max_positions=10) == (7, "length")
        assert length(max_new_tokens=4, max_positions=6) == (3, "length")
        assert length() == (512 - 3, "length")


def test_the_error_of_a_long_prompt_names_the_limit_that_it_exceeds(
    checkpoint: Callable[[str], Path],
) -> None:
    long = [5] * 700
    with Engine(checkpoint("qwen2"), EngineConfig(dtype="float32", kv_memory=32 << 20)) as engine:
        limits = [SamplingParams(), SamplingParams(max_positions=300)]
        own, given = engine.generate([Request(long, params) for params in limits])
    assert "limit of 512 tokens (the model's limit)" in str(own.error)
    assert "limit of 300 tokens (set by max_positions; the model's limit is 512)" in str(
        given.error
    )
    with Engine(checkpoint("qwen2"), EngineConfig(dtype="float32", kv_memory=1 << 17)) as engine:
        (small,) = engine.generate([Request(long)])
    assert "(all that the KV cache holds; the model's limit is 512)" in str(small.error)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_logprobs_match_the_reference_model(
    lookahead: int, checkpoint: Callable[[str], Path], peer: Callable[[str], Peer]
) -> None:
    prompt = [9, 8, 7, 6]
    params = SamplingParams(max_new_tokens=5, ignore_eos=True, logprobs=3)
    others = [Request([5] * n, SamplingParams(max_new_tokens=n), n) for n in range(1, 5)]
    with Engine(checkpoint("qwen3"), EngineConfig(dtype="float32", kv_memory=32 << 20)) as engine:
        engine.steps.lookahead = lookahead
        found = list(engine.generate([*others, Request(prompt, params, 0)]))
    assert [completion.logprobs for completion in found if completion.request_id] == [None] * 4
    (done,) = (completion for completion in found if not completion.request_id)
    expected = peer("qwen3").logits([*prompt, *done.token_ids]).log_softmax(-1)[3:-1]
    assert done.logprobs is not None
    for row, token, seen in zip(expected, done.token_ids, done.logprobs, strict=True):
        assert seen.logprob == pytest.approx(float(row[token]), abs=1e-4)
        values, ids = row.topk(3)
        assert [i for i, _ in seen.top] == ids.tolist()
        assert [v for _, v in seen.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_finish_frees_the_memory_and_the_engine_can_start_again(
    checkpoint: Callable[[str], Path],
) -> None:
    engine = Engine(checkpoint("qwen2"), EngineConfig(dtype="float32", kv_memory=32 << 20))
    request = Request([5, 6, 7], SamplingParams(max_new_tokens=5))
    with engine:
        first = list(engine.generate([request]))
        assert engine.runner.kv_caches
    assert not engine.runner.kv_caches
    assert engine.runner.model is None
    with engine:
        assert next(engine.generate([request])).token_ids == first[0].token_ids


def test_requests_are_taken_only_while_there_is_room(checkpoint: Callable[[str], Path]) -> None:
    taken = 0

    def requests() -> Any:
        nonlocal taken
        for i in range(100):
            taken += 1
            yield Request([1 + i], SamplingParams(max_new_tokens=3, ignore_eos=True), i)

    with Engine(
        checkpoint("qwen2"), EngineConfig(dtype="float32", kv_memory=32 << 20, max_batch_size=4)
    ) as engine:
        done: list[Completion] = []
        for completion in engine.generate(requests()):
            done.append(completion)
            assert taken <= len(done) + 2 * 4
    assert len(done) == 100


def test_dummy_weights_need_only_the_config(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint("gpt_oss") / "config.json").read_bytes())
    with Engine(tmp_path, EngineConfig(dummy_weights=True, kv_memory=8 << 20)) as engine:
        (done,) = engine.generate(
            [Request([1, 2], SamplingParams(max_new_tokens=4, ignore_eos=True))]
        )
    assert len(done.token_ids) == 4


def test_too_little_kv_memory_says_how_much_is_needed(checkpoint: Callable[[str], Path]) -> None:
    engine = Engine(checkpoint("qwen2"), EngineConfig(dtype="float32", kv_memory=100))
    with pytest.raises(ValueError, match=r"kv_memory 100 means 100 bytes.*use at least \d+ bytes"):
        engine.warm_up()


def test_bfloat16_stays_near_float32(checkpoint: Callable[[str], Path]) -> None:
    """Packed weights and bfloat16 attention give nearly the same distribution."""
    params = SamplingParams(max_new_tokens=1, logprobs=1)
    requests = [Request(r.prompt_ids, params, r.request_id) for r in load()]
    found: list[dict[int, float]] = []
    for dtype in ("float32", "bfloat16"):
        with Engine(checkpoint("qwen2"), EngineConfig(dtype=dtype, kv_memory=32 << 20)) as engine:
            done = list(engine.generate(requests))
        assert all(c.logprobs for c in done)
        found.append({c.request_id: c.logprobs[0].top[0][1] for c in done if c.logprobs})
    wide = torch.tensor([found[0][i] for i in range(10)])
    half = torch.tensor([found[1][i] for i in range(10)])
    assert (wide - half).abs().mean() < 0.2


def test_a_head_that_is_not_the_tied_embedding_is_noticed_and_changes_the_answer(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen2"), tmp_path / "untied"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0).contiguous()
    save_file(tensors, folder / "model.safetensors")
    notices: list[str] = []
    settings = EngineConfig(dtype="float32", kv_memory=8 << 20)
    request = Request([5, 6, 7], SamplingParams(max_new_tokens=1, ignore_eos=True))
    with Engine(folder, settings, notice=notices.append) as engine:
        (untied,) = engine.generate([request])
    with Engine(checkpoint("qwen2"), settings) as engine:
        (tied,) = engine.generate([request])
    assert [text for text in notices if "'tie_word_embeddings' is true" in text] == notices != []
    assert untied.token_ids == [(tied.token_ids[0] + 1) % 512]


def test_steps_that_are_not_replayed_are_counted(checkpoint: Callable[[str], Path]) -> None:
    for dtype in ("float32", "bfloat16"):
        with Engine(checkpoint("qwen3"), EngineConfig(dtype=dtype, kv_memory=8 << 20)) as engine:
            list(engine.generate([Request([1, 2, 3], SamplingParams(max_new_tokens=3))]))
            replays = dtype == "bfloat16" and engine.runner.backend.recorder() is not None
            assert engine.stats.steps > 0
            assert engine.stats.launched_steps == (0 if replays else engine.stats.steps)


def test_steps_that_are_not_replayed_write_logits_to_the_same_memory_of_a_cpu(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []
    forward = ModelRunner.forward

    def watched(runner: ModelRunner, batch: ForwardBatch) -> torch.Tensor:
        logits = forward(runner, batch)
        places.append(logits.data_ptr())
        return logits

    monkeypatch.setattr(ModelRunner, "forward", watched)
    folder, requests = checkpoint("qwen3"), load(6)
    for dtype in ("float32", "bfloat16"):
        places.clear()
        run(folder, requests, dtype=dtype, max_batch_size=4, max_batch_tokens=16)
        assert len(places) > 10
        assert len(set(places)) == 1
