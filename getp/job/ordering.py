"""The order in which waiting requests run. The result file is always in input order."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from getp.defaults import NO_LIMIT
from getp.job.formats.interface import Failure, JobRequest

Schedule = Literal["throughput", "first"]
"""throughput: waiting requests run in the order of `order_for_throughput`; first: input order."""

# Length of the common prefix by which prompts are grouped: a KV cache block (the unit of reuse).
_SHARED_TOKENS = 16


def order_for_throughput(requests: Sequence[JobRequest | Failure]) -> list[JobRequest | Failure]:
    """Order waiting requests: those with a common prefix run one after the other.

    Their prefix is then computed once and is still cached for the next one. Groups (most hold a
    single request) are sorted by their longest possible output, longest first: a long request that
    starts last would run alone at the end. Failures need no engine and come first.
    """
    failures: list[JobRequest | Failure] = []
    groups: defaultdict[tuple[int, ...], list[JobRequest]] = defaultdict(list)
    for request in requests:
        if isinstance(request, Failure):
            failures.append(request)
        else:
            groups[tuple(request.prompt_ids[:_SHARED_TOKENS])].append(request)
    longest_first = sorted(groups.values(), key=lambda group: -max(map(_longest_output, group)))
    ordered = (request for group in longest_first for request in sorted(group, key=_prompt))
    return [*failures, *ordered]


def _prompt(request: JobRequest) -> list[int]:
    return request.prompt_ids


def _longest_output(request: JobRequest) -> int:
    """Return the maximum number of output tokens that the parameters allow, or NO_LIMIT."""
    params = request.params
    limits = [] if params.max_new_tokens is None else [params.max_new_tokens]
    if params.max_positions is not None:
        limits.append(params.max_positions - len(request.prompt_ids))
    return min(limits, default=NO_LIMIT)
