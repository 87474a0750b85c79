"""LLM: text or messages in, answers in the order of the input."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import Request, SamplingParams
from getp import LLM
from getp.errors import UsageProblem
from getp.text.prompts import encode_chat
from tokenizer import ChatTemplate
from tokenizer.chat import _sandbox

ROOT = Path(__file__).parents[2]
PROMPTS = ["What is 17 plus 25?", "12+7=", "Sort the numbers 3 1 2.", "3+4="]
SHORT = SamplingParams(max_new_tokens=8)
HOT = SamplingParams(temperature=50, max_new_tokens=8, ignore_eos=True)
CONVERSATION = [{"role": "user", "content": "What is 17 plus 25?"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32", max_batch_size=3, kv_memory=32 << 20) as llm:
        yield llm


def texts(llm: LLM, prompts: Any, params: SamplingParams = SHORT, **options: Any) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(prompts, params, **options)]


def python(program: str, *, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_answers_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS * 3, SHORT)
    assert [output.prompt for output in outputs] == PROMPTS * 3
    for output in outputs:
        ids = llm.tokenizer.encode(str(output.prompt))
        assert output.prompt_token_ids == ids
        params = SamplingParams(max_new_tokens=8, stop_ids=llm.tokenizer.stop_ids)
        (alone,) = llm.engine.generate([Request(ids, params)])
        (answer,) = output.outputs
        assert answer.token_ids == alone.token_ids
        assert answer.finish_reason == alone.finish_reason
        assert answer.text == llm.tokenizer.decode(alone.token_ids)


def test_one_text_or_one_list_of_token_ids_is_one_prompt(llm: LLM) -> None:
    (text,) = llm.generate(PROMPTS[0], SHORT)
    (ids,) = llm.generate(llm.tokenizer.encode(PROMPTS[0]), SHORT)
    assert text.outputs == ids.outputs
    assert ids.prompt is None
    assert llm.generate([]) == []
    assert texts(llm, iter(PROMPTS[:2])) == texts(llm, PROMPTS[:2])


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_arrays_and_tensors_of_token_ids_are_prompts(llm: LLM, array: Any) -> None:
    ids = llm.tokenizer.encode("3+4=")
    expected = llm.generate(ids, SHORT)
    assert llm.generate(array(ids), SHORT) == expected
    assert llm.generate([array(ids)], SHORT) == expected
    assert llm.generate(array([ids, ids]), SHORT) == expected * 2
    with pytest.raises(TypeError, match=r"prompt 0 must be .*, not 1\.0"):
        llm.generate(array([1.0, 2.0]))


def test_chat_applies_the_chat_template(llm: LLM) -> None:
    follow_up = [*CONVERSATION, {"role": "assistant", "content": "42"}, *CONVERSATION]
    one, two = llm.chat([CONVERSATION, follow_up], SHORT)
    assert one.prompt_token_ids == encode_chat(llm.tokenizer, CONVERSATION)
    assert two.prompt_token_ids == encode_chat(llm.tokenizer, follow_up)
    assert one.prompt == "<|start|>user<|message|>What is 17 plus 25?<|end|><|start|>assistant"
    assert llm.chat(CONVERSATION, SHORT) == [one]


def test_chat_keeps_reasoning_apart_from_the_answer(llm: LLM) -> None:
    (output,) = llm.chat(CONVERSATION)
    (answer,) = output.outputs
    assert answer.text == "42"
    assert answer.finish_reason == "stop"
    assert answer.reasoning
    assert "<|" not in answer.text + answer.reasoning


def test_parts_of_a_message_and_template_variables_are_read_as_in_a_job(llm: LLM) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is 17 plus 25?"}]}]
    assert llm.chat(parts, SHORT) == llm.chat(CONVERSATION, SHORT)
    (output,) = llm.chat(CONVERSATION, SHORT, chat_template_kwargs={"add_generation_prompt": False})
    assert str(output.prompt).endswith("<|end|>")


def test_an_answer_ends_before_a_stop_text(llm: LLM) -> None:
    (whole,) = texts(llm, ["12+7="])
    assert len(whole) > 2
    (answer,) = llm.generate(["12+7="], SHORT, stop=whole[1])[0].outputs
    assert answer.text == whole[: whole.index(whole[1])]
    assert answer.finish_reason == "stop"
    assert texts(llm, ["12+7="], stop=["no such text", whole[1]]) == [answer.text]


def test_samples_of_a_prompt_differ_and_share_its_kv(llm: LLM) -> None:
    prompt = " ".join(["What is 17 plus 25?"] * 20)
    before = llm.engine.stats.cached_tokens
    (output,) = llm.generate([prompt], HOT, n=4)
    assert [answer.index for answer in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 4
    shared = len(output.prompt_token_ids) // 16 * 16
    assert llm.engine.stats.cached_tokens - before >= 3 * (shared - 16)


def test_samples_with_a_seed_repeat_and_begin_with_the_only_one(llm: LLM) -> None:
    seeded = SamplingParams(temperature=50, max_new_tokens=8, ignore_eos=True, seed=3)
    three, again = (llm.generate(PROMPTS, seeded, n=3) for _ in range(2))
    assert three == again
    assert [output.outputs[:1] for output in three] == [
        output.outputs for output in llm.generate(PROMPTS, seeded)
    ]
    assert len({tuple(answer.token_ids) for answer in three[0].outputs}) == 3


def test_each_prompt_can_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(max_new_tokens=count, ignore_eos=True) for count in (1, 5, 3)]
    outputs = llm.generate(PROMPTS[:3], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 3]


def test_log_probabilities_are_in_the_answer(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=3, ignore_eos=True, logprobs=2)
    (answer,) = llm.generate("3+4=", params)[0].outputs
    assert answer.logprobs is not None
    assert [len(each.top) for each in answer.logprobs] == [2, 2, 2]


def test_a_prompt_that_cannot_run_fails_alone(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    long = "1 " * llm.engine.max_positions
    with caplog.at_level(logging.WARNING):
        outputs = llm.generate([PROMPTS[0], long, "", "\ud800", PROMPTS[1]], SHORT)
    assert [output.outputs[0].finish_reason for output in outputs[1:4]] == ["error"] * 3
    assert "leaves no room for output" in str(outputs[1].outputs[0].error)
    assert "the prompt is empty" in str(outputs[2].outputs[0].error)
    assert "surrogate" in str(outputs[3].outputs[0].error)
    assert "3 prompts failed; prompt 1: the prompt has" in caplog.text
    answered = [outputs[0].outputs[0].text, outputs[4].outputs[0].text]
    assert answered == texts(llm, PROMPTS[:2])


def test_a_conversation_that_cannot_be_rendered_fails_alone(llm: LLM) -> None:
    bad: list[Any] = [{"role": "user", "content": 5}]
    good, failed = llm.chat([CONVERSATION, bad], SHORT, n=1)
    assert good.outputs[0].finish_reason != "error"
    assert "'content'" in str(failed.outputs[0].error)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate(None), "prompts must be a text or a list of texts, not None"),
        (lambda llm: llm.generate({"prompt": "a"}), "prompts must be a text"),
        (lambda llm: llm.generate(["a", None]), "prompt 1 must be a text or a list of token ids"),
        (lambda llm: llm.generate([1.5]), "prompt 0 must be a text"),
        (lambda llm: llm.generate(CONVERSATION), r"use chat\(\) for messages"),
        (lambda llm: llm.generate("a", 0.8), "sampling_params must be SamplingParams, not 0.8"),
        (lambda llm: llm.generate("a", {"n": 1}), "sampling_params must be SamplingParams"),
        (lambda llm: llm.generate("a", ["b"]), "sampling_params must be SamplingParams, not 'b'"),
        (lambda llm: llm.generate("a", n="2"), "n must be an integer, not '2'"),
        (lambda llm: llm.generate("a", stop=5), "stop must be a text or a list of texts, not 5"),
        (lambda llm: llm.generate("a", stop=[5]), "stop must be a text"),
        (lambda llm: llm.chat("hello"), 'must be a list of messages such as {"role": "user"'),
        (lambda llm: llm.chat(CONVERSATION[0]), "messages must be a list of messages"),
        (lambda llm: llm.chat(["hello"]), "conversation 0 must be a list of messages"),
        (
            lambda llm: llm.chat(CONVERSATION, chat_template_kwargs=5),
            "chat_template_kwargs must be",
        ),
        (lambda llm: llm.chat(CONVERSATION, chat_template_kwargs={1: 2}), "must be a dict"),
        (lambda llm: llm.chat([CONVERSATION, "b"]), "conversation 1 must be .*, not 'b'"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(llm: LLM, call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(llm)
    assert texts(llm, "3+4=")


def test_chat_takes_tools(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    properties = {"a": {"enum": [17, 25]}}
    parameters = {"properties": properties, "required": ["a"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "add", "parameters": parameters}}
    with pytest.raises(TypeError, match="tools must be a list of tools, not 'add'"):
        llm.chat(CONVERSATION, tools="add")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tool 1 is not a function"):
        llm.chat(CONVERSATION, tools=[{}])
    with pytest.raises(ValueError, match="'tool_choice' needs 'tools'"):
        llm.chat(CONVERSATION, tool_choice="required")
    (refused,) = llm.chat(CONVERSATION, tools=[tool])
    assert "does not use tools" in str(refused.outputs[0].error)
    source = llm.tokenizer.template.source if llm.tokenizer.template else ""
    template = ChatTemplate("{% if tools %}{% endif %}" + source)
    monkeypatch.setattr(llm.tokenizer, "template", template)
    named = {"type": "function", "function": {"name": "add"}}
    (output,) = llm.chat(
        CONVERSATION, SamplingParams(max_new_tokens=90), tools=[tool], tool_choice=named
    )
    ((call,),) = (each.tool_calls for each in output.outputs)
    assert call.recipient == "add"
    assert json.loads(call.arguments)["a"] in (17, 25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate("a", HOT, n=0), "n must be 1 or more, not 0"),
        (lambda llm: llm.generate("a", SHORT, n=2), "n=2 needs a temperature above 0"),
        (
            lambda llm: llm.generate("a", [SHORT, HOT]),
            "as many sampling_params as prompts: 2 for 1",
        ),
        (lambda llm: llm.generate("a", stop=""), "stop must not be empty"),
    ],
)
def test_values_that_cannot_be_meant_are_named(llm: LLM, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(llm)
    assert texts(llm, "3+4=")


def test_a_checkpoint_that_is_missing_is_refused_as_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match=r"nothing' does not exist.*Hugging Face Hub"):
        LLM(tmp_path / "nothing")
    with pytest.raises(UsageProblem, match="is not a Hugging Face model directory"):
        LLM(tmp_path)
    with pytest.raises(TypeError, match="tensor_parallel_size"):
        LLM(tensor_parallel_size=2)


def test_closing_an_llm_ends_the_process_for_chat_templates() -> None:
    with LLM(device="cpu", dtype="float32", kv_memory=8 << 20) as llm:
        llm.chat(CONVERSATION, SHORT)
        assert _sandbox._process is not None
    assert _sandbox._process is None


def test_the_checkpoint_recommends_the_sampling(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model"
    shutil.copytree(ROOT / "data" / "model", model)
    recommended = {"do_sample": True, "temperature": 50.0, "max_new_tokens": 5, "typical_p": 0.1}
    file = model / "generation_config.json"
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | recommended))
    with LLM(model, device="cpu", dtype="float32", kv_memory=8 << 20) as llm:
        (output,) = llm.generate("3+4=", n=3)
        assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3
        assert all(len(answer.token_ids) <= 5 for answer in output.outputs)
        assert len(llm.generate("3+4=", SHORT)[0].outputs[0].token_ids) <= 8
    assert "typical_p 0.1 is not supported; it is ignored" in caplog.text


def test_a_closed_llm_says_so() -> None:
    llm = LLM(device="cpu", dtype="float32", kv_memory=8 << 20)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("a")


_TWO_RANKS = """
    import os, sys
    from getp import LLM, SamplingParams

    def main():
        llm = LLM(device="cpu", dtype="float32", tensor_parallel=2, kv_memory=8 << 20)
        llm.chat([{{"role": "user", "content": "3+4="}}], SamplingParams(max_new_tokens=1))
        from tokenizer.chat import _sandbox
        ranks = [process.pid for process in llm.engine.workers.processes]
        print(os.getpid(), *ranks, _sandbox._process.pid)
        print(llm.generate("3+4=", SamplingParams(max_new_tokens=2))[0].outputs[0].finish_reason)
        {end}

    main()
    {after}
"""


@pytest.mark.parametrize(
    ("end", "after"),
    [
        ("llm.close()", "print('closed')"),
        ("del llm", "print('deleted')"),
        ("global kept; kept = llm", ""),  # still open when the program ends
        ("raise SystemExit(0)", ""),
    ],
)
def test_no_process_is_left_over(end: str, after: str) -> None:
    lines = python(_TWO_RANKS.format(end=end, after=after)).splitlines()
    pids = [int(pid) for pid in lines[0].split()]
    assert len(pids) == 3  # this process, the other rank and the one for chat templates
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_examples_of_the_readme_run() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## From Python") : readme.index("## Benchmarks")]
    llm_example, engine_example = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    answers = python(llm_example).splitlines()
    assert answers[:2] == ["42", "26"]
    assert len(answers) >= 5
    assert python(engine_example) == "0 42\n"
