"""The benchmarks of the server count rightly, and notice what is wrong.

python -m pytest tests/test_bench_serve.py
"""

import asyncio

import pytest
from server_process import Server

from bench import serve, serve_soak
from bench.http_load import Answer, ask, get

REQUESTS = ["--requests", "4", "--answer", "2", "5", "--prompt", "4", "20"]
GREEDY = {"max_new_tokens": 5, "temperature": 0, "ignore_eos": True}


def test_quantiles():
    values = list(range(1, 101))
    assert (serve.quantile(values, 0.5), serve.quantile(values, 0.99), serve.quantile([3], 0.99)) == (51, 100, 3)
    assert serve.quantile([], 0.5) == 0


def test_times_of_an_answer():
    answer = Answer(10.0, times=[10.5, 10.7, 11.3], last={"meta_info": {"completion_tokens": 5}})
    assert (answer.first, answer.per_token) == pytest.approx((0.5, 0.2))
    assert serve.latencies([answer, answer])["ITL"] == pytest.approx([0.2, 0.6] * 2)


def test_arrivals_are_random_and_the_same_each_time():
    workload = serve.Workload(serve.parse_args(["--requests", "2000", "--rate", "4"]))
    assert sum(workload.gaps) / 2000 == pytest.approx(1 / 4, rel=0.1)
    assert workload.gaps == serve.Workload(serve.parse_args(["--requests", "2000", "--rate", "4"])).gaps
    assert workload.draw(1000)[0][0] != workload.draw(1000)[0][0]  # no prompt is in the cache
    assert set(serve.Workload(serve.parse_args(["--rate", "inf"])).gaps) == {0}


def test_a_server_under_load(server: Server, capsys):
    args = serve.parse_args([*REQUESTS, "--rate", "20", "--concurrency", "2"])
    record = serve.under_load(server.url, serve.Workload(args), 1000, args)
    assert 0 < record["TTFT"]["p50"] <= record["TTFT"]["p99"] and record["ITL"]["p50"] > 0
    assert "TPOT" in capsys.readouterr().out


def test_beside_the_engine(server: Server, capsys):
    args = serve.parse_args([*REQUESTS, "--repeats", "1", "--rows", "4"])
    record = serve.beside_the_engine(server.url, serve.Workload(args), args)
    assert set(record) == {"offline", "HTTP, streamed", "HTTP, whole"} and "of offline" in capsys.readouterr().out


def test_an_answer_that_is_short_is_noticed(server: Server):
    with pytest.raises(RuntimeError, match="asked for 5 tokens, got status 400"):
        serve.through_http(server.url, [([99999], 5)], [0.0], None)


def test_a_stream_that_is_left(server: Server):
    body = {"text": "Once", "stream": True, "sampling_params": GREEDY | {"max_new_tokens": 1000}}
    assert len(asyncio.run(ask(server.url, body, leave_after=2)).times) == 2


def test_a_short_soak(server: Server, capsys):
    args = serve_soak.parse_args(["--minutes", "0.05", "--clients", "16", "--every", "1"])
    soak = serve_soak.Soak(server.url, args)
    asyncio.run(soak.run({"server": server.process.pid}))
    assert soak.watched.failures == [] and soak.watched.done["read"] > 5
    assert all(memory > 0 for _, memory in soak.watched.memory["server"])
    assert serve_soak.left_behind(server.url) is None


@pytest.mark.parametrize("body", serve_soak.BODIES, ids=range(len(serve_soak.BODIES)))
def test_what_is_hostile_in_a_soak_is_refused(server: Server, body):
    soak = serve_soak.Soak(server.url, serve_soak.parse_args([]))

    class Always:
        def choice(self, bodies: object) -> bytes:
            return body

    asyncio.run(soak.refused(Always()))
    assert soak.watched.done["refused"] == 1


def test_a_soak_notices_what_is_wrong(server: Server, monkeypatch):
    soak = serve_soak.Soak(server.url, serve_soak.parse_args([]))
    asks = {"max_new_tokens": 5, "ignore_eos": True}
    meta = {"finish_reason": {"type": "length"}, "completion_tokens": 5}
    soak.check(Answer(0, 200, last={"meta_info": meta}), asks)
    for status, wrong in ((500, meta), (200, meta | {"completion_tokens": 4}), (200, meta | {"finish_reason": None})):
        with pytest.raises(RuntimeError):
            soak.check(Answer(0, status, last={"meta_info": wrong}), asks)

    info = get(server.url, "/server_info")
    state = info["internal_states"][0]
    monkeypatch.setattr(serve_soak, "get", lambda *_: info | {"internal_states": [state | {"pages_free": 1}]})
    assert "leaves pages" in serve_soak.left_behind(server.url)
    whole = {"internal_states": [state | {"pages_free": state["pages_total"]}]}
    monkeypatch.setattr(serve_soak, "get", lambda *_: info | whole | {"engine_restarts": 1})
    assert "restarted" in serve_soak.left_behind(server.url)
