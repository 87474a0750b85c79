"""Ray itself: a running cluster joined, or one of our own started and stopped; what it has."""

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from getp.errors import GetpError, UsageProblem

_STORE_BYTES = 128 << 20  # of Ray's object store: what travels is small


class Session:
    """A connection to Ray, while it is open. Raises UsageProblem without Ray, and GetpError.

    A process that has a connection already shares it, and keeps it.
    """

    def __init__(self, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise UsageProblem(
                "--replicas needs Ray, which is not installed: pip install 'getp[cluster]'"
            ) from None
        self.ray: Any = ray
        self._ours = not ray.is_initialized()
        self._folder: str | None = None
        if not self._ours:
            return
        given: dict[str, Any] = {"address": address}
        if address is None:
            # A short path of its own: sockets lie in it, whose paths are limited.
            self._folder = tempfile.mkdtemp(prefix="getp-ray-")
            given = {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": _STORE_BYTES,
                "_temp_dir": self._folder,
            }
        on_main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**given, logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:
            self.close()
            reason = str(error).strip().split("\n")[0]
            if address is None:
                raise GetpError(f"cannot start Ray on this host: {reason}") from error
            raise GetpError(
                f"--ray-address {address}: cannot join a Ray cluster there: {reason}; "
                "`ray start` must have been given on this host, too"
            ) from error
        except BaseException:
            self.close()
            raise
        finally:
            if on_main:  # Ray takes it for itself
                signal.signal(signal.SIGTERM, handler)

    def hosts(self) -> list[Mapping[str, float]]:
        """Return what each host of the cluster has: CPU, GPU."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def close(self) -> None:
        """Leave the cluster; stop it if it is ours."""
        if self._ours:
            self.ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class Places:
    """How many replicas run, and what each of them gets."""

    replicas: int
    gpus: int  # 0: on the CPU
    cpus: float


def find_places(
    hosts: Sequence[Mapping[str, float]], replicas: int | None, device: str, gpus_each: int = 1
) -> Places:
    """Share out what the hosts have; `replicas` None: as many as there are GPUs for, or hosts.

    On GPUs a replica gets `gpus_each` of one host; on CPUs it gets an equal share of the cores.
    Raises UsageProblem where there is not enough.
    """
    if device.startswith("cuda:"):
        raise UsageProblem(
            f"--device {device} with --replicas: each replica gets a GPU of its own; give "
            "--device cuda, and choose GPUs with CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES"
        )
    gpus = [int(host.get("GPU", 0)) for host in hosts]
    if device == "cuda" or (device == "auto" and any(gpus)):
        room = sum(count // gpus_each for count in gpus)
        if not room or (replicas or 0) > room:
            raise UsageProblem(
                f"--replicas {replicas or 'auto'}: Ray finds {sum(gpus)} GPUs on {len(hosts)} "
                f"hosts, which is room for {room} replicas of {gpus_each}"
            )
        return Places(replicas or room, gpus_each, 0)
    cores = [host["CPU"] for host in hosts if host.get("CPU")]
    if not cores:
        raise UsageProblem("--replicas: the Ray cluster has neither GPUs nor CPUs to run on")
    count = replicas or len(cores)
    # The largest share of which all find room: some host's cores over a whole number.
    shares = (int(size / k * 1e4) / 1e4 for size in set(cores) for k in range(1, count + 1))
    fitting = (s for s in shares if sum(int(size / s + 1e-9) for size in cores) >= count)
    return Places(count, 0, max(fitting))
