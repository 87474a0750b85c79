"""The dispatcher: every request runs, none runs twice, and no replica exceeds its capacity."""

import random
from collections.abc import Mapping
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from getp.cluster.dispatcher import Dispatcher, collect_delay_s, max_in_flight
from getp.cluster.ray_session import Resources, plan_resources
from getp.errors import UsageProblem

GPU_HOST = {"CPU": 64.0, "GPU": 8.0}


@given(
    st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 12), st.integers(0, 120), st.booleans()
)
def test_every_request_finishes_exactly_once_when_replicas_die(
    seed: int, replicas: int, size: int, total: int, in_groups: bool
) -> None:
    rng = random.Random(seed)
    dispatcher: Dispatcher[str] = Dispatcher((lambda a, b: a[:9] == b[:9]) if in_groups else None)
    most = size + size // 5 * in_groups
    held: dict[int, dict[int, str]] = {index: {} for index in range(replicas)}
    for index in held:
        dispatcher.add(index, size)
    source = iter([(n, f"request {n}") for n in range(total)])
    done: list[int] = []
    more, now, deaths = True, 0.0, 0
    while more or dispatcher.unfinished:
        now += 1
        new = list(islice(source, dispatcher.assignable))
        more = len(done) + dispatcher.unfinished + len(new) < total
        for index, items in dispatcher.assign(new, not more, now).items():
            for item in items:
                assert not any(item in each.values() for each in held.values())
                held[index][int(item.split()[1])] = item
        assert all(len(each) <= most for each in held.values())
        index = rng.randrange(replicas)
        if deaths < 20 and rng.random() < 0.3:
            assert set(dispatcher.remove(index, now)) == set(held[index])
            held[index] = {}
            dispatcher.add(index, size)
            deaths += 1
        elif held[index]:
            count = rng.randint(1, len(held[index]))
            ids = list(held[index])[:count]
            items = dispatcher.remove_finished(index, ids, now)
            assert items == [held[index].pop(each) for each in ids]
            done += ids
    assert sorted(done) == list(range(total))
    assert dispatcher.assignable == replicas * size
    assert all(busy <= now for busy in dispatcher.busy_s.values())


