"""The cores that this process may use: physical cores by NUMA node, and the cgroup's CPU quota."""

import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Topology:
    """Physical cores by NUMA node, each of them as its logical CPUs."""

    nodes: dict[int, list[list[int]]]
    quota: int | None = None
    """The number of CPUs whose time a cgroup grants, rounded up; None: all."""

    @property
    def threads(self) -> int:
        """The number of threads that the cores are used well by: one each, within the quota.

        Two threads on one core share its arithmetic and its path to memory.
        """
        cores = sum(len(cores) for cores in self.nodes.values())
        return max(1, cores if self.quota is None else min(cores, self.quota))

    @classmethod
    def read(cls, allowed: set[int], root: Path = Path("/")) -> "Topology":
        """Read the topology of the CPUs `allowed` from Linux's files under `root`.

        Where a file is missing, each CPU counts as a core and all of them as node 0.
        """
        system = root / "sys/devices/system"
        node_of = {
            cpu: int(folder.name.removeprefix("node"))
            for folder in sorted((system / "node").glob("node[0-9]*"))
            for cpu in _cpu_list(folder / "cpulist")
        }
        nodes: dict[int, list[list[int]]] = {}
        left = set(allowed)
        for cpu in sorted(allowed):
            if cpu not in left:
                continue
            siblings = _cpu_list(system / f"cpu/cpu{cpu}/topology/thread_siblings_list")
            core = sorted({cpu} | set(siblings) & left)
            left -= set(core)
            nodes.setdefault(node_of.get(cpu, 0), []).append(core)
        return cls(nodes, _quota(root))


@functools.cache
def topology() -> Topology:
    """Return the topology of the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return Topology.read(os.sched_getaffinity(0))
    return Topology.read(set(range(os.cpu_count() or 1)))


def usable_threads(configured: int) -> int:
    """Return how many threads to use: `configured` if the user chose it, else one per core."""
    if "OMP_NUM_THREADS" in os.environ:
        return configured
    return min(configured, topology().threads)


def _cpu_list(path: Path) -> list[int]:
    """Read a list as "0-3,8"; empty if there is none."""
    try:
        parts = [part.split("-") for part in path.read_text().strip().split(",") if part]
        return [cpu for part in parts for cpu in range(int(part[0]), int(part[-1]) + 1)]
    except (OSError, ValueError):
        return []


def cgroups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Yield the folders of this process's cgroup with a controller, and of those around it.

    Version 2 or 1. In a container the cgroup's path may be that of the host, which is not mounted.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = mount / path.strip("/")
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(mount))


def _quota(root: Path) -> int | None:
    """Return the smallest CPU quota of this process's cgroups."""
    quotas = [quota for folder in cgroups("cpu", root) for quota in _quota_of(folder)]
    return math.ceil(min(quotas)) if quotas else None


def _quota_of(cgroup: Path) -> list[float]:
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = (
                (cgroup / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        return [] if quota in ("max", "-1") else [int(quota) / int(period)]
    except (OSError, ValueError):
        return []
