"""A request in the engine (Sequence) and the tokens that one step computes (Chunk, Step)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from engine.errors import RequestError
from engine.request import Completion, FinishReason, Request, TokenLogprobs
from engine.scheduling.kv_cache import BlockTables
from engine.scheduling.thinking import Thinking

if TYPE_CHECKING:
    import torch

    from engine.execution.matchers import Matcher
    from engine.scheduling.speculation import Lookup


@dataclass(eq=False, slots=True)
class Sequence:
    """A request in the engine: its tokens so far and how far their KV is computed."""

    request: Request
    tokens: list[int]  # the prompt, then the output tokens that the host has read
    max_tokens: int  # length at which it ends
    stop_ids: frozenset[int]
    block_tables: BlockTables
    arrived: float  # seconds of time.perf_counter, as first_token
    length: int = 0  # of `tokens`, plus the tokens that launched steps sample
    computed: int = 0  # tokens whose KV the launched steps compute
    row: int = -1  # while it runs: its row in the runner's block tables and last tokens
    greedy: bool = True  # the next token is the one with the largest of the model's logits
    decoding: bool = False  # the next token to compute is sampled by its last launched step
    finished: bool = False
    cached: int = 0  # prompt tokens found in the prefix cache when first admitted
    first_token: float = 0.0  # when the first output token was known; 0: not yet
    logprobs: list[TokenLogprobs] | None = None
    admitted: bool = False
    # longrope: length beyond which the sequence is recomputed with the long factors; 0: never.
    rope_context: int = 0
    snapshot_at: int = 0  # the position whose state is kept for others; 0: none
    lookup: "Lookup | None" = None  # proposes its next tokens
    stop_id: int | None = None  # that ended it
    prompt_logprobs: list[TokenLogprobs] | None = None  # those that the host has read
    next_scored: int = 0  # the first position of the prompt that no launched step scores
    thinking: Thinking | None = None
    matcher: "Matcher | None" = None  # says which tokens its grammar allows

    def __post_init__(self) -> None:
        """Derive the length and whether sampling is greedy."""
        self.length = len(self.tokens)
        params = self.request.params
        is_plain = params.logprobs is None and not params.adjusts_logits
        self.greedy = params.temperature == 0 and is_plain
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = []
        self.forget_unread_scores()
        if params.thinking is not None:
            self.thinking = Thinking(params.thinking)

    @property
    def unscored(self) -> int:
        """The first position of the prompt whose log-probability the host has not read."""
        if self.prompt_logprobs is None:
            return len(self.request.prompt_ids)
        return self.request.params.prompt_logprobs_from + len(self.prompt_logprobs)

    def add_scores(self, scores: list[TokenLogprobs]) -> None:
        """Add the log-probabilities of the prompt's next tokens."""
        if self.prompt_logprobs is not None:
            count = self.request.params.prompt_logprobs
            self.prompt_logprobs += [
                entry if len(entry.top) == count else replace(entry, top=entry.top[:count])
                for entry in scores
            ]

    def forget_unread_scores(self) -> None:
        """Let following steps score what launched steps score, which may be recomputed."""
        self.next_scored = self.unscored

    def append(self, token: int, now: float) -> FinishReason | None:
        """Add an output token; returns the finish reason if the sequence ends with it.

        Raises RequestError if its grammar cannot be used.
        """
        if self.matcher is not None:
            self.matcher.check()  # before anybody receives a token that its mask did not choose
        self.tokens.append(token)
        if self.thinking is not None:
            self.thinking.append(token)
        if not self.first_token:
            self.first_token = now
        stop_requested = self.request.on_token is not None and self.request.on_token(token)
        if token in self.stop_ids:
            self.stop_id = token
            return "stop"
        if stop_requested:
            return "stop"
        was_forced = self.thinking is not None and self.thinking.was_forced
        if self.matcher is not None and self.matcher.append(token, was_forced):
            return "stop"
        return "length" if len(self.tokens) >= self.max_tokens else None

    @property
    def priority(self) -> int:
        """The priority of the request: sequences with a lower number come first."""
        return self.request.priority

    @property
    def given_token(self) -> int | None:
        """The last token of a decode, if the host knows it or a thinking budget gives it."""
        at = self.computed - 1
        if at < len(self.tokens):
            return self.tokens[at]
        return None if self.thinking is None else self.thinking.forced

    def completion(
        self, reason: FinishReason, now: float, error: RequestError | None = None
    ) -> Completion:
        """The result that the caller receives."""
        prompt = len(self.request.prompt_ids)
        return Completion(
            request_id=self.request.request_id,
            token_ids=self.tokens[prompt:],
            finish_reason=reason,
            error=error,
            prompt_tokens=prompt,
            cached_tokens=self.cached,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            arrived=self.arrived,
            first_token=self.first_token,
            finished=now,
            stop_id=self.stop_id,
        )


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of a sequence, all known to the host, to be computed in one step."""

    sequence: Sequence
    start: int
    end: int
    samples: bool  # the step samples the sequence's next token
    # Positions of prompt tokens whose log-probabilities are computed, each from the row before.
    scored: range = range(0)

    @property
    def is_final(self) -> bool:
        """Whether the sequence ends with this chunk, as it has no output."""
        return not self.samples and self.end == self.sequence.max_tokens


@dataclass(frozen=True)
class Draft:
    """Proposed tokens, computed in the same step as the last token of a decoding sequence.

    Each is computed in a row of its own, from `first_row` on, with the sequence's block tables.
    """

    sequence: Sequence
    tokens: list[int]
    first_row: int

    @property
    def rows(self) -> range:
        """The row of each token."""
        return range(self.first_row, self.first_row + len(self.tokens))


MasksOfRows = Callable[[], tuple[list[int], "torch.Tensor"]]
"""Returns rows, and the bits of the tokens that each may sample: int32 [rows, words]."""


@dataclass
class Step:
    """One step: one token of each decoding sequence, drafts, chunks with single-token ones first.

    The token of a decoding sequence is the one that it sampled last; the host may not know it yet.
    """

    decodes: list[Sequence] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    corrected: list[Sequence] = field(default_factory=list)  # decodes whose last token is given
    # Decodes whose last token may be another than the one that their row sampled.
    forced: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    context_lens: list[int] = field(default_factory=list)  # positions with KV after the step
    changed_tables: list[Sequence] = field(default_factory=list)  # those with new blocks
    # States of recurrent layers that are copied before and after the step: (from row, to row).
    restored: list[tuple[int, int]] = field(default_factory=list)
    saved: list[tuple[int, int]] = field(default_factory=list)
    # Of rows whose sequences have a grammar; called when the model has been launched.
    masks: MasksOfRows | None = None

    @property
    def size(self) -> int:
        """The number of rows: one for each sequence and each draft token."""
        return len(self.context_lens)

    @property
    def draft_tokens(self) -> int:
        """The number of draft tokens."""
        return sum(len(draft.tokens) for draft in self.drafts)

    @property
    def tokens(self) -> int:
        """The number of tokens computed."""
        in_chunks = sum(chunk.end - chunk.start for chunk in self.chunks)
        return len(self.decodes) + self.draft_tokens + in_chunks

    def sampling(self) -> list[Sequence]:
        """The sequence of each token that the step samples; with drafts, several have the same."""
        drafted = [draft.sequence for draft in self.drafts for _ in draft.tokens]
        return self.decodes + drafted + [c.sequence for c in self.chunks if c.samples]

    def preceding_drafts(self) -> list[int | None]:
        """For each sampled token the draft token before it; None if that token is not a draft."""
        known: list[int | None] = [None] * len(self.decodes)
        known += [token for draft in self.drafts for token in draft.tokens]
        return known + [None for chunk in self.chunks if chunk.samples]
