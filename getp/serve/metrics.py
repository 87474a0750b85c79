"""Metrics in Prometheus's text format."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from engine import Completion
from getp.serve.engine_thread import EngineThread

_TTFT_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_PER_TOKEN_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_WHOLE_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    """What happened to online requests since the start, and the state of the engine."""

    def __init__(self, thread: EngineThread) -> None:
        self.registry = registry = CollectorRegistry()
        self._thread = thread
        self.ttft = Histogram(
            "getp_time_to_first_token_seconds",
            "Time from the arrival of an online request to its first token.",
            buckets=_TTFT_S,
            registry=registry,
        )
        self.per_token = Histogram(
            "getp_time_per_output_token_seconds",
            "Mean time per token after the first of an online answer.",
            buckets=_PER_TOKEN_S,
            registry=registry,
        )
        self.whole = Histogram(
            "getp_request_seconds",
            "Time from the arrival of an online request to the end of an answer.",
            buckets=_WHOLE_S,
            registry=registry,
        )
        named = (
            ("completed", "Online answers that were completed."),
            ("failed", "Online requests that failed in the engine."),
            ("cancelled", "Online requests whose client hung up."),
            ("refused", "Requests that were refused with a status of 400 or more."),
        )
        counters = [Counter(f"getp_{name}", text, registry=registry) for name, text in named]
        self.completed, self.failed, self.cancelled, self.refused = counters
        registry.register(self)

    def count(self, completion: Completion, arrived: float) -> None:
        """Count an online answer; arrived: seconds of time.perf_counter."""
        self.completed.inc()
        self.whole.observe(completion.finished - arrived)
        tokens = len(completion.token_ids)
        if tokens:
            self.ttft.observe(completion.first_token - arrived)
        if tokens > 1:
            decoding = completion.finished - completion.first_token
            self.per_token.observe(decoding / (tokens - 1))

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield the state of the engine; prometheus_client calls it."""
        stats = self._thread.stats()
        gauges = (
            ("online_requests", "Online requests, those that wait included.", self._thread.online),
            ("running", "Sequences in the batch.", stats.running),
            ("waiting", "Sequences that wait for a place in the batch.", stats.waiting),
            ("kv_blocks_used", "Blocks of the KV cache in use.", stats.used_kv_blocks),
            ("kv_blocks", "Blocks of the KV cache.", stats.kv_blocks),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"getp_{name}", text, value)
        counters = (
            ("prompt_tokens", "Prompt tokens of finished requests.", stats.prompt_tokens),
            ("cached_tokens", "Of these, found in the prefix cache.", stats.cached_tokens),
            ("output_tokens", "Tokens that were generated.", stats.generated_tokens),
            ("preemptions", "Sequences that were preempted.", stats.preemptions),
            ("steps", "Steps of the engine.", stats.steps),
        )
        for name, text, value in counters:
            yield CounterMetricFamily(f"getp_{name}", text, value)

    def text(self) -> bytes:
        """Return all metrics."""
        return bytes(generate_latest(self.registry))
