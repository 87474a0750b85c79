"""LLM: calls that Ctrl-C, another thread or `close` interrupts."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from engine import SamplingParams
from getp import LLM

PROMPTS = ["What is 17 plus 25?", "12+7=", "Sort the numbers 3 1 2.", "3+4="]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32", max_batch_size=3, kv_memory=32 << 20) as llm:
        yield llm


def texts(llm: LLM, prompts: str | list[str]) -> list[str]:
    outputs = llm.generate(prompts, SamplingParams(max_new_tokens=8))
    return [output.outputs[0].text for output in outputs]


def test_ctrl_c_stops_a_call_and_the_llm_can_be_used_again(llm: LLM) -> None:
    endless = SamplingParams(ignore_eos=True)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS * 50, endless)
    timer.join()
    assert llm.engine.steps.scheduler.cache.num_used == 0
    assert texts(llm, "3+4=")


def test_it_works_in_another_thread_and_inside_an_event_loop(llm: LLM) -> None:
    expected = texts(llm, PROMPTS)

    async def cell() -> list[str]:  # a notebook runs its cells inside an event loop
        here = texts(llm, PROMPTS)
        return here + await asyncio.to_thread(texts, llm, PROMPTS)

    assert asyncio.run(cell()) == expected * 2


def test_calls_from_several_threads_run_one_after_the_other(llm: LLM) -> None:
    expected = texts(llm, PROMPTS)

    async def cells() -> list[list[str]]:
        calls = [asyncio.to_thread(texts, llm, PROMPTS) for _ in range(4)]
        return await asyncio.gather(*calls)

    assert asyncio.run(cells()) == [expected] * 4


def test_closing_an_llm_ends_a_call_in_another_thread() -> None:
    llm = LLM(device="cpu", dtype="float32", kv_memory=8 << 20)
    errors: list[str] = []

    def run(started: threading.Event) -> None:
        started.set()
        try:
            llm.generate(PROMPTS * 200, SamplingParams(ignore_eos=True))
        except RuntimeError as error:
            errors.append(str(error))

    started = [threading.Event(), threading.Event()]  # the second call waits for the first
    threads = [threading.Thread(target=run, args=(event,)) for event in started]
    for thread, event in zip(threads, started, strict=True):
        thread.start()
        event.wait()
    while not llm.engine.stats.generated_tokens:
        time.sleep(0.001)
    llm.close()
    assert llm.engine._steps is None
    for thread in threads:
        thread.join(60)
    assert errors == ["this LLM is closed: create another one"] * 2
