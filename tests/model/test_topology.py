"""Cores, NUMA nodes and CPU quotas of machines that are described in folders."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from model.ops.cpu import bindings, huge_pages
from model.ops.cpu.packed import Packed
from model.ops.cpu.topology import Topology, usable_threads
from tests.model.ops_helpers import cpu_backend, packed_linear, rand


def machine(root: Path, sockets: int = 2, cores: int = 4) -> set[int]:
    """Describe a machine with two threads per core, numbered as Linux does; return its CPUs."""
    total = sockets * cores
    system = root / "sys/devices/system"
    for cpu in range(2 * total):
        folder = system / f"cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % total},{cpu % total + total}\n")
    for node in range(sockets):
        first = node * cores
        folder = system / f"node/node{node}"
        folder.mkdir(parents=True)
        ranges = (f"{at}-{at + cores - 1}" for at in (first, first + total))
        (folder / "cpulist").write_text(",".join(ranges) + "\n")
    return set(range(2 * total))


def test_threads_are_counted_by_physical_core(tmp_path: Path) -> None:
    topology = Topology.read(machine(tmp_path), tmp_path)
    assert topology.threads == 8
    assert topology.nodes == {
        0: [[0, 8], [1, 9], [2, 10], [3, 11]],
        1: [[4, 12], [5, 13], [6, 14], [7, 15]],
    }


def test_only_cpus_that_the_process_may_use_count(tmp_path: Path) -> None:
    machine(tmp_path)
    topology = Topology.read({2, 10, 3, 12}, tmp_path)
    assert topology.nodes == {0: [[2, 10], [3]], 1: [[12]]}
    assert topology.threads == 3
    assert Topology.read({0, 1}, tmp_path / "missing") == Topology({0: [[0], [1]]})


@pytest.mark.parametrize(
    ("lines", "files", "threads"),
    [
        ("0::/a/b\n", {"a/cpu.max": "250000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/elsewhere\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        (
            "3:cpu,cpuacct:/a\n0::/\n",
            {"cpu/a/cpu.cfs_quota_us": "400000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_a_cgroup_limits_the_threads(
    tmp_path: Path, lines: str, files: dict[str, str], threads: int
) -> None:
    cpus = machine(tmp_path)
    for name, text in {f"sys/fs/cgroup/{name}": text for name, text in files.items()}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(lines)
    assert Topology.read(cpus, tmp_path).threads == threads


def test_a_number_of_threads_that_the_user_chose_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert usable_threads(1000) == 1000
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert usable_threads(1000) < 1000
    assert usable_threads(1) == 1


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, int, list[int]]]:
    """Two NUMA nodes; the ranges of memory that are placed on them."""
    placed: list[tuple[int, int, list[int]]] = []
    topology = Topology.read(machine(tmp_path), tmp_path)
    monkeypatch.setattr(huge_pages, "topology", lambda: topology)
    monkeypatch.setattr(
        huge_pages, "_bind", lambda first, end, policy, nodes: placed.append((first, end, nodes))
    )
    return placed


def test_each_node_gets_its_part_of_a_weight(bound: list[tuple[int, int, list[int]]]) -> None:
    size = 4096 * 2048 * 2
    for shape, parts, places in [
        ((4096, 2048), 1, 2),
        ((4096, 2048), 2, 4),  # gate and up
        ((4, 1024, 2048), 1, 8),  # the outputs of each of four experts
        ((4, 1024, 2048), 2, 2),  # gate and up of experts: half of the experts each
    ]:
        bound.clear()
        data = Packed.empty(shape, False, parts).data
        ranges = [(first, end, nodes) for first, end, nodes in bound if end > data.data_ptr()]
        ranges = [each for each in ranges if each[0] < data.data_ptr() + size]
        assert [nodes for _, _, nodes in ranges] == [[0], [1]] * (places // 2)
        assert ranges[0][0] == data.data_ptr()
        assert ranges[-1][1] == data.data_ptr() + data.nbytes
        for (_, end, _), (first, _, _) in pairwise(ranges):
            assert end == first
            assert first % (1 << 21) == 0
        for first, end, _ in ranges:
            assert abs(end - first - data.nbytes / places) <= 1 << 21


def test_the_cache_is_spread_over_all_nodes(bound: list[tuple[int, int, list[int]]]) -> None:
    cache = cpu_backend(torch.bfloat16).empty_cache((2, 4, 16, 2, 64))
    assert bound == [(cache.data_ptr(), cache.data_ptr() + cache.nbytes, [0, 1])]


def test_linux_accepts_the_placement() -> None:
    memory = huge_pages.empty((1 << 22,), torch.uint8)
    first = memory.data_ptr()
    if huge_pages._bind(first, first + (1 << 20), huge_pages._PREFERRED, [0]) != 0:
        pytest.skip("this system has no NUMA policies")
    assert int(memory.sum()) == 0


def test_results_are_the_same_with_work_divided_among_nodes() -> None:
    library = bindings.library()
    if library is None:
        pytest.skip("the native kernels were not built here")
    backend = cpu_backend(torch.bfloat16)
    layer = packed_linear(backend, rand(1024, 512, seed=1, dtype=torch.bfloat16))
    x = rand(40, 512, seed=2, dtype=torch.bfloat16)
    expected = backend.linear(x, layer)
    cpus = sorted(c for cores in bindings.topology().nodes.values() for core in cores for c in core)
    try:
        bindings.set_nodes(library, [cpus[:1], cpus[-1:]])
        for _ in range(20):
            assert torch.equal(backend.linear(x, layer), expected)
    finally:
        bindings.set_nodes(library, [cpus])
