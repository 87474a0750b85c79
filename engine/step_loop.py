"""Runs the steps of a warm engine: schedule, launch, read tokens, back off when out of memory."""

import math
import time
import traceback
from collections import deque
from collections.abc import Callable, Set
from dataclasses import replace

import torch

from engine.errors import EngineError, RequestError
from engine.execution.matchers import Matchers
from engine.execution.model_runner import ModelRunner
from engine.execution.sampler import Sampled
from engine.memory_plan import available_bytes, format_bytes, is_out_of_memory
from engine.request import Completion, FinishReason, TokenLogprobs
from engine.resolve import Settings, dtype_name
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import MasksOfRows, Sequence, Step
from engine.stats import EngineStats
from model.ops.sampling import NO_TOKEN
from model.ops.step_parts import SCHEDULING


class StepLoop:
    """Runs the sequences of a scheduler, step by step.

    A step is launched before the tokens of up to `lookahead` earlier steps are read: on a GPU the
    next step is then queued while the current one computes.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        settings: Settings,
        stats: EngineStats,
        notice: Callable[[str], None],
        lookahead: int,
    ):
        self.scheduler = scheduler
        self.lookahead = lookahead
        self._runner, self._settings = runner, settings
        self._stats, self._notice = stats, notice
        self._launched: deque[tuple[Step, Sampled]] = deque()  # steps whose tokens are not read
        self.matchers: Matchers | None = None  # of the requests with a grammar

    @property
    def pending(self) -> int:
        """The number of launched steps whose tokens have not been read."""
        return len(self._launched)

    def run_step(self) -> list[Completion]:
        """Schedule and launch a step, and read earlier ones; returns the finished requests.

        Raises EngineError if there is not enough memory for a step of one token.
        """
        start = time.perf_counter()
        with SCHEDULING:
            step = self.scheduler.schedule()
        scheduled = time.perf_counter()
        self._stats.schedule_s += scheduled - start
        if not step.size:
            return self.read()
        done: list[Completion] = []
        step.masks = self._masks(step, done)
        try:
            sampled = self._runner.launch(step)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            done += self.read()
            self._back_off(step, error)
            return done
        self._stats.model_s += time.perf_counter() - scheduled
        self.scheduler.note_success()
        tokens = self._stats.count(step, self.scheduler)
        self._stats.launched_steps += not self._runner.captured
        self._launched.append((step, sampled))
        done += self.read(self.lookahead)
        if self.scheduler.speculation is not None:
            self.scheduler.speculation.measured(step, time.perf_counter() - scheduled)
        noted = time.perf_counter()
        self._stats.compressed_steps += self._runner.backend.note_step(tokens)
        self._stats.model_s += time.perf_counter() - noted
        return done

    def _masks(self, step: Step, done: list[Completion]) -> MasksOfRows | None:
        """What returns the masks of a step after its model has been launched; None: it has none.

        They are computed in a thread while the model runs, if every token is known. Otherwise the
        result reads earlier steps first, and adds the requests that finish with them to `done`.
        """
        found = [(s, s.row, s.matcher) for s in step.sampling() if s.matcher is not None]
        if not found:
            return None
        matchers = self.matchers
        assert matchers is not None
        if not self._launched:
            masks = matchers.begin([matcher for _, _, matcher in found])
            return lambda: ([row for _, row, _ in found], masks())

        def read_and_compute() -> tuple[list[int], torch.Tensor]:
            done.extend(self.read())
            running = [(row, matcher) for s, row, matcher in found if not s.finished]
            rows = [row for row, _ in running]
            return rows, matchers.masks([matcher for _, matcher in running])

        return read_and_compute

    def read(self, keep: int = 0) -> list[Completion]:
        """Read the launched steps, except for the last `keep`; returns the finished requests."""
        done = []
        while len(self._launched) > keep:
            step, sampled = self._launched.popleft()
            start = time.perf_counter()
            tokens, logprobs = sampled.read()
            now = time.perf_counter()
            self._stats.model_s += now - start
            ended: list[Sequence] = []
            done += self._read_prompts(step, sampled.read_scores(), ended)
            complete = {*ended}
            rejected = set[Sequence]()  # sequences with a wrong draft token; later ones are dropped
            sampled_rows = zip(step.sampling(), step.preceding_drafts(), tokens, strict=True)
            for i, (sequence, draft, token) in enumerate(sampled_rows):
                # Finished: this step was launched before its end was known.
                if sequence.finished or sequence in complete:
                    continue
                if draft is not None:
                    if sequence in rejected or sequence in ended:
                        continue
                    if sequence.tokens[-1] != draft:
                        rejected.add(sequence)
                        continue
                if token == NO_TOKEN:
                    ended.append(sequence)
                    error = _not_finite(self._settings.dtype, sequence.matcher is not None)
                    done.append(sequence.completion("error", now, error))
                    continue
                self._stats.generated_tokens += 1
                try:
                    if sequence.thinking is None:
                        reason = sequence.append(token, now)
                    else:
                        reason = self._append_forced(sequence, token, now)
                except RequestError as failure:  # its grammar cannot be used
                    ended.append(sequence)
                    done.append(sequence.completion("error", now, failure))
                    continue
                if sequence.logprobs is not None:
                    was_forced = sequence.thinking is not None and sequence.thinking.was_forced
                    own = replace(logprobs[i], logprob=0.0) if was_forced else logprobs[i]
                    sequence.logprobs.append(own)
                    if sequence.request.on_logprobs is not None:
                        sequence.request.on_logprobs(own)
                if reason is not None:
                    ended.append(sequence)
                    done.append(sequence.completion(reason, now))
                    self._stats.count_finished(done[-1])
            if self.scheduler.speculation is not None:
                self._stats.accepted_tokens += self.scheduler.speculation.settle(step)
            if ended:
                self.scheduler.finish(ended)
        return done

    def _read_prompts(
        self, step: Step, scores: list[TokenLogprobs], ended: list[Sequence]
    ) -> list[Completion]:
        """Read the scores of prompts; returns requests that finish, and adds them to `ended`."""
        done, first, now = [], 0, time.perf_counter()
        for chunk in step.chunks:
            sequence, at = chunk.sequence, chunk.scored
            own = scores[first : first + len(at)]
            first += len(at)
            if sequence.finished:
                continue
            if own:
                # A sequence that was preempted may score positions again.
                sequence.add_scores(own[sequence.unscored - at.start :])
            error = None
            if any(math.isnan(entry.logprob) for entry in own):
                error = _not_finite(self._settings.dtype, False)
            if error is not None or chunk.is_final:
                sequence.first_token = now
                ended.append(sequence)
                done.append(sequence.completion("length" if error is None else "error", now, error))
                if error is None:
                    self._stats.count_finished(done[-1])
        return done

    def _append_forced(self, sequence: Sequence, token: int, now: float) -> FinishReason | None:
        """As `Sequence.append`, for one that a thinking budget may give another token."""
        thinking = sequence.thinking
        assert thinking is not None
        reason = sequence.append(token if thinking.forced is None else thinking.forced, now)
        if thinking.was_forced or thinking.forced is not None:
            self.scheduler.forced.append(sequence)
        return reason

    def cancel_requests(self, request_ids: Set[int], compiling: list[Sequence]) -> list[Completion]:
        """Remove the sequences of these requests, as far as they are not finished.

        compiling: sequences that are not queued yet.
        """
        scheduler, now = self.scheduler, time.perf_counter()
        queued, not_queued = (
            [each for each in sequences if each.request.request_id in request_ids]
            for sequences in ((*scheduler.running, *scheduler.waiting), compiling)
        )
        scheduler.finish(queued)
        for sequence in not_queued:
            compiling.remove(sequence)
        return [sequence.completion("cancelled", now) for sequence in queued + not_queued]

    def cancel(self) -> None:
        """Remove every sequence, after an error or when the caller stops early."""
        scheduler = self.scheduler
        scheduler.finish([*scheduler.running, *scheduler.waiting])
        scheduler.cache.forget_prefixes()  # a step may have written only a part of its KV

    def clear(self) -> None:
        """Drop launched steps whose tokens are not needed: their sequences have finished."""
        self._launched.clear()

    def _back_off(self, step: Step, error: Exception) -> None:
        """Continue with smaller steps after one ran out of memory. Raises EngineError."""
        device = self._settings.device
        if not self.scheduler.back_off(step):
            raise EngineError(
                "out of memory in a step of one token; {available} are available: lower "
                "{kv_memory}, or use a smaller model or {dtype}",
                available=format_bytes(available_bytes(device)),
            ) from error
        self._stats.back_offs += 1
        # The frames in the error's traceback hold the tensors of the failed step.
        traceback.clear_frames(error.__traceback__)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self._notice(
            f"out of memory in a step (requests: {step.size}, tokens: {step.tokens}); continuing "
            f"with at most {self.scheduler.max_batch_size} requests and "
            f"{self.scheduler.max_batch_tokens} tokens per step"
        )


def _not_finite(dtype: torch.dtype, has_grammar: bool) -> RequestError:
    """The error of a request whose logits are not finite, with a remedy."""
    if has_grammar:
        return RequestError(
            "no token can be sampled: {bad_words}, {min_new_tokens} or {logit_bias} forbid every "
            "token that the {grammar} allows, or the model's logits are not finite"
        )
    remedies = {
        torch.float16: "use {dtype} bfloat16 or float32",
        torch.bfloat16: "use {dtype} float32",
    }
    remedy = remedies.get(dtype, "check that the checkpoint is intact")
    return RequestError(
        "the model's logits are not finite in {name}; " + remedy, name=dtype_name(dtype)
    )
