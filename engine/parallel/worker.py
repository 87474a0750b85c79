"""A rank that is not the first: a process that does what rank 0 says.

Started by rank 0 (`python -m engine.parallel.worker RANK SIZE PORT DEVICE`) or by torchrun.
"""

import contextlib
import os
import signal
import sys
import threading
from typing import Any

import torch
import torch.distributed as dist

from engine.decode_graphs import Capture, gpu_capture
from engine.memory_plan import is_out_of_memory
from engine.model_runner import ModelRunner
from engine.parallel.channel import (
    NEVER,
    PEER_LOST,
    Channel,
    described,
    is_connection,
    post,
    torchrun_rank,
    torchrun_size,
    torchrun_store,
)
from engine.parallel.step_message import StepMessage
from engine.resolve import choose_dtype
from engine.stats import EngineStats
from model import load_config


def serve(link: Channel, device: torch.device) -> None:
    """Do what rank 0 says until it says "end". Raises what goes wrong in a step."""
    runner: ModelRunner | None = None
    capture: Capture | None = None
    while True:
        told = link.receive(0 if runner is None else len(runner.groups))
        if isinstance(told, StepMessage):
            assert runner is not None
            runner.compute(told, {})
            continue
        name, args = told
        if name == "end":
            # Rank 0 waits to hear that this has come, and may be gone before it hears us.
            with contextlib.suppress(RuntimeError):
                link.reports("")
            return
        report = ""
        try:
            if name == "make":
                checkpoint, dtype, threads = args
                if device.type == "cpu":
                    torch.set_num_threads(threads)
                config = load_config(checkpoint)
                runner = ModelRunner(config, device, choose_dtype(dtype, dtype, device), link.shard)
            elif name == "available":
                link.available()
            elif name == "prepare_capture":
                capture = gpu_capture(EngineStats())  # rank 0 counts for all
            elif name == "capture":
                assert runner is not None
                assert capture is not None
                runner.capture(capture, *args)
            else:
                getattr(runner, name)(*args)
        except Exception as error:
            if is_connection(error) or is_out_of_memory(error):
                raise  # the others may be waiting for a result that will not come
            report = described(error)
        link.reports(report)


def serve_torchrun() -> None:
    """Be the rank that torchrun made this process; returns when rank 0 is through."""
    store = torchrun_store()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    store.wait(["device"], NEVER)
    kind = store.get("device").decode()
    if kind != "none":
        device = _device(kind, int(os.environ["LOCAL_RANK"]))
        _serve_as(torchrun_rank(), torchrun_size(), store, device, one_host=False)


def dismiss_torchrun() -> None:
    """Let ranks that torchrun started, and that rank 0 did not need, end."""
    store = torchrun_store()
    if not store.check(["device"]):
        post(store, "device", "none")


def _device(kind: str, number: int) -> torch.device:
    return torch.device(kind, number) if kind == "cuda" else torch.device(kind)


def _serve_as(rank: int, size: int, store: Any, device: torch.device, one_host: bool) -> None:
    """Be a rank to the end of its process; an error is left in the store for rank 0."""
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store.set(f"here/{rank}", "")
        serve(Channel(rank, size, store, device, one_host), device)
    except Exception as error:
        if is_connection(error):
            os._exit(PEER_LOST)
        text = described(error).replace("\n", ": ", 1)
        if not one_host:  # torchrun ends rank 0 perhaps before it can say why
            print(f"getp: rank {rank}: {text}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            post(store, f"error/{rank}", text)
        os._exit(1)
    os._exit(0)  # there is nothing to clean up, and threads that wait need not be woken


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(PEER_LOST)


def main() -> None:
    """Be the process that `Ranks` starts: RANK SIZE PORT DEVICE."""
    # Ctrl-C and a service's stop go to the whole group: rank 0 decides what comes of them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    rank, size, port = map(int, sys.argv[1:4])
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    _serve_as(rank, size, store, _device(sys.argv[4], rank), one_host=True)


if __name__ == "__main__":
    main()
