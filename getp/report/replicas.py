"""What the report says of replicas: each of them, the balance, the efficiency of all together."""

from dataclasses import replace
from typing import Any

from getp.cluster.driver import Cluster, Member
from getp.report.efficiency import Explanation, explain_counts, peaks_of
from model.cost.devices import Device, device_of_driver


def replicas_report(cluster: Cluster, inference_s: float) -> dict[str, Any]:
    """Return the report's part on replicas, in which some general figures are those of all."""
    members = cluster.members
    device = members[0].started.device if members[0].started else cluster.device.type
    busy = [seconds / inference_s if inference_s else 0.0 for seconds in cluster.busy_s]
    hosts = f"{cluster.hosts} hosts" if cluster.hosts > 1 else "one host"
    return {
        "device": f"{len(members)} replicas on {hosts}, {device} each",
        "peak_gpu_memory_bytes": max(each.peak_gpu_memory for each in members) or None,
        "balance": sum(busy) / len(busy),
        "replicas": [
            _line(member, share, inference_s) for member, share in zip(members, busy, strict=True)
        ],
    }


def explain_replicas(cluster: Cluster, inference_s: float, requests: int) -> Explanation:
    """Explain the run as that of one device with the peaks of all."""
    stats = cluster.stats
    one = _peaks(cluster)
    if not stats.steps or not inference_s or one is None:
        return Explanation()
    places = cluster.places
    count = places.replicas * places.gpus or cluster.hosts
    together = replace(
        one,
        name=f"{count} × {one.name}" if count > 1 else one.name,
        peaks={dtype: peak * count for dtype, peak in one.peaks.items()},
        bandwidth=one.bandwidth * count,
    )
    dtype = str(cluster.dtype).removeprefix("torch.")
    return explain_counts(
        cluster.held_config, dtype, together, stats, inference_s, requests, cluster.max_batch_size
    )


def _peaks(cluster: Cluster) -> Device | None:
    """Return a replica's device: a GPU by its name, as the driver may have none; else this CPU."""
    if cluster.device.type == "cpu":
        return peaks_of(cluster.device)
    names = [member.started.device for member in cluster.members if member.started]
    return device_of_driver(names[0]) if names else None


def _line(member: Member, busy: float, inference_s: float) -> dict[str, Any]:
    lives = [*member.before, member.stats]
    steps = sum(stats.steps for stats in lives)
    return {
        "replica": member.index,
        "host": member.started.host if member.started else None,
        "requests": member.requests,
        "output_tokens": member.output_tokens,
        "output_tok_s": member.output_tokens / inference_s if inference_s else 0.0,
        "busy": busy,
        "mean_batch": sum(stats.batch_sum for stats in lives) / steps if steps else 0.0,
        "deaths": member.deaths,
        "requests_left_to_others": member.rerun,
        "peak_memory_bytes": member.peak_memory,
    }
