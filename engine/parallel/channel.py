"""Connections between the ranks: one for tensors of the device, one for messages of the host."""

import os
import pickle
from array import array
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.memory_plan import available_bytes, is_out_of_memory
from engine.parallel.step_message import StepMessage
from model.sharding import Shard

OUT_OF_MEMORY = "lower --max-batch-tokens, --max-batch-size or --kv-memory, or take more GPUs"
PEER_LOST = 3  # exit status of a rank that has lost another
NEVER = timedelta(days=365)  # ranks wait as long as a user does; a peer that dies is noticed

_STEP, _CALL = 0, 1  # what a message is
_FIRST = 4096  # int32 values that go at once; only a longer message takes a second broadcast
_TEXT = 2048  # bytes of what a rank reports of a call


class Channel:
    """A rank's connections: a shard to compute with, and messages between hosts."""

    def __init__(self, rank: int, size: int, store: Any, device: torch.device, one_host: bool):
        own, make = dist.PrefixStore("host", store), dist.ProcessGroupGloo
        self._host: Any
        if one_host:  # whose name need not lead to it
            options = make._Options()  # type: ignore[attr-defined]
            options._timeout = NEVER
            options._devices = [make.create_device(hostname="127.0.0.1")]
            self._host = make(own, rank, size, options)
        else:
            self._host = make(own, rank, size, timeout=NEVER)
        group = self._host
        if device.type == "cuda":  # on AMD, torch calls RCCL so, too
            nccl: Any = dist.ProcessGroupNCCL
            group = nccl(dist.PrefixStore("device", store), rank, size, nccl.Options())
        self._group, self._device = group, device
        self._first = dist.BroadcastOptions()
        self._first.rootRank = 0
        self.shard = Shard(rank, size, group)

    def send_step(self, work: StepMessage) -> None:
        """Rank 0 tells the others what to compute."""
        self._send(_STEP, work.packed())

    def send_call(self, name: str, args: tuple[Any, ...]) -> None:
        """Rank 0 tells the others what to do."""
        data = pickle.dumps((name, args))
        body = array("i", [len(data)])
        body.frombytes(data + bytes(-len(data) % body.itemsize))
        self._send(_CALL, body)

    def receive(self, groups: int) -> StepMessage | tuple[str, tuple[Any, ...]]:
        """What rank 0 sent; groups: block tables of a sequence."""
        kind, body = self._receive()
        if kind == _STEP:
            return StepMessage.unpacked(body, groups)
        name, args = pickle.loads(body[1:].tobytes()[: body[0]])
        return name, args

    def _send(self, kind: int, body: array) -> None:
        head = array("i", [kind, len(body)]) + body[: _FIRST - 2]
        head.extend([0] * (_FIRST - len(head)))
        self._broadcast(torch.frombuffer(head, dtype=torch.int32))
        if len(body) > _FIRST - 2:
            self._broadcast(torch.frombuffer(body[_FIRST - 2 :], dtype=torch.int32))

    def _receive(self) -> tuple[int, array]:
        head = array("i", bytes(4 * _FIRST))
        self._broadcast(torch.frombuffer(head, dtype=torch.int32))
        kind, length = head[:2]
        body = head[2 : 2 + length]
        if length > len(body):
            rest = array("i", bytes(4 * (length - len(body))))
            self._broadcast(torch.frombuffer(rest, dtype=torch.int32))
            body += rest
        return kind, body

    def _broadcast(self, values: torch.Tensor) -> None:
        self._host.broadcast([values], self._first).wait()

    def reports(self, own: str) -> list[str]:
        """Every rank's text, cut to a length."""
        text = own.encode()[:_TEXT]
        mine = torch.zeros(_TEXT, dtype=torch.uint8)
        mine[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self.shard.size)]
        self._host.allgather([every], [mine]).wait()
        return [bytes(each.tolist()).rstrip(b"\0").decode(errors="replace") for each in every]

    def least(self, own: int) -> int:
        """The smallest of every rank's numbers."""
        value, options = torch.tensor([own]), dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
        self._host.allreduce([value], options).wait()
        return int(value)

    def available(self) -> int:
        """Bytes that every rank can still allocate; those of one CPU share its memory."""
        own = available_bytes(self._device)
        return self.least(own // self.shard.size if self._device.type == "cpu" else own)

    def abort(self) -> None:
        """Break off what the device waits for."""
        if self._group is not self._host:
            self._group.abort()


def described(error: Exception) -> str:
    """What a rank reports of an error: its type, then its text."""
    remedy = f"; {OUT_OF_MEMORY}" if is_out_of_memory(error) else ""
    return f"{type(error).__name__}\n{error}{remedy}"


def is_connection(error: Exception) -> bool:
    """Whether a rank was lost, rather than that something went wrong here."""
    words = ("gloo", "NCCL", "Connection", "connection", "Broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def post(store: Any, key: str, text: str) -> None:
    """Put a text into a store, and see that it has come there: this process may end then."""
    store.set(key, text)
    store.get(key)


def torchrun_size() -> int:
    """How many processes torchrun has started together; 1 if it was not torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def torchrun_rank() -> int:
    """This process's place among them."""
    return int(os.environ["RANK"]) if torchrun_size() > 1 else 0


def torchrun_store() -> Any:
    """The store that all of them reach."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    master = not agent and torchrun_rank() == 0
    store = dist.TCPStore(host, port, is_master=master, multi_tenant=True)
    return dist.PrefixStore(f"getp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
