"""In which order requests that wait for the engine are run. The result file keeps the input's."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from getp.job.request_reader import Failure, Task

Schedule = Literal["throughput", "first"]
"""throughput: what waits is put in the order that `together` gives; first: in the input's."""

# What a prompt must share to be of one family: a block of the KV cache is the least that is reused.
_SHARED = 16


def together(tasks: Sequence[Task | Failure]) -> list[Task | Failure]:
    """Order what waits for throughput: prompts with one beginning run one after the other.

    So the beginning is computed once and still cached when the next needs it. Families (most are
    a single prompt) go by their longest possible output, the longest first: one that is begun
    last would run on alone. What has failed needs no engine and comes before all.
    """
    failures: list[Task | Failure] = []
    families: defaultdict[tuple[int, ...], list[Task]] = defaultdict(list)
    for task in tasks:
        if isinstance(task, Failure):
            failures.append(task)
        else:
            families[tuple(task.prompt_ids[:_SHARED])].append(task)
    groups = sorted(families.values(), key=lambda group: -max(map(_longest_output, group)))
    ordered = (task for group in groups for task in sorted(group, key=_prompt))
    return [*failures, *ordered]


def _prompt(task: Task) -> list[int]:
    return task.prompt_ids


def _longest_output(task: Task) -> int:
    """The most tokens its parameters allow; without a limit, more than any."""
    params = task.params
    limits = [] if params.max_new_tokens is None else [params.max_new_tokens]
    if params.max_positions is not None:
        limits.append(params.max_positions - len(task.prompt_ids))
    return min(limits, default=1 << 60)
