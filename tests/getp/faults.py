"""Fault injection: `python -m tests.getp.faults FOLDER --faults 50 [--checkpoint DIR]`.

Runs a job undisturbed, then repeatedly kills and interrupts it and damages its journal at random,
until the given number of faults has been injected. Every finished job must have written the bytes
of the undisturbed run. Without a checkpoint, a fake engine is used. Prints one JSON line. The job
runs in a fork, so that a fault does not require another start of Python.
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
from getp.job import run as job_run
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
    job = job_run.Job(
        input=str(folder / "input.jsonl"),
        output=str(folder / name),
        checkpoint="small",
        defaults=RequestDefaults(params),
        flush_s=0.01,
        grace_s=0.05,
    )
    engine: Any = FakeEngine(_echo_slowly)
    if checkpoint:
        # In 16 bits, the batch can change a choice between nearly tied tokens.
        engine = Engine(checkpoint, EngineConfig(dtype="float32", max_batch_size=8))
    try:
        return job_run.run_job(job, job_run.read(job), TOKENIZER, engine)
    except GetpError as error:
        print(f"getp: error: {error}", flush=True)
        return error.exit_code


def _echo_slowly(prompt: Sequence[int]) -> Iterator[int]:
    for token_id in prompt:
        time.sleep(0.0005)
        yield token_id


def _run_in_fork(folder: Path, name: str, checkpoint: str | None) -> int:
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


def _damage_journal(journal: Path, kind: str, rng: random.Random) -> bool:
    """Damage the journal like a power failure or a bad disk; return whether it had a record."""
    data = journal.read_bytes()
    first = data.find(b"\n") + 1
    if first in (0, len(data)):
        return False
    if kind == "tail cut":
        data = data[: rng.randrange(first, len(data))]
    elif kind == "tail of zeros":
        data = data[: rng.randrange(first, len(data))] + bytes(rng.randrange(1, 3000))
    elif kind == "bit flipped":
        at = rng.randrange(first, len(data))
        data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    else:
        data += rng.randbytes(20) + b"\n"
    journal.write_bytes(data)
    return True


def _send_signal(child: int, fault: str) -> bool:
    """Send the signal once or twice and wait for the job; return whether it was still running."""
    for sent in range(2 if fault.endswith("twice") else 1):
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return sent > 0
        os.kill(child, getattr(signal, fault.split()[0]))
        time.sleep(0.005)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    # 3: it had just finished. 129, 130, 143: stopped gracefully. Negative: killed.
    assert code in (3, 129, 130, 143, -1, -2, -9, -15), (code, fault)
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
    folder, rng = options.folder, random.Random(options.seed)
    os.environ["SOURCE_DATE_EPOCH"] = "1750000000"
    write_input(folder / "input.jsonl", options.requests)
    expected, seconds = {}, {}
    for name in ("out.jsonl", "out.txt"):
        started = time.perf_counter()
        _, status = os.waitpid(_run_in_fork(folder, name, options.checkpoint), 0)
        seconds[name] = time.perf_counter() - started
        assert os.waitstatus_to_exitcode(status) == 3, (folder / "log").read_text()
        expected[name] = _results(folder, name)
    injected: dict[str, int] = {}
    survived = jobs = 0
    while survived < options.faults:
        name, jobs = rng.choice(list(expected)), jobs + 1
        pending = 0
        while True:
            child = _run_in_fork(folder, name, options.checkpoint)
            fault = rng.choice(_SIGNALS)
            time.sleep(rng.uniform(0, seconds[name] * 0.7))
            if _send_signal(child, fault):
                injected[fault] = injected.get(fault, 0) + 1
                pending += 1
            journal = folder / f"{name}.journal"
            if not journal.exists() and (folder / name).exists():
                break
            damage = rng.choice(_DAMAGES)
            if rng.random() < 0.3 and journal.exists() and _damage_journal(journal, damage, rng):
                injected[damage] = injected.get(damage, 0) + 1
                pending += 1
        if _results(folder, name) != expected[name]:
            (folder / "expected").write_bytes(expected[name][name])
            print(f"{name} differs from {folder / 'expected'} after {injected}", file=sys.stderr)
            return 1
        survived += pending
        for file in folder.glob(f"{name}*"):
            file.unlink()
    print(
        json.dumps(
            {"jobs": jobs, "faults": sum(injected.values()), "survived": survived, **injected}
        )
    )
    return 0


def _results(folder: Path, name: str) -> dict[str, bytes]:
    """Return every file of a finished job, so that a temporary file left behind is noticed."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if name in file.name}


if __name__ == "__main__":
    sys.exit(main())
