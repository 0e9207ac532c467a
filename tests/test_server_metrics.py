"""What /metrics counts is what has happened.

python -m pytest tests/test_server_metrics.py
"""

import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_process import Server
from waiting import HANG, until

from serving import metrics as metrics_module
from serving.messages import Delta
from serving.metrics import Metrics


def read(text: str) -> dict[str, float]:
    """Name and labels -> value, of every sample."""
    families = text_string_to_metric_families(text)
    return {s.name + "".join(f"{{{v}}}" for v in s.labels.values()): s.value for f in families for s in f.samples}


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics_module, "time", clock)
    return clock


def test_a_request_is_timed_from_its_submission(clock):
    metrics = Metrics()
    metrics.submitted("1")
    clock.now += 0.3
    metrics.delta(Delta("1", 0, "a", [5], prompt_tokens=7, cached_tokens=4))
    clock.now += 0.02
    metrics.delta(Delta("1", 1, "a", [5], prompt_tokens=7, cached_tokens=6))  # another sample, its first token
    clock.now += 0.04
    metrics.delta(Delta("1", 0, "abc", [5, 6, 7], "length", prompt_tokens=7, cached_tokens=4))
    metrics.ended("1", "length")
    got = read(metrics.exposition(None).decode())
    assert got["folio:time_to_first_token_seconds_count"] == 1
    assert got["folio:time_to_first_token_seconds_sum"] == pytest.approx(0.3)
    assert got["folio:inter_token_latency_seconds_count"] == 3
    assert got["folio:inter_token_latency_seconds_sum"] == pytest.approx(0.06)
    assert got["folio:e2e_request_latency_seconds_sum"] == pytest.approx(0.36)
    assert (got["folio:prompt_tokens_total"], got["folio:cached_tokens_total"]) == (7, 4)
    assert got["folio:generation_tokens_total"] == 5
    assert got["folio:num_requests_total{length}"] == 1 and got["folio:healthy"] == 0
    assert "folio:num_running_reqs" not in got  # there is no engine to say


def test_a_server_counts_what_it_does(server: Server):
    with httpx.Client(base_url=server.url, timeout=HANG) as http:

        def now() -> dict[str, float]:
            response = http.get("/metrics")
            assert response.headers["content-type"].startswith("text/plain")
            return read(response.text)

        before = now()
        body = {"input_ids": list(range(400, 440)), "sampling_params": {"max_new_tokens": 5, "ignore_eos": True}}
        for _ in range(2):
            assert http.post("/generate", json=body).status_code == 200
        with http.stream(
            "POST",
            "/generate",
            json=body | {"stream": True, "sampling_params": {"max_new_tokens": 1000, "ignore_eos": True}},
        ):
            pass
        until(lambda: now()["folio:num_aborted_requests_total"] > before["folio:num_aborted_requests_total"])
        http.post("/generate", json=body | {"sampling_params": {"regex": "[a-f]{3}"}})
        after = now()
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert gained["folio:num_requests_total{length}"] == 2 and gained["folio:num_aborted_requests_total"] == 1
    assert gained["folio:cached_tokens_total"] >= 32 and gained["folio:prompt_tokens_total"] >= 120
    assert gained["folio:generation_tokens_total"] >= 12 and gained["folio:time_to_first_token_seconds_count"] == 4
    assert after["folio:healthy"] == 1 and after["folio:max_total_num_pages"] == 512
    assert 0 < after["folio:cache_hit_rate"] <= 1 and after["folio:num_grammar_compiled_total"] >= 1
    for name in ("num_running_reqs", "num_queue_reqs", "token_usage", "gen_throughput", "num_retractions_total"):
        assert f"folio:{name}" in after
    assert all(re.fullmatch(r"folio:[a-z0-9_]+(\{.*\})?", name) for name in after)
