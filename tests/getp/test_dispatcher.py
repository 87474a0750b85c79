"""Dealing requests to replicas: nothing is lost, nothing is dealt twice, nobody gets too much."""

import random
from collections.abc import Mapping
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from getp.cluster.dispatcher import Dispatcher, linger_s, window
from getp.cluster.ray_session import Places, find_places
from getp.errors import UsageProblem

GPU_HOST = {"CPU": 64.0, "GPU": 8.0}


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 12), st.integers(0, 120))
def test_every_request_ends_once_whatever_dies(
    seed: int, replicas: int, size: int, total: int
) -> None:
    dice = random.Random(seed)
    dispatcher: Dispatcher[str] = Dispatcher()
    held: dict[int, dict[int, str]] = {index: {} for index in range(replicas)}
    for index in held:
        dispatcher.join(index, size)
    source = iter([(n, f"request {n}") for n in range(total)])
    done: list[int] = []
    more, now, deaths = True, 0.0, 0
    while more or dispatcher.unfinished:
        now += 1
        new = list(islice(source, dispatcher.wanted))
        more = len(done) + dispatcher.unfinished + len(new) < total
        for index, items in dispatcher.deal(new, not more, now).items():
            for item in items:
                assert not any(item in each.values() for each in held.values())
                held[index][int(item.split()[1])] = item
        assert all(len(each) <= size for each in held.values())
        index = dice.randrange(replicas)
        if deaths < 20 and dice.random() < 0.3:
            assert set(dispatcher.leave(index, now)) == set(held[index])
            held[index] = {}
            dispatcher.join(index, size)
            deaths += 1
        elif held[index]:
            count = dice.randint(1, len(held[index]))
            ids = list(held[index])[:count]
            items = dispatcher.finished(index, ids, now)
            assert items == [held[index].pop(each) for each in ids]
            done += ids
    assert sorted(done) == list(range(total))
    assert dispatcher.wanted == replicas * size
    assert all(busy <= now for busy in dispatcher.busy_s.values())


def test_few_requests_are_shared_out_evenly_long_ones_too() -> None:
    dispatcher: Dispatcher[int] = Dispatcher()
    for index in range(4):
        dispatcher.join(index, window(256))
    dealt = dispatcher.deal([(n, n) for n in range(100)], True, 0.0)
    assert all(24 <= len(items) <= 27 for items in dealt.values())
    # The input is in order of length, longest first: nobody has only long ones.
    assert all(max(items) - min(items) > 70 for items in dealt.values())


def test_neighbours_that_share_a_beginning_stay_together_where_there_are_many() -> None:
    dispatcher: Dispatcher[int] = Dispatcher()
    for index in range(2):
        dispatcher.join(index, 320)
    dealt = dispatcher.deal([(n, n) for n in range(64)], False, 0.0)
    together = sum(b == a + 1 for items in dealt.values() for a, b in pairwise(items))
    assert together >= 45


def test_what_two_replicas_died_with_runs_last_and_alone() -> None:
    dispatcher: Dispatcher[str] = Dispatcher()
    dispatcher.join(0, 3)
    requests = [(0, "poison"), (1, "near"), (2, "far")]
    assert dispatcher.deal(requests, False, 0.0) == {0: ["poison", "near", "far"]}
    assert dispatcher.leave(0, 1.0) == [0, 1, 2]
    dispatcher.join(0, 2)
    assert dispatcher.wanted == 0  # what was lost once comes before anything new
    assert dispatcher.deal([], False, 1.0) == {0: ["poison", "near"]}
    dispatcher.leave(0, 2.0)
    dispatcher.join(0, 4)
    assert dispatcher.deal([(3, "new")], False, 2.0) == {0: ["far", "new"]}
    assert dispatcher.deal([], True, 2.0) == {}
    dispatcher.finished(0, [2, 3], 3.0)
    assert dispatcher.deal([], True, 3.0) == {0: ["poison"]}
    dispatcher.leave(0, 4.0)
    dispatcher.join(0, 4)
    assert dispatcher.deal([], True, 4.0) == {0: ["near"]}
    assert dispatcher.lost == {0: 3, 1: 2, 2: 1}


def test_the_time_that_a_replica_had_requests_is_counted() -> None:
    dispatcher: Dispatcher[str] = Dispatcher()
    dispatcher.join(0, 4)
    dispatcher.deal([(0, "a"), (1, "b")], True, 10.0)
    dispatcher.finished(0, [0], 11.0)
    dispatcher.finished(0, [1], 13.0)
    dispatcher.deal([(2, "c")], True, 20.0)
    dispatcher.leave(0, 21.5)
    assert dispatcher.busy_s == {0: 4.5}


def test_the_driver_takes_a_bounded_number_of_messages() -> None:
    assert all(count / linger_s(count) <= 1000 for count in (1, 20, 64, 1024, 4096))


@pytest.mark.parametrize(
    ("hosts", "replicas", "device", "gpus_each", "expected"),
    [
        ([GPU_HOST], None, "auto", 1, Places(8, 1, 0)),
        ([GPU_HOST, GPU_HOST], None, "cuda", 1, Places(16, 1, 0)),
        ([GPU_HOST], None, "auto", 2, Places(4, 2, 0)),
        ([{"GPU": 3.0}, {"GPU": 3.0}], None, "auto", 2, Places(2, 2, 0)),
        ([GPU_HOST], 3, "auto", 1, Places(3, 1, 0)),
        ([GPU_HOST], None, "cpu", 1, Places(1, 0, 64)),
        ([{"CPU": 2.0}], 4, "auto", 1, Places(4, 0, 0.5)),
        ([{"CPU": 16.0}], 5, "cpu", 1, Places(5, 0, 3.2)),
        ([{"CPU": 8.0}, {"CPU": 8.0}], 3, "cpu", 1, Places(3, 0, 4)),
        ([{"CPU": 8.0}, {"CPU": 4.0}], 2, "cpu", 1, Places(2, 0, 4)),
        ([{"CPU": 8.0}, {"CPU": 2.0}], 2, "cpu", 1, Places(2, 0, 4)),
    ],
)
def test_gpus_and_cores_are_shared_out(
    hosts: list[Mapping[str, float]],
    replicas: int | None,
    device: str,
    gpus_each: int,
    expected: Places,
) -> None:
    assert find_places(hosts, replicas, device, gpus_each) == expected


@pytest.mark.parametrize(
    ("hosts", "replicas", "device", "gpus_each", "words"),
    [
        ([GPU_HOST], 9, "auto", 1, "--replicas 9: Ray finds 8 GPUs on 1 hosts, which is room for"),
        ([GPU_HOST], 5, "cuda", 2, "room for 4 replicas of 2"),
        ([{"CPU": 4.0}], 1, "cuda", 1, "--replicas 1: Ray finds 0 GPUs"),
        ([{"CPU": 4.0}], None, "cuda", 1, "--replicas auto: Ray finds 0 GPUs"),
        ([GPU_HOST], 1, "cuda:1", 1, "--device cuda:1 with --replicas"),
        ([{}], None, "cpu", 1, "neither GPUs nor CPUs"),
    ],
)
def test_more_than_there_is_is_refused(
    hosts: list[Mapping[str, float]], replicas: int | None, device: str, gpus_each: int, words: str
) -> None:
    with pytest.raises(UsageProblem, match=words):
        find_places(hosts, replicas, device, gpus_each)
