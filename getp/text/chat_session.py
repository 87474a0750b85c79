"""generate and chat: answers that stream to a terminal, one at a time."""

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine import Completion, Request, SamplingParams
from getp.errors import GetpError, Interrupted, UsageProblem
from getp.files import STANDARD, read_bytes
from getp.terminal import Screen, ctrl_c_noted, say, typed_lines
from getp.text.answer_text import Answer
from getp.text.prompts import (
    chat_template,
    encode_chat,
    encode_prompt,
    request_seed,
    system_message,
)
from tokenizer import Message, Tokenizer, TokenizerError

if TYPE_CHECKING:
    from engine import Engine

_HELP = """\
/reset        begin a new conversation
/system TEXT  set the system prompt (without TEXT: none)
/quit         leave, as Ctrl-D does
/help         this list
Ctrl-C stops an answer; what it said so far stays in the conversation."""


@dataclass(frozen=True)
class Settings:
    """How to ask."""

    params: SamplingParams  # the seed is the chat's; each answer has its own
    stops: tuple[str, ...] = ()
    chat: bool = False  # through the chat template
    system: str | None = None


@dataclass(frozen=True)
class Reply:
    """An answer that has ended."""

    text: str  # the final channel's
    completion: Completion
    interrupted: bool


def prompt_text(given: str | None) -> str:
    """Return generate's prompt: `-i`, or what is piped in. Raises GetpError."""
    if given is None and sys.stdin.isatty():
        raise UsageProblem("mode generate needs a prompt: -i/--input TEXT, or pipe it in")
    if given is None or given == STANDARD:
        try:
            given = read_bytes(STANDARD).decode("utf-8")
        except UnicodeDecodeError as error:
            raise GetpError(f"the prompt on standard input is not UTF-8: {error}") from error
        given = given.removesuffix("\n").removesuffix("\r")  # of `echo`, no part of the prompt
    if not given:
        raise UsageProblem("the prompt (-i/--input) must not be empty")
    return given


def generate(settings: Settings, text: str, tokenizer: Tokenizer, engine: "Engine") -> None:
    """Stream the answer to one prompt. Raises GetpError; Interrupted on Ctrl-C."""
    ids = encode_prompt(tokenizer, text, settings.chat, settings.system)
    with engine:
        reply = ask(settings, ids, 0, tokenizer, engine)
    if reply.completion.error is not None:
        raise GetpError(str(reply.completion.error))
    say(summary(reply))
    if reply.interrupted:
        raise Interrupted("interrupted")


def chat(settings: Settings, first: str | None, tokenizer: Tokenizer, engine: "Engine") -> None:
    """Talk until the user leaves. `first` is the first message, if it is known already."""
    chat_template(tokenizer)  # without one there is nothing to wait for
    if sys.stdin.isatty():
        say("loading the model; /help lists the commands")
    with engine:
        conversation = Conversation(settings, tokenizer, engine)
        if first:
            conversation.say(first)
        for line in typed_lines("> "):
            if not line.strip():
                continue
            if not line.startswith("/"):
                conversation.say(line)
            elif not conversation.command(line):
                return


class Conversation:
    """The turns so far. All of them are the prompt of the next; the engine's cache knows most."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer, engine: "Engine") -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._engine = engine
        self._system = settings.system
        self._turns: list[Message] = []
        self._answers = 0  # since the start: each answer samples with its own seed

    def say(self, text: str) -> None:
        """Add the user's turn and stream the answer; take the turn back if there is none."""
        self._turns.append({"role": "user", "content": text})
        try:
            reply = self._answer()
        except (GetpError, TokenizerError) as error:
            self._turns.pop()
            say(f"getp: error: {error}")
            return
        # Only the final text: a template shows no earlier thinking to the model.
        self._turns.append({"role": "assistant", "content": reply.text})
        say(summary(reply))

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; return whether the chat goes on."""
        name, _, rest = line.strip().partition(" ")
        if name == "/quit":
            return False
        if name == "/reset":
            self._turns.clear()
            say("a new conversation")
        elif name == "/system":
            self._system = rest.strip() or None
            say("system prompt set" if self._system else "no system prompt")
        elif name == "/help":
            say(_HELP)
        else:
            say(f"unknown command {name}: /help lists them")
        return True

    def _answer(self) -> Reply:
        ids = encode_chat(self._tokenizer, [*system_message(self._system), *self._turns])
        limit = self._engine.model_config.max_positions
        if self._settings.params.max_positions is not None:
            limit = min(limit, self._settings.params.max_positions)
        if len(ids) >= limit:
            limited = f"tokens long and the limit is {limit} (-n/--steps, or the model's own)"
            last = [*system_message(self._system), self._turns[-1]]
            if (alone := len(encode_chat(self._tokenizer, last))) >= limit:
                raise GetpError(f"the message alone is {alone} {limited}: make it shorter")
            raise GetpError(f"the conversation is {len(ids)} {limited}: /reset begins a new one")
        self._answers += 1
        reply = ask(self._settings, ids, self._answers, self._tokenizer, self._engine)
        if reply.completion.error is not None:
            raise GetpError(str(reply.completion.error))
        return reply


def ask(
    settings: Settings, prompt_ids: list[int], number: int, tokenizer: Tokenizer, engine: "Engine"
) -> Reply:
    """Stream one answer to standard output, its thinking to standard error."""
    answer = Answer(tokenizer, prompt_ids, settings.chat, settings.stops)
    screen = Screen(sys.stdout, sys.stderr)
    params = replace(settings.params, seed=request_seed(settings.params.seed, number))
    with ctrl_c_noted() as interrupted:

        def on_token(token_id: int) -> bool:
            screen.show(answer.push(token_id))
            return answer.stopped or interrupted()

        (completion,) = engine.generate([Request(prompt_ids, params, number, on_token)])
        pressed = interrupted()
    for piece in answer.flush():
        screen.show(piece)
    screen.end()
    return Reply(answer.text, completion, pressed)


def summary(reply: Reply) -> str:
    """Return the line under an answer: how long, how fast, and how much was known already."""
    done = reply.completion
    count, seconds = len(done.token_ids), done.finished - done.arrived
    rate = count / seconds if seconds > 0 else 0.0
    cached = f"{done.cached_tokens} of {done.prompt_tokens} prompt tokens cached"
    end = ""
    if reply.interrupted:
        end = ", stopped"
    elif done.finish_reason == "length":
        end = ", cut at the length limit"
    return f"[{count} tokens, {rate:.1f} tok/s, {cached}{end}]"