@pytest.mark.parametrize("size", [10, 320])
def test_a_replica_gets_all_answers_to_a_prompt_also_when_requests_finish_one_by_one(
    size: int,
) -> None:
    dispatcher: Dispatcher[int] = Dispatcher(lambda a, b: a // 2 == b // 2)
    dispatcher.add(0, size)
    dispatcher.add(1, size)
    source, rng = iter([(n, n) for n in range(1000)]), random.Random(1)
    replica_of: dict[int, int] = {}
    held: list[list[int]] = [[], []]
    while len(replica_of) < 1000:
        new = list(islice(source, dispatcher.assignable))
        for index, items in dispatcher.assign(new, False, 0.0).items():
            held[index] += items
            replica_of |= dict.fromkeys(items, index)
        index = rng.randrange(2)
        dispatcher.remove_finished(index, [held[index].pop(0)], 0.0)
    split = sum(replica_of[n] != replica_of[n + 1] for n in range(0, 1000, 2))
    assert split < 25
    assert all(len(each) > size * 0.8 for each in held)


def test_requests_are_spread_evenly_in_number_and_length() -> None:
    dispatcher: Dispatcher[int] = Dispatcher()
    for index in range(4):
        dispatcher.add(index, max_in_flight(256))
    assigned = dispatcher.assign([(n, n) for n in range(100)], True, 0.0)
    assert all(24 <= len(items) <= 27 for items in assigned.values())
    # The input is sorted by length: no replica gets only long requests.
    assert all(max(items) - min(items) > 70 for items in assigned.values())


def test_neighbouring_requests_stay_together_in_long_inputs() -> None:
    dispatcher: Dispatcher[int] = Dispatcher()
    for index in range(2):
        dispatcher.add(index, 320)
    assigned = dispatcher.assign([(n, n) for n in range(64)], False, 0.0)
    adjacent = sum(b == a + 1 for items in assigned.values() for a, b in pairwise(items))
    assert adjacent >= 45


def test_a_request_lost_with_two_replicas_runs_last_and_alone() -> None:
    dispatcher: Dispatcher[str] = Dispatcher()
    dispatcher.add(0, 3)
    requests = [(0, "poison"), (1, "near"), (2, "far")]
    assert dispatcher.assign(requests, False, 0.0) == {0: ["poison", "near", "far"]}
    assert dispatcher.remove(0, 1.0) == [0, 1, 2]
    dispatcher.add(0, 2)
    assert dispatcher.assignable == 0  # a request that was lost once comes before new ones
    assert dispatcher.assign([], False, 1.0) == {0: ["poison", "near"]}
    dispatcher.remove(0, 2.0)
    dispatcher.add(0, 4)
    assert dispatcher.assign([(3, "new")], False, 2.0) == {0: ["far", "new"]}
    assert dispatcher.assign([], True, 2.0) == {}
    dispatcher.remove_finished(0, [2, 3], 3.0)
    assert dispatcher.assign([], True, 3.0) == {0: ["poison"]}
    dispatcher.remove(0, 4.0)
    dispatcher.add(0, 4)
    assert dispatcher.assign([], True, 4.0) == {0: ["near"]}
    assert dispatcher.losses == {0: 3, 1: 2, 2: 1}


def test_busy_time_is_the_time_with_requests() -> None:
    dispatcher: Dispatcher[str] = Dispatcher()
    dispatcher.add(0, 4)
    dispatcher.assign([(0, "a"), (1, "b")], True, 10.0)
    dispatcher.remove_finished(0, [0], 11.0)
    dispatcher.remove_finished(0, [1], 13.0)
    dispatcher.assign([(2, "c")], True, 20.0)
    dispatcher.remove(0, 21.5)
    assert dispatcher.busy_s == {0: 4.5}


def test_the_driver_receives_at_most_1000_messages_per_second() -> None:
    assert all(count / collect_delay_s(count) <= 1000 for count in (1, 20, 64, 1024, 4096))


@pytest.mark.parametrize(
    ("hosts", "replicas", "device", "gpus_per_replica", "expected"),
    [
        ([GPU_HOST], None, "auto", 1, Resources(8, 1, 0)),
        ([GPU_HOST, GPU_HOST], None, "cuda", 1, Resources(16, 1, 0)),
        ([GPU_HOST], None, "auto", 2, Resources(4, 2, 0)),
        ([{"GPU": 3.0}, {"GPU": 3.0}], None, "auto", 2, Resources(2, 2, 0)),
        ([GPU_HOST], 3, "auto", 1, Resources(3, 1, 0)),
        ([GPU_HOST], None, "cpu", 1, Resources(1, 0, 64)),
        ([{"CPU": 2.0}], 4, "auto", 1, Resources(4, 0, 0.5)),
        ([{"CPU": 16.0}], 5, "cpu", 1, Resources(5, 0, 3.2)),
        ([{"CPU": 8.0}, {"CPU": 8.0}], 3, "cpu", 1, Resources(3, 0, 4)),
        ([{"CPU": 8.0}, {"CPU": 4.0}], 2, "cpu", 1, Resources(2, 0, 4)),
        ([{"CPU": 8.0}, {"CPU": 2.0}], 2, "cpu", 1, Resources(2, 0, 4)),
    ],
)
def test_gpus_and_cores_are_divided_among_replicas(
    hosts: list[Mapping[str, float]],
    replicas: int | None,
    device: str,
    gpus_per_replica: int,
    expected: Resources,
) -> None:
    assert plan_resources(hosts, replicas, device, gpus_per_replica) == expected


@pytest.mark.parametrize(
    ("hosts", "replicas", "device", "gpus_per_replica", "words"),
    [
        (
            [GPU_HOST],
            9,
            "auto",
            1,
            "replicas 9: Ray finds 8 GPUs on 1 host, enough for 8 replicas of 1 GPU each",
        ),
        ([GPU_HOST], 5, "cuda", 2, "enough for 4 replicas of 2 GPUs each"),
        ([{"CPU": 4.0}], 1, "cuda", 1, "replicas 1: Ray finds 0 GPUs"),
        ([{"CPU": 4.0}], None, "cuda", 1, "replicas auto: Ray finds 0 GPUs"),
        ([GPU_HOST], 1, "cuda:1", 1, "device cuda:1 with replicas"),
        ([{}], None, "cpu", 1, "neither GPUs nor CPUs"),
    ],
)
def test_insufficient_resources_are_refused(
    hosts: list[Mapping[str, float]],
    replicas: int | None,
    device: str,
    gpus_per_replica: int,
    words: str,
) -> None:
    with pytest.raises(UsageProblem, match=words):
        plan_resources(hosts, replicas, device, gpus_per_replica)
