"""Streams answers to the terminal: for a single prompt, or in a chat."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

from engine import Completion, Request, SamplingParams
from getp.errors import GetpError, Interrupted, NameOf, worded
from getp.terminal import catch_ctrl_c, print_message, warn
from getp.text.answer_text import PLAIN, AnswerOptions, AnswerText
from getp.text.chat_input import chat_input
from getp.text.parts.thinking import thinking_budget
from getp.text.prompts import (
    encode_chat,
    encode_prompt,
    request_seed,
    system_message,
    unused_variables,
)
from getp.text.screen import Screen
from tokenizer import Message, Tokenizer, TokenizerError

if TYPE_CHECKING:
    from engine import Engine

_HELP = """\
/reset        start a new conversation
/system TEXT  set the system prompt (without TEXT: remove it)
/quit         end the chat (also Ctrl-D)
/help         show this list
Ctrl-C stops an answer; the part that was shown stays in the conversation."""
_COMMAND = re.compile(r"/[a-z]*(?=\s|$)")  # not a path or a comment


@dataclass(frozen=True)
class ChatSettings:
    """The settings for generating answers."""

    params: SamplingParams  # the seed is the chat's; each answer derives its own from it
    answer: AnswerOptions = PLAIN
    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the chat template
    thinking_budget: int | None = None  # tokens
    name_of: NameOf = str  # how messages name settings


@dataclass(frozen=True)
class Reply:
    """A finished answer."""

    text: str  # the text of the final channel
    completion: Completion
    interrupted: bool


def generate(settings: ChatSettings, text: str, tokenizer: Tokenizer, engine: "Engine") -> None:
    """Stream the answer to one prompt. Raises GetpError; Interrupted on Ctrl-C."""
    if settings.answer.chat:
        _note_unused(tokenizer, settings)
    ids = encode_prompt(tokenizer, text, settings.answer.chat, settings.system, settings.variables)
    with engine:
        reply = stream_answer(settings, ids, 0, tokenizer, engine)
    _check(reply, settings)
    print_message(summary(reply))
    if reply.interrupted:
        raise Interrupted("interrupted")


def chat(settings: ChatSettings, first: str | None, tokenizer: Tokenizer, engine: "Engine") -> None:
    """Chat until the user quits. `first` is the first message, if it is already known."""
    _note_unused(tokenizer, settings)  # fails before the model loads
    with chat_input() as messages:
        if messages.help:
            print_message("loading the model; type /help for the commands")
        with engine:
            conversation = Conversation(settings, tokenizer, engine, messages.collect)
            if first:
                conversation.send(first)
            for text in messages:
                if not _COMMAND.match(text.strip()):
                    conversation.send(text)
                elif not conversation.command(text, messages.help):
                    return


class Conversation:
    """The turns so far. The next prompt contains all of them; the prefix cache holds most of it."""

    def __init__(
        self,
        settings: ChatSettings,
        tokenizer: Tokenizer,
        engine: "Engine",
        on_token: Callable[[], None],
    ) -> None:
        """on_token: called after each token of an answer."""
        self._settings = settings
        self._on_token = on_token
        self._tokenizer = tokenizer
        self._engine = engine
        self._system = settings.system
        self._turns: list[Message] = []
        self._answers = 0  # number of answers so far; each has its own seed

    def send(self, text: str) -> None:
        """Add the user's turn, unless it is blank, and stream the answer.

        The turn is removed if there is no answer.
        """
        if not text.strip():
            return
        self._turns.append({"role": "user", "content": text})
        try:
            reply = self._answer()
        except (GetpError, TokenizerError) as error:
            self._turns.pop()
            print_message(f"getp: error: {worded(error, self._settings.name_of)}")
            return
        # Only the final text, because chat templates omit the reasoning of earlier answers.
        self._turns.append({"role": "assistant", "content": reply.text})
        print_message(summary(reply))

    def command(self, line: str, editor_help: str = "") -> bool:
        """Run a command that begins with a slash; return whether the chat continues."""
        name, rest = (*line.strip().split(maxsplit=1), "")[:2]
        if name == "/quit":
            return False
        if name == "/reset":
            self._turns.clear()
            print_message("new conversation")
        elif name == "/system":
            self._system = rest.strip() or None
            print_message("system prompt set" if self._system else "system prompt removed")
        elif name == "/help":
            print_message(f"{_HELP}\n{editor_help}".strip())
        else:
            print_message(f"unknown command {name}; type /help")
        return True

    def _answer(self) -> Reply:
        ids = self._encode(self._turns)
        limit = self._engine.max_positions
        if self._settings.params.max_positions is not None:
            limit = min(limit, self._settings.params.max_positions)
        if len(ids) >= limit:
            self._refuse(len(ids), limit)
        self._answers += 1
        reply = stream_answer(
            self._settings, ids, self._answers, self._tokenizer, self._engine, self._on_token
        )
        _check(reply, self._settings)
        return reply

    def _encode(self, turns: Sequence[Message]) -> list[int]:
        messages = [*system_message(self._system), *turns]
        return encode_chat(self._tokenizer, messages, self._settings.variables)

    def _refuse(self, tokens: int, limit: int) -> NoReturn:
        """Raise GetpError for a prompt that leaves no room for an answer."""
        fields = {"limit": limit, "model": self._engine.model_config.max_positions}
        longer = ""
        if limit < self._engine.max_positions:
            longer = " or start the chat with {max_positions} 0 for the model's limit of {model}"
        elif limit < fields["model"]:
            longer = " or start the chat with more {kv_memory} (the model's limit is {model})"
        alone = len(self._encode(self._turns[-1:]))
        if alone >= limit:
            raise GetpError(
                "the message alone is {tokens} tokens long and the limit is {limit} tokens: make "
                "it shorter" + longer,
                tokens=alone,
                **fields,
            )
        raise GetpError(
            "the conversation is {tokens} tokens long and the limit is {limit} tokens: start a new "
            "one with /reset" + longer,
            tokens=tokens,
            **fields,
        )


def _note_unused(tokenizer: Tokenizer, settings: ChatSettings) -> None:
    """Say which variables the template does not use. Raises GetpError without a usable template."""
    for name in unused_variables(tokenizer, settings.variables):
        warn(f"this model's chat template does not use {name!r}: it is ignored")


def _check(reply: Reply, settings: ChatSettings) -> None:
    """Raise GetpError if the answer failed."""
    error = reply.completion.error
    if error is not None:
        raise GetpError(worded(error, settings.name_of))


def stream_answer(
    settings: ChatSettings,
    prompt_ids: list[int],
    number: int,
    tokenizer: Tokenizer,
    engine: "Engine",
    after_token: Callable[[], None] = lambda: None,
) -> Reply:
    """Stream one answer to standard output, its reasoning to standard error.

    after_token: called after each token.
    """
    answer = AnswerText(tokenizer, prompt_ids, settings.answer)
    screen = Screen(sys.stdout, sys.stderr)
    params = replace(settings.params, seed=request_seed(settings.params.seed, number))
    if settings.thinking_budget is not None:
        budget = thinking_budget(tokenizer, prompt_ids, settings.thinking_budget)
        params = replace(params, thinking=budget)
    with catch_ctrl_c() as interrupted:

        def on_token(token_id: int) -> bool:
            for piece in answer.push(token_id):
                screen.show(piece)
            after_token()
            return answer.stopped or interrupted()

        (completion,) = engine.generate([Request(prompt_ids, params, number, on_token)])
        pressed = interrupted()
    for piece in answer.flush():
        screen.show(piece)
    screen.end()
    return Reply(answer.text, completion, pressed)


def summary(reply: Reply) -> str:
    """Return the line below an answer: its length, its speed and the cached part of the prompt."""
    done = reply.completion
    count, seconds = len(done.token_ids), done.finished - done.arrived
    rate = count / seconds if seconds > 0 else 0.0
    cached = f"{done.cached_tokens} of {done.prompt_tokens} prompt tokens cached"
    end = ""
    if reply.interrupted:
        end = ", stopped"
    elif done.finish_reason == "length":
        end = ", truncated at the length limit"
    elif not reply.text:
        end = ", the answer is empty"
    return f"[{count} tokens, {rate:.1f} tok/s, {cached}{end}]"
