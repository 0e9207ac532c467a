"""/metrics in Prometheus' form, with SGLang's names behind `folio:`.

What happens to requests is counted here as it happens; what the engine counts is read when somebody asks, from its `Stats`. Those
start anew when the engine's process does, as counters in Prometheus may.

    curl localhost:30000/metrics
    python -m pytest tests/test_server_metrics.py
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from serving.messages import Delta
from stats import Stats

FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100)  # seconds
BETWEEN = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3)
WHOLE = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100, 200, 400)

disable_created_metrics()  # a gauge beside each of the others, of which nobody asks anything


@dataclass
class _Open:
    """A request on its way. last: when each of its samples has said something, by index."""

    started: float
    last: dict[int, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.stats: Stats | None = None  # the last that the engine has said
        self._open: dict[str, _Open] = {}

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"folio:{name}", about, labels, registry=self.registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"folio:{name}", about, buckets=buckets, registry=self.registry)

        self._requests = counter("num_requests", "requests that have ended, by their finish reason", "finish_reason")
        self._aborted = counter("num_aborted_requests", "requests that were aborted")
        self._refused = counter("num_refused_requests", "requests that found the queue full")
        self._prompt = counter("prompt_tokens", "prompt tokens of requests that have been answered")
        self._cached = counter("cached_tokens", "of those: found in the cache")
        self._generated = counter("generation_tokens", "tokens generated")
        self._restarts = counter("engine_restarts", "times that the engine's process was started anew")
        self._first = histogram("time_to_first_token_seconds", "from the submission to the first token", FIRST_TOKEN)
        self._between = histogram("inter_token_latency_seconds", "between two tokens of a sequence", BETWEEN)
        self._whole = histogram("e2e_request_latency_seconds", "from the submission to the end", WHOLE)
        self._healthy = Gauge("folio:healthy", "1 while the engine takes requests", registry=self.registry)
        self.registry.register(self)

    # ---- as it happens

    def submitted(self, rid: str) -> None:
        self._open[rid] = _Open(time.perf_counter())

    def delta(self, delta: Delta) -> None:
        request, now, tokens = self._open[delta.rid], time.perf_counter(), len(delta.token_ids)
        if tokens:
            if not request.last:
                self._first.observe(now - request.started)
            if (last := request.last.get(delta.index)) is not None:
                for _ in range(tokens):
                    self._between.observe((now - last) / tokens)
            request.last[delta.index] = now
            self._generated.inc(tokens)
        request.prompt_tokens = delta.prompt_tokens
        if delta.index == 0:  # the other samples find what this one has computed
            request.cached_tokens = delta.cached_tokens

    def ended(self, rid: str, reason: str) -> None:
        """reason: a finish reason, or "error"."""
        request = self._open.pop(rid)
        self._whole.observe(time.perf_counter() - request.started)
        self._requests.labels(reason).inc()
        self._aborted.inc(reason == "abort")
        self._prompt.inc(request.prompt_tokens)
        self._cached.inc(request.cached_tokens)

    def refused(self) -> None:
        self._refused.inc()

    def restarted(self) -> None:
        self._restarts.inc()

    # ---- when somebody asks

    def exposition(self, stats: Stats | None) -> bytes:
        """stats: the engine's, or None while there is none; then the gauges of the engine are left out."""
        self.stats = stats
        self._healthy.set(stats is not None and stats.healthy)
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """The registry asks this for what the engine counts."""
        if (s := self.stats) is None:
            return
        used = s.pages_total - s.pages_free - (s.pages_held - s.pages_locked)
        gauges = {
            "num_running_reqs": ("sequences that run", s.running),
            "num_queue_reqs": ("sequences that wait", s.waiting),
            "batch_size": ("sequences in the last step", s.batch_size),
            "num_used_pages": ("pages of the cache that somebody runs on", used),
            "max_total_num_pages": ("pages of the cache", s.pages_total),
            "token_usage": ("share of the cache that somebody runs on", used / max(1, s.pages_total)),
            "cache_hit_rate": ("share of all prompt tokens that was found in the cache", s.hit_rate),
            "gen_throughput": ("tokens a second, over the last seconds", s.tokens_per_second),
            "new_token_ratio": ("share of max_new_tokens that a request is expected to use", s.new_token_ratio),
            "is_cuda_graph": ("share of the steps that were a replay", s.steps_replayed / max(1, s.steps)),
        }
        counters = {
            "num_retractions": ("preemptions", s.preemptions),
            "num_steps": ("steps of the engine", s.steps),
            "num_forced_tokens": ("tokens that a grammar forced, which took no step", s.forced_tokens),
        }
        if (g := s.grammars) is not None:
            gauges["num_grammar_queue_reqs"] = ("grammars that are compiling, or wait for it", g.compiling)
            gauges["grammar_cache_bytes"] = ("bytes of compiled grammars", g.cached_bytes)
            counters |= {
                "num_grammar_cache_hit": ("grammars that were compiled already", g.hits),
                "num_grammar_compiled": ("grammars that had to be compiled", g.misses),
                "num_grammar_aborted": ("grammars that were refused", g.refused),
                "num_grammar_timeout": ("grammars that took too long", g.timeouts),
                "num_grammar_crash": ("grammars that crashed the compiler", g.crashes),
            }
        for name, (about, value) in gauges.items():
            yield GaugeMetricFamily(f"folio:{name}", about, value)
        for name, (about, value) in counters.items():
            yield CounterMetricFamily(f"folio:{name}", about, value)
