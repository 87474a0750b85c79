"""LLM: text or conversations in, answers in the order of the input. For scripts and notebooks."""

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine import (
    Completion,
    Engine,
    EngineConfig,
    Grammar,
    Request,
    SamplingParams,
    TokenLogprobs,
)
from engine.request import FinishReason
from getp.checkpoints import embedded_model, find_model, load_tokenizer
from getp.defaults import JSONL, Defaults
from getp.errors import GetpError
from getp.hub import Part, find_checkpoint
from getp.library.arguments import (
    Prompt,
    check_samples,
    list_of_conversations,
    list_of_prompts,
    params_for_each,
    template_variables,
    tool_fields,
    tuple_of_stops,
)
from getp.openai.body import read_body
from getp.openai.parsed import BadRequestError
from getp.openai.tools import check_template
from getp.terminal import catch_ctrl_c
from getp.text.answer_text import PLAIN, AnswerOptions, StopWatcher, read_answer
from getp.text.grammars import after_thinking
from getp.text.parts.tool_bodies import ToolCall
from getp.text.prompts import chat_template, check_length, render_chat
from getp.text.samples import sample_params
from getp.units import counted
from model.generation import recommended_sampling, unsupported_generation
from tokenizer import Message, Tokenizer, TokenizerError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompletionOutput:
    """One answer to a prompt."""

    index: int  # from 0 to n - 1
    text: str  # without the stop string
    token_ids: list[int]  # the stop token included
    finish_reason: FinishReason
    reasoning: str = ""  # in a chat, of a model that marks its thinking
    tool_calls: list[ToolCall] = field(default_factory=list)  # in a chat with tools
    logprobs: list[TokenLogprobs] | None = None
    error: str | None = None  # set when finish_reason is "error"


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its answers."""

    prompt: str | None  # the text that was encoded; None if token ids were given
    prompt_token_ids: Sequence[int]
    outputs: list[CompletionOutput]
    # Of the prompt's tokens from `prompt_logprobs_from` on, if they were asked for.
    prompt_logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class _Encoded:
    text: str | None
    ids: Sequence[int]
    answer: AnswerOptions = PLAIN
    grammar: Grammar | None = None  # of calls of tools
    error: str | None = None


class LLM:
    """Runs a checkpoint on lists of prompts or conversations, with continuous batching.

        with LLM("data/model") as llm:
            for output in llm.generate(["2+2=", "3+4="], SamplingParams(max_new_tokens=8)):
                print(output.outputs[0].text)

    model: a directory or a name on the Hugging Face Hub, as on the command line; None is the
    embedded model. tokenizer: another tokenizer.json, its directory or its name on the hub.
    settings: fields of EngineConfig, such as dtype. The model is loaded at once, and freed by
    `close`, at the end of a `with` block, with the last reference to the LLM, or when the program
    ends. Raises UsageProblem, GetpError, CheckpointError, TokenizerError and EngineError.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        **settings: Any,
    ) -> None:
        config = EngineConfig(**settings)
        part: Part = "tokenizer" if config.dummy_weights else "weights"
        folder = embedded_model() if model is None else find_model(str(model), part)
        if tokenizer is not None:
            tokenizer = find_checkpoint(str(tokenizer), "tokenizer")
        self.tokenizer = load_tokenizer(tokenizer or folder)
        recommended = recommended_sampling(folder)
        for setting in unsupported_generation(folder):
            _log.warning("generation_config.json: %s is not supported; it is ignored", setting)
        given = Defaults(SamplingParams(**recommended), dict.fromkeys(recommended, "checkpoint"))
        self._default_params = given.fill(JSONL)
        self.engine = Engine(folder, config)
        self.engine.tokenizer_json = self.tokenizer.to_json
        self.engine.warm_up()
        self._running, self._closed = threading.RLock(), threading.Event()
        self._finalizer = weakref.finalize(
            self, _free, self.engine, self.tokenizer, self._running, self._closed
        )

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory and end its processes. The LLM cannot be used afterwards.

        A call that runs in another thread is ended; there it raises RuntimeError.
        """
        self._finalizer()

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        stop: str | Sequence[str] = (),
    ) -> list[RequestOutput]:
        """Complete one or several prompts; returns one result for each, in the same order.

        sampling_params: for all prompts, or one for each; None: as a JSONL request that sets none.
        n: the number of different samples of each prompt. stop: texts that end an answer. A prompt
        that cannot run has finish reason "error" and does not affect the others. Raises TypeError
        and ValueError for arguments that cannot be meant, KeyboardInterrupt at Ctrl-C; the LLM can
        be used again after any of them. Calls from several threads run one after the other.
        """
        given = list_of_prompts(prompts)
        encoders = [lambda prompt=prompt: self._encode(prompt) for prompt in given]
        return self._run(encoders, sampling_params, n, stop)

    def chat(
        self,
        messages: Sequence[Message] | Iterable[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        stop: str | Sequence[str] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] = "auto",
    ) -> list[RequestOutput]:
        """Answer a conversation, or several, with the checkpoint's chat template.

        A conversation is a list of messages such as {"role": "user", "content": "Hello"}.
        chat_template_kwargs: variables of the template, such as {"enable_thinking": False}. tools,
        tool_choice: as in a JSONL request; the calls are in `tool_calls`. The rest is as in
        `generate`.
        """
        fields = {"chat_template_kwargs": template_variables(chat_template_kwargs)}
        fields |= tool_fields(tools, tool_choice)
        given = list_of_conversations(messages)
        encoders = [lambda turns=turns: self._encode_chat(turns, fields) for turns in given]
        return self._run(encoders, sampling_params, n, stop)

    def _encode(self, prompt: Prompt) -> _Encoded:
        if not isinstance(prompt, str):
            return _Encoded(None, prompt)
        check_length(self.tokenizer, prompt, self.engine.max_positions)
        return _Encoded(prompt, self.tokenizer.encode(prompt))

    def _encode_chat(self, turns: Sequence[Message], fields: Mapping[str, Any]) -> _Encoded:
        body = read_body({"messages": [dict(turn) for turn in turns], **fields}, chat=True)
        tools, variables = body.offered_tools, body.variables
        if tools:
            check_template(chat_template(self.tokenizer))
            variables = {**variables, "tools": body.tools}
        text = render_chat(self.tokenizer, body.messages or [], variables)
        check_length(self.tokenizer, text, self.engine.max_positions)
        ids = self.tokenizer.encode(text, special=False)
        options = AnswerOptions(chat=True, tools=tools or None, **body.answer)
        return _Encoded(text, ids, options, body.params.get("grammar"))

    def _run(
        self,
        encoders: Sequence[Callable[[], _Encoded]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        n: int,
        stop: str | Sequence[str],
    ) -> list[RequestOutput]:
        self._check_open()
        params = params_for_each(sampling_params, self._default_params, len(encoders))
        stops = tuple_of_stops(stop)
        check_samples(n, params)
        prompts: list[_Encoded] = []
        found: dict[int, CompletionOutput] = {}
        scores: dict[int, list[TokenLogprobs]] = {}  # by number of the prompt
        with self._running, catch_ctrl_c() as pressed:

            def check() -> None:
                self._check_open()
                if pressed():
                    raise KeyboardInterrupt

            check()  # it may have been closed while this call waited for another one

            watchers: dict[int, StopWatcher] = {}

            def requests() -> Iterator[Request]:
                for encode, own in zip(encoders, params, strict=True):
                    check()
                    prompt = _encoded_or_error(encode)
                    first = len(prompts) * n
                    prompts.append(prompt)
                    for index in range(n if prompt.error is None else 0):
                        options = replace(prompt.answer, stops=stops, min_tokens=own.min_new_tokens)
                        watcher = StopWatcher(self.tokenizer, list(prompt.ids), options, check)
                        watchers[first + index] = watcher
                        sample = sample_params(self._with_stop_ids(own), index, n, n)
                        if prompt.grammar is not None:
                            sample = replace(sample, grammar=prompt.grammar)
                        if options.chat:
                            sample = after_thinking(sample, self.tokenizer, prompt.ids)
                        yield Request(prompt.ids, sample, first + index, watcher)

            with closing(self.engine.generate(requests())) as completions:
                for done in completions:
                    number, index = divmod(done.request_id, n)
                    watcher = watchers.pop(done.request_id)
                    if done.prompt_logprobs is not None:
                        scores[number] = done.prompt_logprobs
                    found[done.request_id] = self._output(done, index, prompts[number], watcher)
            check()
        return _in_order(prompts, found, scores, n)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError("this LLM is closed: create another one")

    def _with_stop_ids(self, params: SamplingParams) -> SamplingParams:
        """Return the parameters with the tokenizer's stop ids, unless they are ignored."""
        if params.ignore_eos:
            return params
        return replace(params, stop_ids=params.stop_ids | self.tokenizer.stop_ids)

    def _output(
        self, done: Completion, index: int, prompt: _Encoded, watcher: StopWatcher
    ) -> CompletionOutput:
        if done.error is not None or watcher.error is not None:
            return _failed(index, str(done.error or watcher.error))
        try:
            answer = read_answer(
                self.tokenizer, done.token_ids, prompt.ids, watcher.options, done.stop_id
            )
        except TokenizerError as error:
            return _failed(index, str(error))
        return CompletionOutput(
            index,
            answer.content,
            done.token_ids,
            done.finish_reason,
            answer.reasoning,
            answer.tool_calls,
            done.logprobs,
        )


