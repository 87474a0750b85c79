"""Properties of the scheduler and the block pool under random loads, without a model.

`HistoryRunner` takes the place of the model and detects wrong blocks.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import Completion, Engine, EngineConfig, EngineError, Request, SamplingParams
from engine.scheduling.kv_cache import KVCache, KvKind, LayerGroup, group_layers
from engine.scheduling.sequence import Step
from engine.scheduling.speculation import Speculation
from engine.scheduling.state_cache import StateCache
from tests.checkpoints import FAMILIES
from tests.engine.history_runner import VOCAB, HistoryRunner, Sampled, next_token

ROOMY: dict[str, Any] = {
    "windows": [None],
    "block_size": 8,
    "blocks": 1000,
    "max_batch_size": 16,
    "max_batch_tokens": 100,
    "prefix_cache": False,
}


@st.composite
def loads(draw: st.DrawFn) -> dict[str, Any]:
    windows: list[int | None] = draw(
        st.sampled_from([[None], [None, 7], [5], [None, 3, 12], [1, None]]), label="windows"
    )
    prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)
    heads = draw(st.lists(prompts, min_size=1, max_size=3), label="common prefixes")
    requests = draw(
        st.lists(
            st.tuples(st.sampled_from(heads), prompts, st.integers(1, 20)), min_size=1, max_size=12
        ),
        label="requests",
    )
    return {
        "windows": windows,
        "block_size": draw(st.integers(1, 8), label="block_size"),
        "blocks": draw(st.integers(4, 60), label="blocks"),
        "max_batch_size": draw(st.integers(1, 6), label="max_batch_size"),
        "max_batch_tokens": draw(st.integers(1, 50), label="max_batch_tokens"),
        "prefix_cache": draw(st.booleans(), label="prefix_cache"),
        "lookahead": draw(st.integers(0, 1), label="lookahead"),
        "drafts": draw(st.integers(0, 5), label="drafts"),
        "group_size": draw(st.sampled_from([0, 1, 2, 4]), label="group size"),
        "snapshots": draw(st.sampled_from([None, None, 0, 1, 3]), label="snapshots"),
        "stop_ids": draw(st.frozensets(st.integers(0, VOCAB - 1), max_size=1), label="stop_ids"),
        "requests": [([*head, *tail], count) for head, tail, count in requests],
        "priorities": draw(st.lists(st.integers(0, 2), max_size=12), label="priorities"),
    }


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    FAMILIES["gpt_oss"]().save_pretrained(folder)
    return folder


def make_engine(folder: Path, load: dict[str, Any]) -> tuple[Engine, HistoryRunner]:
    engine = Engine(
        folder,
        EngineConfig(
            kv_memory=load["blocks"],
            block_size=load["block_size"],
            max_batch_size=load["max_batch_size"],
            max_batch_tokens=load["max_batch_tokens"],
            prefix_cache=load["prefix_cache"],
        ),
    )
    groups = [LayerGroup(window, (i,)) for i, window in enumerate(load["windows"])]
    runner = HistoryRunner(groups, load["block_size"])
    engine.runner = runner  # type: ignore[assignment]
    engine.lookahead = load.get("lookahead", 0)
    engine.group_size = load.get("group_size", 0)
    if load.get("snapshots") is not None:
        runner.has_states = True
        states = StateCache(1000, load["snapshots"])
        engine.warm_up()
        engine.steps._notice = lambda text: engine.notice(text)  # which a test may replace
        engine.steps.scheduler.cache.states = states
        engine.steps.scheduler.speculation = None
    return engine, runner


def run(
    engine: Engine,
    requests: list[tuple[list[int], int]],
    stop_ids: frozenset[int] = frozenset(),
    priorities: Sequence[int] = (),
) -> dict[int, Completion]:
    params = [
        SamplingParams(max_new_tokens=n, ignore_eos=True, stop_ids=stop_ids) for _, n in requests
    ]
    return {
        done.request_id: done
        for done in engine.generate(
            Request(prompt, params[i], i, priority=dict(enumerate(priorities)).get(i, 0))
            for i, (prompt, _) in enumerate(requests)
        )
    }


def assert_no_block_is_leaked(engine: Engine) -> None:
    scheduler = engine.steps.scheduler
    cache = scheduler.cache
    assert not scheduler.running
    assert not scheduler.waiting
    assert cache.num_used == 0
    assert set(cache._references) == {0}
    assert sorted(cache._free) == list(range(1, cache.num_blocks))
    assert sorted(scheduler.free_rows) == list(range(engine.max_batch_size))
    assert not engine.steps.pending
    entered = [(g, digest) for g, index in enumerate(cache._index) for digest in index]
    assert sorted(entered) == sorted(entry for entry in cache._entry if entry is not None)
    if cache.states is not None:
        rows = [*cache.states._free, *cache.states._rows.values()]
        assert len(set(rows)) == len(rows)
        assert all(row >= 1000 for row in rows)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(load=loads())
def test_every_request_completes_correctly_and_no_block_is_leaked(
    config_folder: Path, load: dict[str, Any]
) -> None:
    engine, _ = make_engine(config_folder, load)
    with patch.object(Speculation, "_best_limit", return_value=load["drafts"]):
        check_load(engine, load)


def check_load(engine: Engine, load: dict[str, Any]) -> None:
    done = run(engine, load["requests"], load["stop_ids"], load["priorities"])
    assert sorted(done) == list(range(len(load["requests"])))
    for i, (prompt, count) in enumerate(load["requests"]):
        result = done[i]
        if len(prompt) >= engine.max_positions:
            assert result.finish_reason == "error"
            continue
        expected = list(prompt)
        for _ in range(min(count, engine.max_positions - len(prompt))):
            expected.append(next_token(expected))
            if expected[-1] in load["stop_ids"]:
                break
        assert result.token_ids == expected[len(prompt) :]
        stopped = expected[-1] in load["stop_ids"]
        assert result.finish_reason == ("stop" if stopped else "length")
        assert result.cached_tokens < len(prompt)
    assert_no_block_is_leaked(engine)
    # The same again, with prefixes in the cache.
    again = run(engine, load["requests"], load["stop_ids"])
    assert {i: c.token_ids for i, c in again.items()} == {i: c.token_ids for i, c in done.items()}
    assert_no_block_is_leaked(engine)
    assert engine.stats.peak_batch <= load["max_batch_size"]
    if not load["prefix_cache"]:
        assert engine.stats.cached_tokens == 0


@pytest.mark.parametrize("blocks", [1000, 40])  # not the whole batch fits into 40
def test_waiting_sequences_are_admitted_in_groups(config_folder: Path, blocks: int) -> None:
    requests = [([i % VOCAB] * 3, 5 + i * 7 % 20) for i in range(100)]
    starts, batch = [], []
    for group_size in (0, 4):
        load = {**ROOMY, "blocks": blocks, "group_size": group_size}
        engine, runner = make_engine(config_folder, load)
        launch, counted = runner.launch, Counter[bool]()

        def counting(step: Step) -> Sampled:
            counted[bool(step.chunks)] += 1  # noqa: B023 - used only in this iteration
            return launch(step)  # noqa: B023

        runner.launch = counting  # type: ignore[method-assign]
        done = run(engine, requests)
        assert [len(done[i].token_ids) for i in range(100)] == [count for _, count in requests]
        assert_no_block_is_leaked(engine)
        starts.append(counted[True])
        assert (engine.stats.kv_full_steps > 0) == (blocks == 40)
        batch.append(engine.stats.batch_sum / engine.stats.steps)
    assert starts[1] < 0.6 * starts[0]
    assert batch[1] > 0.8 * batch[0]  # on average an eighth of the batch is missing


def test_admission_waits_for_a_group_only_for_a_few_steps(
    config_folder: Path,
) -> None:
    """Only one of 16 finishes soon, but a group of four would have to."""
    engine, _ = make_engine(config_folder, {**ROOMY, "group_size": 4})
    done = list(run(engine, [([1], 5)] + 15 * [([1], 200)] + 10 * [([1], 5)]))
    assert sorted(done[:11]) == [0, *range(16, 26)]
    assert engine.stats.gathering_steps > 0


def test_a_request_is_admitted_at_once_while_there_is_room(config_folder: Path) -> None:
    engine, _ = make_engine(config_folder, {**ROOMY, "group_size": 1})
    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    arriving = iter([Request([1], params, 0), None, None, Request([2], params, 1)])
    first, second = sorted(engine.generate(arriving), key=lambda done: done.first_token)
    assert second.first_token < first.finished


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_prior_request_waits_for_at_most_two_steps_of_others(
    config_folder: Path, lookahead: int
) -> None:
    """The others fill the batch, the token budget and the KV cache, and still complete."""
    others = [([i % VOCAB] * 60, 30) for i in range(12)]
    limits = {"blocks": 40, "max_batch_size": 4, "max_batch_tokens": 20, "lookahead": lookahead}
    alone, _ = make_engine(config_folder, {**ROOMY, **limits})
    expected = {i: done.token_ids for i, done in run(alone, others).items()}
    engine, _ = make_engine(config_folder, {**ROOMY, **limits})
    arrivals, delays = dict[int, int](), list[int]()

    def source() -> Iterator[Request | None]:
        for i, (prompt, count) in enumerate(others):
            params = SamplingParams(max_new_tokens=count, ignore_eos=True)
            yield Request(prompt, params, i, priority=1)
        for number in range(100, 110):
            for _ in range(7):
                yield None
            arrivals[number] = engine.stats.steps

            def note(token: int, number: int = number) -> None:
                if number in arrivals:
                    delays.append(engine.stats.steps - arrivals.pop(number))

            yield Request([5] * 15, SamplingParams(max_new_tokens=3), number, note)

    done = {each.request_id: each for each in engine.generate(source())}
    assert len(delays) == 10
    assert max(delays) <= 1 + lookahead  # the step in progress at the arrival comes before
    assert engine.stats.preemptions > 0
    assert {i: done[i].token_ids for i in expected} == expected
    assert_no_block_is_leaked(engine)


def test_a_cancelled_request_frees_its_blocks_at_once(config_folder: Path) -> None:
    engine, _ = make_engine(config_folder, {**ROOMY, "max_batch_size": 2, "lookahead": 1})
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    rest: list[int] = []

    def cancel(token: int) -> None:
        if not rest:
            rest.append(engine.steps.scheduler.cache.num_used)
            for request_id in (0, 2, 77):  # running, waiting, unknown
                engine.cancel(request_id)

    requests = [Request([i] * 9, params, i, cancel if i == 1 else None) for i in range(4)]
    done = {each.request_id: each for each in engine.generate(requests)}
    reasons = {i: each.finish_reason for i, each in done.items()}
    assert reasons == {0: "cancelled", 1: "length", 2: "cancelled", 3: "length"}
    assert len(done[0].token_ids) <= 2
    assert done[3].first_token < done[1].finished  # it runs in the place of the cancelled one
    assert_no_block_is_leaked(engine)


@settings(max_examples=60, deadline=None)
@given(load=loads(), at=st.integers(1, 12))
def test_a_failing_step_or_a_closed_iterator_leaks_no_block(
    config_folder: Path, load: dict, at: int
) -> None:
    engine, runner = make_engine(config_folder, load)
    runner.fail_at = at
    try:
        run(engine, load["requests"], load["stop_ids"])
    except RuntimeError as error:
        assert "device is gone" in str(error)  # noqa: PT017 - it may not happen
        assert_no_block_is_leaked(engine)
    runner.fail_at = -1
    iterator = engine.generate([Request(prompt) for prompt, _ in load["requests"]])
    next(iterator)
    iterator.close()
    assert_no_block_is_leaked(engine)
    # KV that the interrupted steps wrote in part is not found in the prefix cache.
    run(engine, load["requests"], load["stop_ids"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(load=loads(), most=st.integers(1, 12), steps=st.sampled_from([1, 128]))
def test_every_request_completes_correctly_when_steps_run_out_of_memory(
    config_folder: Path, load: dict[str, Any], most: int, steps: int
) -> None:
    expected_engine, _ = make_engine(config_folder, load)
    expected = run(expected_engine, load["requests"], load["stop_ids"])
    engine, runner = make_engine(config_folder, load)
    notices: list[str] = []
    engine.notice = notices.append
    runner.max_tokens = most
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.scheduling.scheduler._STEPS_BEFORE_GROWTH", steps)
        patch.setattr(Speculation, "_best_limit", lambda *_: load["drafts"])
        done = run(engine, load["requests"], load["stop_ids"])
    assert {i: c.token_ids for i, c in done.items()} == {
        i: c.token_ids for i, c in expected.items()
    }
    assert_no_block_is_leaked(engine)
    assert len(notices) == engine.stats.back_offs
    assert all("out of memory" in message for message in notices)
    assert engine.stats.peak_batch <= most
    assert engine.steps.scheduler.max_batch_size <= load["max_batch_size"]
    assert engine.steps.scheduler.max_batch_tokens <= load["max_batch_tokens"]


def test_drafts_that_run_out_of_memory_are_given_up(config_folder: Path) -> None:
    """Each draft token has a row, but does not count as a request of the batch."""
    load = {**ROOMY, "max_batch_size": 1, "max_batch_tokens": 64}
    requests = [([1, 2, 3, 4] * 10, 30), ([1, 2] * 10, 30), ([3] * 20, 30)]
    expected = run(make_engine(config_folder, load)[0], requests)
    engine, runner = make_engine(config_folder, load)
    engine.notice = lambda message: None
    runner.max_tokens = 1
    with patch.object(Speculation, "_best_limit", return_value=15):
        done = run(engine, requests)
    assert {i: c.token_ids for i, c in done.items()} == {
        i: c.token_ids for i, c in expected.items()
    }
    assert engine.steps.scheduler.max_batch_size == 1
    assert_no_block_is_leaked(engine)


def test_drafts_count_among_the_tokens_of_a_step(config_folder: Path) -> None:
    load = {**ROOMY, "max_batch_size": 2, "max_batch_tokens": 4}
    engine, runner = make_engine(config_folder, load)
    launch, sizes = runner.launch, []

    def measuring(step: Step) -> Sampled:
        sizes.append(step.tokens)
        return launch(step)

    runner.launch = measuring  # type: ignore[method-assign]
    with patch.object(Speculation, "_best_limit", return_value=15):
        run(engine, [([1, 2, 3, 4] * 10, 30)] * 2)
    assert engine.stats.draft_tokens > 0
    assert max(sizes) == 4


def test_limits_grow_again_when_there_is_memory(config_folder: Path) -> None:
    load = {"windows": [None], "block_size": 4, "blocks": 400, "prefix_cache": True}
    load |= {"max_batch_size": 8, "max_batch_tokens": 64}
    engine, runner = make_engine(config_folder, load)
    engine.notice = lambda message: None
    runner.max_tokens = 2
    run(engine, [([1] * 6, 4)] * 8)
    scheduler = engine.steps.scheduler
    assert (scheduler.max_batch_size, scheduler.max_batch_tokens) != (8, 64)
    backed_off = engine.stats.back_offs
    runner.max_tokens = 1 << 60
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.scheduling.scheduler._STEPS_BEFORE_GROWTH", 1)
        run(engine, [([1] * 6, 40)] * 100)
    assert (scheduler.max_batch_size, scheduler.max_batch_tokens) == (8, 64)
    assert engine.stats.back_offs == backed_off


def test_no_memory_for_one_token_is_an_error(config_folder: Path) -> None:
    load = {"windows": [None], "block_size": 4, "blocks": 40, "prefix_cache": True}
    load |= {"max_batch_size": 4, "max_batch_tokens": 64}
    engine, runner = make_engine(config_folder, load)
    engine.notice = lambda message: None
    runner.max_tokens = 0
    with pytest.raises(EngineError, match=r"out of memory in a step of one token.*kv_memory"):
        run(engine, [([1, 2, 3, 4], 5)] * 3)
    assert_no_block_is_leaked(engine)


def test_a_preempted_request_still_completes(config_folder: Path) -> None:
    load: dict[str, Any] = {
        "windows": [None],
        "block_size": 4,
        "blocks": 14,
        "max_batch_size": 4,
        "max_batch_tokens": 64,
        "prefix_cache": True,
    }
    engine, _ = make_engine(config_folder, load)
    done = run(engine, [([i] * 8, 30) for i in range(4)])
    assert engine.stats.preemptions > 0
    assert [len(done[i].token_ids) for i in range(4)] == [30] * 4


def test_a_step_is_scheduled_before_the_previous_tokens_are_known(
    config_folder: Path,
) -> None:
    load: dict[str, Any] = {
        "windows": [None],
        "block_size": 4,
        "blocks": 100,
        "max_batch_size": 3,
        "max_batch_tokens": 64,
        "prefix_cache": True,
        "lookahead": 1,
    }
    engine, runner = make_engine(config_folder, load)
    run(engine, [([1, 2, 3], 10)] * 3)
    assert runner.steps == 10
    assert runner.unread == 3 * 9
    # A request that stops is computed in one more step, whose token is dropped.
    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    done = list(engine.generate([Request([1, 2, 3], params, on_token=lambda token: True)]))
    assert [len(completion.token_ids) for completion in done] == [1]
    assert runner.steps == 12
    assert_no_block_is_leaked(engine)


def test_equal_prompts_admitted_in_one_step_share_their_blocks(config_folder: Path) -> None:
    load: dict[str, Any] = {
        "windows": [None, 6],
        "block_size": 4,
        "blocks": 100,
        "max_batch_size": 8,
        "max_batch_tokens": 200,
        "prefix_cache": True,
    }
    engine, runner = make_engine(config_folder, load)
    done = run(engine, [([1, 2, 3, 4] * 5, 1) for _ in range(8)])
    assert runner.steps == 1
    assert [done[i].cached_tokens for i in range(8)] == [0] + [16] * 7


def test_a_prefix_with_states_is_found_as_far_as_it_has_a_snapshot(config_folder: Path) -> None:
    load = {**ROOMY, "block_size": 4, "max_batch_size": 1, "prefix_cache": True, "snapshots": 1}
    engine, _ = make_engine(config_folder, load)
    prefix = [1, 2, 3, 4, 0] * 4
    cached = [
        run(engine, [([*prefix, *own], 1)])[0].cached_tokens
        # The second has blocks in common with the first, and takes the snapshot.
        for own in ([0, 0, 0], [1, 1], [2, 2, 2], [3])
    ]
    assert cached == [0, 0, 20, 20]
    # With one row, a snapshot of another prefix takes its place.
    for own in ([0], [1]):
        run(engine, [([*prefix[1:], *own], 1)])
    assert run(engine, [([*prefix, 4], 1)])[0].cached_tokens == 0
    assert_no_block_is_leaked(engine)


def test_equal_prompts_admitted_in_one_step_wait_for_a_snapshot(config_folder: Path) -> None:
    """The second takes it, the others begin a step later and from it."""
    load = {**ROOMY, "block_size": 4, "prefix_cache": True, "snapshots": 1}
    engine, runner = make_engine(config_folder, load)
    done = run(engine, [([1, 2, 3, 4] * 5, 1) for _ in range(8)])
    assert [done[i].cached_tokens for i in range(8)] == [0, 0] + [16] * 6
    assert runner.steps == 2


def test_blocks_behind_a_window_are_freed() -> None:
    cache = KVCache([LayerGroup(8, (0,))], num_blocks=20, block_size=4)
    tables = cache.new_tables()
    for at in range(200):
        assert cache.allocate(tables, at, at + 1)
        assert cache.num_used <= 3
    assert cache.capacity(max_chunk=1) > 1_000_000


def test_layers_are_grouped_so_that_blocks_are_interchangeable() -> None:
    full, short, long = KvKind(None), KvKind(4), KvKind(9)
    assert [g.layers for g in group_layers([full] * 3)] == [(0, 1, 2)]
    pairs = group_layers([short, full, short, full])
    assert pairs == [LayerGroup(4, (0, 2)), LayerGroup(None, (1, 3))]
    uneven = group_layers([full, full, full, full, long, full, full])
    assert sorted(layer for group in uneven for layer in group.layers) == list(range(7))
    assert {len(group.layers) for group in uneven} == {1}
    nearly = group_layers([full, long, full, long, full])
    assert [len(group.layers) for group in nearly] == [3, 2]


def test_blocks_have_more_layers_of_those_with_smaller_heads() -> None:
    wide, narrow = KvKind(9, 4096), KvKind(None, 2048)
    # As in Gemma 4 31B: five layers with a window for each without.
    groups = group_layers([*[wide] * 5, narrow] * 4)
    assert groups[-1] == LayerGroup(None, (5, 11, 17, 23), parts=2)
    assert {group.tensors for group in groups} == {2}
    assert sum(len(group.layers) for group in groups) == 24
    assert group_layers([wide, narrow, None, None]) == [
        LayerGroup(9, (0,)),
        LayerGroup(None, (1,), parts=2),
    ]
    # Two thirds as wide: one to a block, of which a part is unused.
    assert group_layers([wide, KvKind(None, 3000)])[1].parts == 1


def test_a_prompt_that_cannot_run_fails_alone(config_folder: Path) -> None:
    load: dict[str, Any] = {
        "windows": [None],
        "block_size": 4,
        "blocks": 40,
        "max_batch_size": 4,
        "max_batch_tokens": 64,
        "prefix_cache": True,
    }
    engine, _ = make_engine(config_folder, load)
    bad = [[], [1] * 1000, [-1], [512]]
    done = list(engine.generate([Request(p, request_id=i) for i, p in enumerate([*bad, [1, 2]])]))
    failed = {c.request_id: c.error for c in done if c.finish_reason == "error"}
    assert sorted(failed) == [0, 1, 2, 3]
    assert "empty" in str(failed[0])
    assert "1000 tokens" in str(failed[1])
    assert "vocabulary" in str(failed[2])
    assert [len(c.token_ids) > 0 for c in done if c.request_id == 4] == [True]


def test_the_kv_cache_module_does_not_use_torch() -> None:
    """It holds only integers, so that it can be tested and understood on its own."""
    import engine.scheduling.kv_cache as module

    assert not any(value is torch for value in vars(module).values())
