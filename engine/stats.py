"""Counters of the engine, for reports."""

from dataclasses import asdict, dataclass

from engine.request import Completion
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Step


@dataclass
class EngineStats:
    """Counters since the engine was made; times in seconds."""

    steps: int = 0
    launched_steps: int = 0  # those whose operations were launched one by one, not replayed
    prompt_tokens: int = 0  # of finished requests
    cached_tokens: int = 0  # of these, found in the prefix cache
    output_tokens: int = 0
    generated_tokens: int = 0  # output tokens so far, those of unfinished requests included
    compressed_steps: float = 0.0  # for each, the share of dense weights that it read in 12 bits
    preemptions: int = 0
    back_offs: int = 0  # steps that ran out of memory and were rolled back
    batch_sum: int = 0  # sequences in a step, summed over steps
    peak_batch: int = 0
    kv_blocks: int = 0
    kv_bytes: int = 0
    peak_kv_blocks: int = 0
    used_kv_blocks: int = 0  # at the last step, like the next two
    running: int = 0  # sequences
    waiting: int = 0
    decode_tokens: int = 0  # computed in rows of their own: of decodes, drafts, short chunks
    draft_tokens: int = 0  # proposed by speculation and computed
    accepted_tokens: int = 0  # draft tokens that were also sampled
    decode_context: int = 0  # positions attended to by decode tokens, ignoring windows
    prefill_chunks: int = 0  # chunks of more than one token
    prefill_tokens: int = 0
    prefill_context: int = 0  # context lengths at the ends of the chunks, summed
    kv_full_steps: int = 0  # steps in which requests waited only for free blocks
    gathering_steps: int = 0  # steps in which requests waited to be admitted as a group
    short_steps: int = 0  # steps with room for more requests than there were
    schedule_s: float = 0.0
    model_s: float = 0.0  # launching and waiting for steps, sampling included
    warm_up_s: float = 0.0  # includes load_s, compile_s and capture_s
    check_s: float = 0.0  # checking and timing kernels, before warm-up
    load_s: float = 0.0  # reading the weights onto the device
    compile_s: float = 0.0  # first runs of steps, which compile the GPU's kernels
    capture_s: float = 0.0  # capturing decode steps as graphs, without compiling
    inference_s: float = 0.0
    cpu_wait_s: float = 0.0  # of it: the longest that a thread was ready to run but had no core
    finish_s: float = 0.0

    def since(self, before: "EngineStats") -> "EngineStats":
        """The difference to an earlier copy; peaks and sizes keep their value."""
        kept = (
            "peak_batch",
            "kv_blocks",
            "kv_bytes",
            "peak_kv_blocks",
            "used_kv_blocks",
            "running",
            "waiting",
        )
        return EngineStats(
            **{
                name: value if name in kept else value - getattr(before, name)
                for name, value in asdict(self).items()
            }
        )

    def count(self, step: Step, scheduler: Scheduler) -> int:
        """Count a step that was launched, and return the number of its tokens."""
        self.steps += 1
        sequences = step.size - step.draft_tokens
        self.batch_sum += sequences
        self.peak_batch = max(self.peak_batch, sequences)
        self.used_kv_blocks = scheduler.cache.num_used
        self.running, self.waiting = len(scheduler.running), len(scheduler.waiting)
        self.peak_kv_blocks = max(self.peak_kv_blocks, self.used_kv_blocks)
        self.preemptions = scheduler.preemptions
        computed = len(step.decodes) + step.draft_tokens
        self.draft_tokens += step.draft_tokens
        self.decode_tokens += computed
        self.decode_context += sum(step.context_lens[:computed])
        for chunk in step.chunks:
            tokens = chunk.end - chunk.start
            computed += tokens
            if tokens == 1:
                self.decode_tokens += 1
                self.decode_context += chunk.end
            else:
                self.prefill_chunks += 1
                self.prefill_tokens += tokens
                self.prefill_context += chunk.end
        limits = scheduler.max_batch_size, scheduler.max_batch_tokens
        if len(scheduler.running) < limits[0] and computed < limits[1]:
            if not scheduler.waiting:
                self.short_steps += 1
            elif scheduler.gathering:
                self.gathering_steps += 1
            elif scheduler.lacks_blocks:
                self.kv_full_steps += 1
        return computed

    def count_finished(self, completion: Completion) -> None:
        """Count a request that has finished."""
        self.prompt_tokens += completion.prompt_tokens
        self.cached_tokens += completion.cached_tokens
        self.output_tokens += len(completion.token_ids)