def _free(
    engine: Engine, tokenizer: Tokenizer, running: "threading.RLock", closed: threading.Event
) -> None:
    closed.set()
    with running:  # the engine cannot be freed in the middle of a step
        engine.finish()
        if tokenizer.template is not None:
            tokenizer.template.close()


def _failed(index: int, error: str) -> CompletionOutput:
    return CompletionOutput(index, "", [], "error", error=error)


def _encoded_or_error(encode: Callable[[], _Encoded]) -> _Encoded:
    try:
        return encode()
    except (BadRequestError, GetpError, TokenizerError) as error:
        return _Encoded(None, (), error=str(error))


def _in_order(
    prompts: Sequence[_Encoded],
    found: Mapping[int, CompletionOutput],
    scores: Mapping[int, list[TokenLogprobs]],
    n: int,
) -> list[RequestOutput]:
    """Return the answers prompt by prompt, and log how many failed and why the first did."""
    results, errors = [], []
    for number, prompt in enumerate(prompts):
        if prompt.error is not None:
            outputs = [_failed(index, prompt.error) for index in range(n)]
        else:
            outputs = [found[number * n + index] for index in range(n)]
        if (reason := next((each.error for each in outputs if each.error), None)) is not None:
            errors.append(f"prompt {number}: {reason}")
        results.append(RequestOutput(prompt.text, prompt.ids, outputs, scores.get(number)))
    if errors:
        _log.warning("%s failed; %s", counted(len(errors), "prompt"), errors[0])
    return results
