"""A rank other than 0: a process that computes its share of each step that rank 0 sends.

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

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.execution.capture import Capture, GpuCapture
from engine.execution.model_runner import ModelRunner
from engine.memory_plan import is_out_of_memory
from engine.parallel.channel import (
    NO_TIMEOUT,
    PEER_LOST,
    Channel,
    error_report,
    is_connection_error,
    store_text,
    torchrun_rank,
    torchrun_size,
    torchrun_store,
)
from engine.parallel.step_message import StepMessage
from engine.resolve import choose_dtype, load_model_config
from engine.stats import EngineStats
from model.adapters import AdapterList


def run(channel: Channel, device: torch.device) -> None:
    """Execute the messages of rank 0 until "end". Raises the exception of a step that fails."""
    runner: ModelRunner | None = None
    capture: Capture | None = None
    while True:
        message = channel.receive(0 if runner is None else len(runner.groups))
        if isinstance(message, StepMessage):
            assert runner is not None
            runner.compute(message, {})
            continue
        name, args = message
        if name == "end":
            # Rank 0 waits for this report, but may exit before the exchange completes here.
            with contextlib.suppress(RuntimeError):
                channel.gather_reports("")
            return
        report = ""
        try:
            if name == "make_runner":
                runner = _make_runner(channel, device, *args)
            elif name == "available":
                channel.available()
            elif name == "prepare_capture":
                capture = GpuCapture(EngineStats())  # only rank 0's times are reported
            elif name == "capture":
                assert runner is not None
                assert capture is not None
                runner.capture(capture, *args)
            else:
                getattr(runner, name)(*args)
        except Exception as error:
            if is_connection_error(error) or is_out_of_memory(error):
                raise  # other ranks may wait for a collective that will not happen
            report = error_report(error)
        channel.gather_reports(report)


def _make_runner(
    channel: Channel,
    device: torch.device,
    checkpoint: str,
    dtype: str,
    kv_dtype: str,
    quantize: str | None,
    adapters: AdapterList,
    threads: int,
) -> ModelRunner:
    if device.type == "cpu":
        torch.set_num_threads(threads)
    given = EngineConfig(kv_dtype=kv_dtype, quantize=quantize, adapter=tuple(adapters))
    config = load_model_config(checkpoint, given)
    runner = ModelRunner(config, device, choose_dtype(dtype, dtype, device), channel.shard)
    runner.exchange_reports = channel.gather_reports
    return runner


def serve_torchrun() -> None:
    """Run as the rank that torchrun gave this process; returns when rank 0 is done."""
    store = torchrun_store()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    store.wait(["device"], NO_TIMEOUT)
    kind = store.get("device").decode()
    if kind != "none":
        device = _device(kind, int(os.environ["LOCAL_RANK"]))
        _run_and_exit(torchrun_rank(), torchrun_size(), store, device, one_host=False)


def dismiss_torchrun() -> None:
    """Let the ranks that torchrun started exit, if rank 0 has not used them."""
    store = torchrun_store()
    if not store.check(["device"]):
        store_text(store, "device", "none")


def _device(kind: str, index: int) -> torch.device:
    return torch.device(kind, index) if kind == "cuda" else torch.device(kind)


def _run_and_exit(rank: int, size: int, store: Any, device: torch.device, one_host: bool) -> None:
    """Run as a rank, then exit the process; an error is put into the store for rank 0."""
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store.set(f"here/{rank}", "")
        run(Channel(rank, size, store, device, one_host), device)
    except Exception as error:
        if is_connection_error(error):
            os._exit(PEER_LOST)
        text = error_report(error).replace("\n", ": ", 1)
        if not one_host:  # torchrun may end rank 0 before it can report this error
            print(f"getp: rank {rank}: {EngineError(text)}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            store_text(store, f"error/{rank}", text)
        os._exit(1)
    os._exit(0)  # nothing needs cleaning up, and waiting threads would delay a normal exit


def _exit_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(PEER_LOST)


def main() -> None:
    """Run as a process that `WorkerPool` starts: RANK SIZE PORT DEVICE."""
    # Ctrl-C and a service's stop signal reach the whole process group; rank 0 handles them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    rank, size, port = map(int, sys.argv[1:4])
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    _run_and_exit(rank, size, store, _device(sys.argv[4], rank), one_host=True)


if __name__ == "__main__":
    main()
