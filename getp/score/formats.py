"""Mode score: log-likelihood and perplexity of given texts, or of given completions of prompts.

Each text is scored in windows that the model can hold; a later window repeats the second half of
the one before, so that each token is scored once and has at least half a window before it.
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, BinaryIO

from engine import Completion, Engine, Request, SamplingParams
from getp.errors import SOME_FAILED, GetpError, NameOf, worded
from getp.files import STDIO, iter_lines, json_line, open_input, open_output, write_report
from getp.terminal import print_last_line, print_message, warn
from getp.units import counted
from tokenizer import Tokenizer, TokenizerError

_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", STDIO)


@dataclass(frozen=True)
class _Text:
    """A text to score: its token ids from position `first` on."""

    key: str
    ids: list[int] = field(default_factory=list)
    first: int = 1
    error: str | None = None


@dataclass
class _Score:
    """What is known about a text."""

    text: _Text
    missing: int = 0  # windows that are not read
    tokens: int = 0
    logprob: float = 0.0
    is_greedy: bool = True
    error: str | None = None

    def add(self, completion: Completion, ids: list[int], name_of: NameOf) -> None:
        """Add the scores of a window; ids: the tokens that are scored in it."""
        self.missing -= 1
        if completion.error is not None:
            self.error = self.error or worded(completion.error, name_of)
        entries = completion.prompt_logprobs or []
        self.tokens += len(entries)
        self.logprob += math.fsum(entry.logprob for entry in entries)
        self.is_greedy &= all(
            entry.top[0][0] == token for entry, token in zip(entries, ids, strict=False)
        )

    def values(self) -> dict[str, Any]:
        """Return the result, for JSON."""
        if self.error is not None:
            return {"id": self.text.key, "error": self.error}
        return {
            "id": self.text.key,
            "tokens": self.tokens,
            "logprob": self.logprob,
            "perplexity": perplexity(self.logprob, self.tokens),
            "is_greedy": self.is_greedy,
        }


def perplexity(logprob: float, tokens: int) -> float | None:
    """Return the perplexity of tokens with this log-likelihood; None if it is not a number."""
    if not tokens or -logprob / tokens > 700:
        return None
    return math.exp(-logprob / tokens)


class Scorer:
    """Scores the texts of a file with an engine, in flat memory, in the order of the file."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, max_length: int | None, name_of: NameOf
    ) -> None:
        """max_length: tokens of a window; None: as many as the engine allows."""
        self._engine, self._tokenizer, self._name_of = engine, tokenizer, name_of
        self._max_length = max_length
        self._running: dict[int, tuple[_Score, list[int]]] = {}  # by the id of a window's request
        self._waiting: list[_Score] = []  # in the order of the file
        self.texts = self.failed = self.tokens = self.greedy = 0
        self.first_error: str | None = None
        self.logprob = 0.0

    def scores(self, texts: Iterable[_Text]) -> Iterator[dict[str, Any]]:
        """Yield the result of each text, in order. Raises the errors of the engine."""
        self._engine.warm_up()
        with closing(self._engine.generate(self._requests(texts))) as completions:
            for completion in completions:
                score, ids = self._running.pop(completion.request_id)
                score.add(completion, ids, self._name_of)
                yield from self._complete()
        yield from self._complete()

    def _complete(self) -> Iterator[dict[str, Any]]:
        complete = list(takewhile(lambda score: not score.missing, self._waiting))
        del self._waiting[: len(complete)]
        for score in complete:
            self.texts += 1
            self.failed += score.error is not None
            self.first_error = self.first_error or score.error
            if score.error is None:
                self.tokens += score.tokens
                self.logprob += score.logprob
                self.greedy += score.is_greedy
            yield score.values()

    def _requests(self, texts: Iterable[_Text]) -> Iterator[Request]:
        longest = self._engine.max_positions
        length = min(self._max_length or longest, longest)
        number = 0
        for text in texts:
            parts = list(windows(len(text.ids), text.first, length))
            score = _Score(text, missing=len(parts), error=text.error)
            self._waiting.append(score)
            for start, end, first in parts:
                params = SamplingParams(
                    max_new_tokens=0, prompt_logprobs=1, prompt_logprobs_from=first - start
                )
                self._running[number] = score, text.ids[first:end]
                yield Request(text.ids[start:end], params, number)
                number += 1

    def summary(self) -> dict[str, Any]:
        """Return the totals."""
        return {
            "texts": self.texts,
            "failed": self.failed,
            "tokens": self.tokens,
            "logprob": self.logprob,
            "perplexity": perplexity(self.logprob, self.tokens),
            "greedy": self.greedy,
        }


