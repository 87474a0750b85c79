"""A connection to Ray, and the resources that its hosts offer to replicas."""

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from getp.errors import GetpError, UsageProblem
from getp.units import counted

_WAIT_S = 1.0  # between calls of `waiting`
_OBJECT_STORE_BYTES = 128 << 20  # small, because getp sends only requests and results


class RaySession:
    """A connection to a running Ray cluster, or to one that this session starts and stops.

    If the process is already connected to Ray, that connection is used and left open. address: of
    a running cluster; None: start one. Raises UsageProblem if Ray is not installed, and GetpError.
    """

    def __init__(self, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise UsageProblem(
                "{replicas} needs Ray, which is not installed: pip install '{package}'",
                package="getp[cluster]",
            ) from None
        self.ray: Any = ray
        self._owned = not ray.is_initialized()
        self._folder: str | None = None
        if not self._owned:
            return
        options: dict[str, Any] = {"address": address}
        if address is None:
            # Ray's sockets are in this folder, and the length of socket paths is limited.
            self._folder = tempfile.mkdtemp(prefix="getp-ray-")
            options = {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_temp_dir": self._folder,
            }
        on_main_thread = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options, logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:
            self.close()
            reason = str(error).strip().split("\n")[0]
            if address is None:
                raise GetpError(f"cannot start Ray on this host: {reason}") from error
            raise GetpError(
                "{ray_address} {address}: cannot join a Ray cluster there: {reason}; run "
                "`ray start` on this host first",
                address=address,
                reason=reason,
            ) from error
        except BaseException:
            self.close()
            raise
        finally:
            if on_main_thread:  # ray.init replaces the handler
                signal.signal(signal.SIGTERM, handler)

    def plan(self, replicas: int | None, device: str, gpus_per_replica: int) -> "Resources":
        """Divide the resources of the cluster, as `plan_resources`; leave it on an error."""
        try:
            hosts = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
            return plan_resources(hosts, replicas, device, gpus_per_replica)
        except BaseException:
            self.close()
            raise

    def actor(self, kind: type, resources: "Resources", *args: Any) -> Any:
        """Start an actor of a class with the resources of a replica; return its handle."""
        gpus = {"num_gpus": resources.gpus} if resources.gpus else {}
        actor = self.ray.remote(kind).options(
            num_cpus=resources.cpus, max_concurrency=2, scheduling_strategy="SPREAD", **gpus
        )
        return actor.remote(*args)

    def result(self, reference: Any, waiting: Callable[[], None]) -> Any:
        """Return the result of a remote call; call `waiting` now and then until it is there.

        Raises the exception of the call, and GetpError if its process died.
        """
        while not self.ray.wait([reference], timeout=_WAIT_S)[0]:
            waiting()
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, Exception):
                raise cause from None
            raise GetpError(f"a replica died: {death_reason(error)}") from error

    def close(self) -> None:
        """Leave the cluster; stop it if it was started here."""
        if self._owned:
            self.ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class Resources:
    """The number of replicas, and the resources of each."""

    replicas: int
    gpus: int  # 0: on the CPU
    cpus: float


def plan_resources(
    hosts: Sequence[Mapping[str, float]],
    replicas: int | None,
    device: str,
    gpus_per_replica: int = 1,
) -> Resources:
    """Divide the resources of the hosts; `replicas` None: one per set of GPUs, or per host.

    On GPUs a replica gets `gpus_per_replica` GPUs of one host; on CPUs it gets an equal share of
    the cores. Raises UsageProblem if there is not enough.
    """
    if device.startswith("cuda:"):
        raise UsageProblem(
            "{device} {given} with {replicas}: each replica gets its own GPU; use {device} cuda, "
            "and select GPUs with CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES",
            given=device,
        )
    gpus = [int(host.get("GPU", 0)) for host in hosts]
    if device == "cuda" or (device == "auto" and any(gpus)):
        possible = sum(count // gpus_per_replica for count in gpus)
        if not possible or (replicas or 0) > possible:
            raise UsageProblem(
                "{replicas} {given}: Ray finds {gpus} on {hosts}, enough for {possible} of {each} "
                "each",
                given=replicas or "auto",
                gpus=counted(sum(gpus), "GPU"),
                hosts=counted(len(hosts), "host"),
                possible=counted(possible, "replica"),
                each=counted(gpus_per_replica, "GPU"),
            )
        return Resources(replicas or possible, gpus_per_replica, 0)
    cores = [host["CPU"] for host in hosts if host.get("CPU")]
    if not cores:
        raise UsageProblem(
            "{replicas}: the {cluster} has neither GPUs nor CPUs to run on", cluster="Ray cluster"
        )
    count = replicas or len(cores)
    # The largest share that fits all replicas: it is some host's cores divided by an integer.
    shares = (int(size / k * 1e4) / 1e4 for size in set(cores) for k in range(1, count + 1))
    fitting = (s for s in shares if sum(int(size / s + 1e-9) for size in cores) >= count)
    return Resources(count, 0, max(fitting))


def death_reason(error: BaseException) -> str:
    """Return the reason for a replica's death in one line, from Ray's long message."""
    text = " ".join(str(error).split())
    if "The actor is dead because " in text:
        text = text.split("The actor is dead because ")[1].split(" Some common causes")[0]
    else:
        text = f"{type(error).__name__}: {text}"
    return text[:400]
