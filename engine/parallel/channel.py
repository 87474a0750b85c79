"""Connections between ranks: device collectives for tensors, host broadcasts for messages."""

import os
import pickle
from array import array
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import EngineError
from engine.memory_plan import available_bytes, is_out_of_memory
from engine.parallel.step_message import StepMessage
from model.sharding import Shard

OUT_OF_MEMORY_REMEDY = "lower {max_batch_tokens}, {max_batch_size} or {kv_memory}, or use more GPUs"
PEER_LOST = 3  # exit status of a rank whose connection to another rank broke
NO_TIMEOUT = timedelta(days=365)  # idle ranks wait long; dead ones are detected by other means

_STEP, _CALL = 0, 1  # kinds of message
_FIRST_BROADCAST = 4096  # int32 values of the first broadcast; longer messages need a second one
_REPORT_BYTES = 2048  # a rank's report of a call is truncated to this size


class Channel:
    """A rank's connections to the others: collectives of its shard, and messages between hosts."""

    def __init__(self, rank: int, size: int, store: Any, device: torch.device, one_host: bool):
        """Connect to the other ranks, which must do so at the same time.

        store: a torch.distributed store that all ranks use.
        """
        host_store, make = dist.PrefixStore("host", store), dist.ProcessGroupGloo
        self._host: Any
        if one_host:  # the host name may not resolve to an address of this host
            options = make._Options()  # type: ignore[attr-defined]
            options._timeout = NO_TIMEOUT
            options._devices = [make.create_device(hostname="127.0.0.1")]
            self._host = make(host_store, rank, size, options)
        else:
            self._host = make(host_store, rank, size, timeout=NO_TIMEOUT)
        group = self._host
        if device.type == "cuda":  # torch uses this name for RCCL, too
            nccl: Any = dist.ProcessGroupNCCL
            group = nccl(dist.PrefixStore("device", store), rank, size, nccl.Options())
        self._group, self._device = group, device
        self._from_rank_0 = dist.BroadcastOptions()
        self._from_rank_0.rootRank = 0
        self.shard = Shard(rank, size, group)

    def send_step(self, message: StepMessage) -> None:
        """Send a step from rank 0 to all others."""
        self._send(_STEP, message.packed())

    def send_call(self, name: str, args: tuple[Any, ...]) -> None:
        """Send a call (a name and its arguments) from rank 0 to all others."""
        data = pickle.dumps((name, args))
        body = array("i", [len(data)])
        body.frombytes(data + bytes(-len(data) % body.itemsize))
        self._send(_CALL, body)

    def receive(self, groups: int) -> StepMessage | tuple[str, tuple[Any, ...]]:
        """Wait for the next step or call from rank 0; groups: block tables of each sequence."""
        kind, body = self._receive()
        if kind == _STEP:
            return StepMessage.unpacked(body, groups)
        name, args = pickle.loads(body[1:].tobytes()[: body[0]])
        return name, args

    def _send(self, kind: int, body: array) -> None:
        head = array("i", [kind, len(body)]) + body[: _FIRST_BROADCAST - 2]
        head.extend([0] * (_FIRST_BROADCAST - len(head)))
        self._broadcast(torch.frombuffer(head, dtype=torch.int32))
        if len(body) > _FIRST_BROADCAST - 2:
            self._broadcast(torch.frombuffer(body[_FIRST_BROADCAST - 2 :], dtype=torch.int32))

    def _receive(self) -> tuple[int, array]:
        head = array("i", bytes(4 * _FIRST_BROADCAST))
        self._broadcast(torch.frombuffer(head, dtype=torch.int32))
        kind, length = head[:2]
        body = head[2 : 2 + length]
        if length > len(body):
            rest = array("i", bytes(4 * (length - len(body))))
            self._broadcast(torch.frombuffer(rest, dtype=torch.int32))
            body += rest
        return kind, body

    def _broadcast(self, values: torch.Tensor) -> None:
        self._host.broadcast([values], self._from_rank_0).wait()

    def gather_reports(self, report: str) -> list[str]:
        """All-gather a text per rank; returns the texts by rank, truncated to a fixed size."""
        text = report.encode()[:_REPORT_BYTES]
        own = torch.zeros(_REPORT_BYTES, dtype=torch.uint8)
        own[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        all_texts = [torch.empty_like(own) for _ in range(self.shard.size)]
        self._host.allgather([all_texts], [own]).wait()
        return [bytes(each.tolist()).rstrip(b"\0").decode(errors="replace") for each in all_texts]

    def minimum(self, own: int) -> int:
        """The smallest of the numbers that the ranks pass."""
        value, options = torch.tensor([own]), dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
        self._host.allreduce([value], options).wait()
        return int(value)

    def available(self) -> int:
        """Bytes that every rank can still allocate; ranks on a CPU share its memory equally."""
        own = available_bytes(self._device)
        return self.minimum(own // self.shard.size if self._device.type == "cpu" else own)

    def abort(self) -> None:
        """Abort the collectives that the device waits for."""
        if self._group is not self._host:
            self._group.abort()


def error_report(error: Exception) -> str:
    """The report of an error: its type, a newline, and its text, with settings in braces."""
    text = error.template() if isinstance(error, EngineError) else str(error)
    remedy = f"; {OUT_OF_MEMORY_REMEDY}" if is_out_of_memory(error) else ""
    return f"{type(error).__name__}\n{text}{remedy}"


def is_connection_error(error: Exception) -> bool:
    """Whether the error means that the connection to another rank broke."""
    words = ("gloo", "NCCL", "Connection", "connection", "Broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def store_text(store: Any, key: str, text: str) -> None:
    """Put a text into a store and wait until it has arrived, so that this process may exit."""
    store.set(key, text)
    store.get(key)


def torchrun_size() -> int:
    """The number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def torchrun_rank() -> int:
    """This process's rank among those that torchrun started; 0 without torchrun."""
    return int(os.environ["RANK"]) if torchrun_size() > 1 else 0


def torchrun_store() -> Any:
    """The store that is shared by the processes that torchrun started."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    master = not agent and torchrun_rank() == 0
    store = dist.TCPStore(host, port, is_master=master, multi_tenant=True)
    return dist.PrefixStore(f"getp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
