"""Jobs under random faults: `python -m tests.getp.faults FOLDER --faults 50 [--checkpoint DIR]`.

Runs a job undisturbed, then runs it again and again while it is killed, interrupted and its journal
damaged at random, until the given number of faults was injected. Every finished job must have
written the bytes of the undisturbed run. Without a checkpoint, a fake engine is used. Prints one
JSON line. The job runs in a fork, so that a fault does not cost another start of Python.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine import Engine, EngineConfig, SamplingParams
from getp.errors import GetpError
from getp.job import run as batch
from getp.job.request_reader import RequestDefaults
from tests.getp.helpers import FakeEngine, small_tokenizer

TOKENIZER = small_tokenizer()
_SIGNALS = ("SIGKILL", "SIGKILL", "SIGINT", "SIGTERM", "SIGHUP", "SIGINT twice")
_DAMAGES = ("tail cut", "tail of zeros", "bit flipped", "garbage line")


def write_input(path: Path, count: int) -> None:
    """Write a job with good and bad requests of every kind.

    None asks for log-probabilities: their last digits depend on what else is in the batch.
    """
    with open(path, "w") as file:
        for index in range(count):
            record: dict[str, Any] = {"id": index, "prompt": f"What is {index} + {index}?"}
            record["max_tokens"] = 4 + index % 13
            if index % 3 == 0:
                record["temperature"] = 0.8
            if index % 5 == 2:
                record["stop"] = "e"
            if index % 7 == 6:
                record["prompt"] = ""
            if index % 17 == 16:
                record["nonsense"] = 1
            file.write(json.dumps(record) + "\n")


def run(folder: Path, name: str, checkpoint: str | None) -> int:
    """Run the job; return its exit status. Output goes to the folder's log."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    params = SamplingParams(seed=7, max_positions=200)
    job = batch.Job(
        input=str(folder / "input.jsonl"),
        output=str(folder / name),
        checkpoint="small",
        defaults=RequestDefaults(params),
        flush_s=0.01,
        grace_s=0.05,
    )
    engine: Any = FakeEngine(_slowly)
    if (
        checkpoint
    ):  # in float32: in 16 bits, the batch can change a choice between nearly tied tokens
        engine = Engine(checkpoint, EngineConfig(dtype="float32", max_batch_size=8))
    try:
        return batch.run_job(job, batch.read(job), TOKENIZER, engine)
    except GetpError as error:
        print(f"getp: error: {error}", flush=True)
        return error.exit_code


def _slowly(prompt: Sequence[int]) -> Iterator[int]:
    for token_id in prompt:
        time.sleep(0.0005)
        yield token_id


def _forked(folder: Path, name: str, checkpoint: str | None) -> int:
    child = os.fork()
    if not child:
        status = 99
        try:
            status = run(folder, name, checkpoint)
        except KeyboardInterrupt:  # before the job handles signals
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def _damage(journal: Path, kind: str, dice: random.Random) -> bool:
    """Damage the journal like a power failure or a bad disk; return whether that was possible."""
    data = journal.read_bytes()
    first = data.find(b"\n") + 1
    if first in (0, len(data)):
        return False
    if kind == "tail cut":
        data = data[: dice.randrange(first, len(data))]
    elif kind == "tail of zeros":
        data = data[: dice.randrange(first, len(data))] + bytes(dice.randrange(1, 3000))
    elif kind == "bit flipped":
        at = dice.randrange(first, len(data))
        data = data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]
    else:
        data += dice.randbytes(20) + b"\n"
    journal.write_bytes(data)
    return True


def main() -> int:
    """Inject the faults; the exit status is 1 if a job did not survive one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, dice = options.folder, random.Random(options.seed)
    os.environ["SOURCE_DATE_EPOCH"] = "1750000000"
    write_input(folder / "input.jsonl", options.requests)
    wanted, seconds = {}, {}
    for name in ("out.jsonl", "out.txt"):
        started = time.perf_counter()
        _, status = os.waitpid(_forked(folder, name, options.checkpoint), 0)
        seconds[name] = time.perf_counter() - started
        assert os.waitstatus_to_exitcode(status) == 3, (folder / "log").read_text()
        wanted[name] = _results(folder, name)
    dealt: dict[str, int] = {}
    survived = jobs = 0
    while survived < options.faults:
        name, jobs = dice.choice(list(wanted)), jobs + 1
        pending = 0
        while True:
            child = _forked(folder, name, options.checkpoint)
            fault = dice.choice(_SIGNALS)
            time.sleep(dice.uniform(0, seconds[name] * 0.7))
            sent = 0
            for _ in range(2 if fault.endswith("twice") else 1):
                if os.waitpid(child, os.WNOHANG) == (0, 0):
                    os.kill(child, getattr(signal, fault.split()[0]))
                    sent += 1
                    time.sleep(0.005)
                else:
                    child = 0
                    break
            if child:
                _, status = os.waitpid(child, 0)
                code = os.waitstatus_to_exitcode(status)
                # 3: it had just finished. 129, 130, 143: stopped in order. Negative: killed.
                assert code in (3, 129, 130, 143, -1, -2, -9, -15), (code, fault)
            if sent:
                dealt[fault] = dealt.get(fault, 0) + 1
                pending += 1
            journal = folder / f"{name}.journal"
            if not journal.exists() and (folder / name).exists():
                break
            damage = dice.choice(_DAMAGES)
            if dice.random() < 0.3 and journal.exists() and _damage(journal, damage, dice):
                dealt[damage] = dealt.get(damage, 0) + 1
                pending += 1
        if _results(folder, name) != wanted[name]:
            (folder / "wanted").write_bytes(wanted[name][name])
            print(f"{name} differs from {folder / 'wanted'} after {dealt}", file=sys.stderr)
            return 1
        survived += pending
        for file in folder.glob(f"{name}*"):
            file.unlink()
    print(json.dumps({"jobs": jobs, "faults": sum(dealt.values()), "survived": survived, **dealt}))
    return 0


def _results(folder: Path, name: str) -> dict[str, bytes]:
    """Return every file of a finished job, so that a temporary file left behind is noticed."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if name in file.name}


if __name__ == "__main__":
    sys.exit(main())