def windows(tokens: int, first: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yield windows [start, end) of at most `length` tokens, and the first that each scores.

    Together they score the tokens from `first` on, each once.
    """
    at = first
    while at < tokens:
        end = min(tokens, max(length, at + max(length // 2, 1)))
        yield max(0, end - length), end, at
        at = end


def read_texts(file: BinaryIO, name: str, tokenizer: Tokenizer) -> Iterator[_Text]:
    """Yield the texts of a file: those of JSONL, or the whole file as one text."""
    if name.endswith(_JSONL):
        for index, line in enumerate(iter_lines(file)):
            if line is None or line.strip():
                yield _read_line(line, index, tokenizer)
        return
    try:
        text = file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise GetpError(f"{name} is neither JSONL nor a text in UTF-8: {error}") from error
    yield _Text("0", tokenizer.encode(text))


def _read_line(line: bytes | None, index: int, tokenizer: Tokenizer) -> _Text:
    key = f"request-{index}"
    try:
        record = _parsed(line)
        if not isinstance(record, dict):
            raise ValueError("it is not a JSON object, or too long")
        key = str(record.get("id", record.get("custom_id", key)))
        return _encoded(key, record, tokenizer)
    except (ValueError, TokenizerError) as error:
        return _Text(key, error=f"line {index + 1}: {error}")


def _parsed(line: bytes | None) -> Any:
    try:
        return json.loads(line or b"null")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON: {error}") from error


def _encoded(key: str, record: dict[str, Any], tokenizer: Tokenizer) -> _Text:
    """Encode a text, or a prompt with its completion. Raises ValueError, TokenizerError."""
    found = {name: record[name] for name in ("text", "prompt", "completion") if name in record}
    if set(found) not in ({"text"}, {"prompt", "completion"}) or not all(
        isinstance(value, str) for value in found.values()
    ):
        raise ValueError("it needs a 'text', or a 'prompt' and a 'completion', which are strings")
    if "text" in found:
        return _Text(key, tokenizer.encode(found["text"]))
    # A token may span the end of the prompt; it then belongs to the completion.
    context = tokenizer.encode(found["prompt"])
    ids = tokenizer.encode(found["prompt"] + found["completion"])
    common = zip(context, ids, strict=False)
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], common))
    return _Text(key, ids, max(length, 1))


def score_file(scorer: Scorer, source: str, output: str | None, tokenizer: Tokenizer) -> int:
    """Score a file, write a result for each text if there is an output; return the exit status.

    Raises GetpError and the errors of the engine.
    """
    with open_input(source) as file:
        results = scorer.scores(read_texts(file, source, tokenizer))
        if output is None:
            for _ in results:
                pass
        else:
            with open_output(output) as target:
                for result in results:
                    target.write(json_line(result) + b"\n")
    if scorer.first_error is not None:
        texts = counted(scorer.texts, "text")
        warn(f"{scorer.failed} of {texts} failed; the first is {scorer.first_error}")
    return SOME_FAILED if scorer.failed else 0


def print_summary(summary: dict[str, Any], output: str | None, report: str | None) -> None:
    """Print the totals, and write them to the report file if there is one."""
    if report is not None:
        write_report(report, summary)
    shown = "unknown" if summary["perplexity"] is None else f"{summary['perplexity']:.6g}"
    line = (
        f"texts: {summary['texts']} ({summary['failed']} failed), tokens scored: "
        f"{summary['tokens']}, log-likelihood: {summary['logprob']:.6f}, perplexity: {shown}"
    )
    (print_message if STDIO in (output, report) else print_last_line)(line)
