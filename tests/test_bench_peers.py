"""Comparing with other engines: the workers, who is missing, what is converted, and all of it on a tiny model.

pytest tests/test_bench_peers.py
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from bench import peers
from bench.checkpoints import make_checkpoint
from bench.peer_engines import Arrival, Row, Served, gpt_fast, worker
from bench.peer_engines.vllm import Vllm
from bench.peer_engines.worker import ENGINES, PeerFailed, Worker

ROOT = Path(__file__).parent.parent
ROW = Row("b1", 1, 3, 4)
FAKE = """
import os, sys
from bench.peer_engines import Served

class Fake:
    def __init__(self, greeting):
        print("chatter on stdout")
        if greeting == "no":
            raise ValueError("will not start")

    @classmethod
    def open(cls, folder, rows, greeting):
        return cls(greeting)

    def generate(self, prompts, new, row):
        print("more chatter")
        if prompts[0][0] == 0:
            raise ValueError("no zeros")
        if prompts[0][0] == 1:
            print("the last words", file=sys.stderr, flush=True)
            os._exit(3)
        return [[p[-1] + 1 + i for i in range(new)] for p in prompts]

    def serve(self, arrivals):
        return [Served([a.new] * a.new, [a.at + 1 + i for i in range(a.new)]) for a in arrivals]
"""


# ---- workers


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "fake_peer.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(ENGINES, "fake", ("fake_peer", "Fake", {"greeting": "yes"}))
    monkeypatch.setattr(worker, "SETTLE", 0.0)
    return tmp_path


def test_a_worker_answers_and_lives_on_after_an_error(fake):
    process = Worker("fake", fake, [ROW], 1)
    try:
        assert process.serves
        assert process.generate([[4, 5], [6, 7]], 2, ROW) == [[6, 7], [8, 9]]
        assert process.seconds > 0 and process.cpu_seconds() >= 0
        with pytest.raises(PeerFailed, match="ValueError: no zeros"):
            process.generate([[0]], 2, ROW)
        assert process.generate([[4]], 1, ROW) == [[5]]
        assert process.serve([Arrival(0.5, [1, 2], 2)]) == [Served([2, 2], [1.5, 2.5])]
        with pytest.raises(PeerFailed, match="ended with 3: the last words"):
            process.generate([[1]], 1, ROW)
        with pytest.raises(PeerFailed, match="ended with 3"):
            process.generate([[4]], 1, ROW)
    finally:
        process.close()


def test_a_worker_that_does_not_start_says_why(fake):
    with pytest.raises(PeerFailed, match="ValueError: will not start"):
        Worker("fake", fake, [ROW], 1, {"greeting": "no"})


def test_a_worker_that_is_silent_is_ended(fake, monkeypatch):
    (fake / "fake_peer.py").write_text(FAKE + "\n    def generate(self, *_):\n        __import__('time').sleep(60)\n")
    process = Worker("fake", fake, [ROW], 1)
    monkeypatch.setattr(worker, "PATIENCE", 0.2)
    with pytest.raises(PeerFailed, match="ended with -9"):
        process.generate([[4]], 1, ROW)
    process.close()


# ---- the benchmark, with peers that take no time


class Stub:
    """In place of a Worker: continues by counting, from `shift` more."""

    serves = False
    seconds = 0.0

    def __init__(self, name: str = "stub", shift: int = 0, fail_at: int | None = None):
        self.name, self.shift, self.fail_at, self.calls = name, shift, fail_at, 0

    def cpu_seconds(self) -> float:
        return 0.0

    def generate(self, prompts, new, row):
        self.calls += 1
        if self.calls == self.fail_at:
            raise PeerFailed("broke")
        self.seconds = 0.5 + 0.25 * new
        return [[prompt[0] + self.shift + i for i in range(new)] for prompt in prompts]


def bench(**workers: Stub) -> peers.Bench:
    return peers.Bench(workers, vocab=512, sizes=peers.SMALL, repeats=2, rate=None)


def test_figures_of_a_row_by_hand():
    results = bench(folio=Stub(), hf=Stub()).run(Row("b2", 2, 8, 4))
    for result in results.values():
        assert result["tokens_per_s"].median == pytest.approx(2 * 4 / (4 * 0.25))
        assert result["first_s"].median == pytest.approx(0.75)
        assert result["agree"] == 1
    (prefill,) = bench(folio=Stub()).run(Row("prefill8", 1, 8, 0)).values()
    assert prefill["tokens_per_s"].median == pytest.approx(8 / 0.75)
    (shared,) = bench(folio=Stub()).run(peers.make_row("shared", 8, 4, peers.SMALL)).values()
    assert shared["total_s"].median == pytest.approx(0.5 + 0.25 * peers.SMALL.shared_new)


def test_who_computes_another_model_is_warned_of(capsys):
    results = bench(hf=Stub(), wrong=Stub(shift=1)).run(ROW)
    assert (results["hf"]["agree"], results["wrong"]["agree"]) == (1, 0)
    assert "wrong chooses other tokens: 0% agree" in capsys.readouterr().err


@pytest.mark.parametrize("fail_at", [1, 2, 3, 6])
def test_who_fails_is_left_out_and_the_run_goes_on(fail_at):
    run = bench(folio=Stub(), weak=Stub(fail_at=fail_at))
    results = run.run(ROW)
    assert list(results) == ["folio"] and run.failed == {"weak": "broke"}
    assert "weak: broke" in peers.show(ROW, results, run.failed, {})
    assert peers.as_json(results, run.failed, {})["weak"] == {"failed": "broke"}


def test_who_does_not_keep_still_is_named(capsys):
    class Restless(Stub):
        used = 0.0

        def cpu_seconds(self) -> float:
            self.used += 1.0
            return self.used

    bench(folio=Stub(), restless=Restless("restless")).run(ROW)
    assert "WARNING: restless used 1.00 s of CPU while folio was measured" in capsys.readouterr().err


def test_the_ratio_is_to_the_fastest_folio():
    results = bench(folio=Stub()).run(ROW) | {
        "hf": {"tokens_per_s": peers.Stat(2.0, 2.0, 2.0), "first_s": peers.Stat(1.0, 1.0, 1.0), "agree": 1.0},
    }
    assert peers.as_json(results, {}, {})["hf"]["folio"] == pytest.approx(2)
    assert "2.00x" in peers.show(ROW, results, {}, {})


def test_too_few_tokens_are_a_failure():
    class Lazy(Stub):
        def generate(self, prompts, new, row):
            return super().generate(prompts, max(1, new - 1), row)

    run = bench(lazy=Lazy())
    assert run.run(ROW) == {} and "not the [5] asked for" in run.failed["lazy"]


def test_prompts_are_new_each_time_and_the_same_for_all():
    row = peers.make_row("shared", 8, 4, peers.SMALL)
    one, other = (peers.make_prompts(row, peers.SMALL, 512, seed) for seed in (1, 2))
    assert one == peers.make_prompts(row, peers.SMALL, 512, 1)
    assert len({tuple(prompt[: peers.SMALL.shared]) for prompt in one}) == 1 != len({tuple(prompt) for prompt in one})
    assert one[0][:8] != other[0][:8]


def test_arrivals_come_at_the_rate():
    sizes = peers.Sizes(requests=2000, prompts=(1, 2))
    arrivals = peers.make_arrivals(sizes, 512, 0, rate=4.0)
    times = [arrival.at for arrival in arrivals]
    assert times == sorted(times) and times[-1] == pytest.approx(500, rel=0.1)
    assert {arrival.at for arrival in peers.make_arrivals(sizes, 512, 0, None)} == {0.0}


def test_serving_figures_by_hand():
    arrivals = [Arrival(1.0, [1], 2), Arrival(2.0, [1], 1)]
    figures = peers.serving_figures(arrivals, [Served([5, 6], [1.5, 4.0]), Served([7], [5.0])])
    assert figures == {"tokens_per_s": pytest.approx(3 / 4), "first_p50_s": 3.0, "first_p99_s": 3.0}


# ---- who is there


def test_the_missing_are_named_with_how_to_get_them(monkeypatch):
    nothing = argparse.Namespace(gpt_fast=None, vllm=None)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.missing("folio", nothing) is None and peers.missing("hf", nothing) is None
    assert "pip install llama-cpp-python" in peers.missing("llama.cpp", nothing)
    assert "pip install openvino" in peers.missing("openvino", nothing)
    assert "--gpt-fast PATH" in peers.missing("gpt-fast", nothing)
    assert "--vllm URL" in peers.missing("vllm", nothing)
    assert peers.missing("vllm", argparse.Namespace(gpt_fast=None, vllm="http://localhost:1")) is None


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--engines", "folio,nobody"], "not nobody"),
        (["--rows", "b0"], "row 'b0' is unknown"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--rate", "0"], "--rate must be above 0"),
    ],
)
def test_bad_arguments_are_refused(capsys, args, reason):
    with pytest.raises(SystemExit):
        peers.parse_args(args)
    assert reason in capsys.readouterr().err


# ---- other people's formats


def test_gguf_holds_what_the_checkpoint_holds(tmp_path):
    gguf = pytest.importorskip("gguf")
    from safetensors.torch import load_file

    from bench.peer_engines.gguf_file import write_gguf

    folder = make_checkpoint("tiny")
    write_gguf(folder, tmp_path / "model.gguf")
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    weights = {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    assert len(written) == len(weights)
    np.testing.assert_array_equal(written["token_embd.weight"], weights["model.embed_tokens.weight"])
    np.testing.assert_array_equal(written["blk.1.ffn_down.weight"], weights["model.layers.1.mlp.down_proj.weight"])
    q, turned = weights["model.layers.1.self_attn.q_proj.weight"], written["blk.1.attn_q.weight"]  # 4 heads of 16 rows
    for head in range(4):
        for i in range(8):  # elements i and i + 8 of a head turn together: neighbours in GGUF
            np.testing.assert_array_equal(turned[16 * head + 2 * i], q[16 * head + i])
            np.testing.assert_array_equal(turned[16 * head + 2 * i + 1], q[16 * head + 8 + i])


def test_gpt_fast_says_what_it_cannot_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="--gpt-fast takes the folder of a checkout"):
        gpt_fast.GptFast.open(make_checkpoint("tiny"), [ROW], str(tmp_path))
    config = {"model_type": "qwen2", "hidden_size": 8, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="gpt-fast has no qwen2"):
        gpt_fast.model_args(None, config)


class FakeServer(BaseHTTPRequestHandler):
    """What vLLM says, as far as it is asked."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._send(json.dumps({"data": [{"id": "random"}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (body["model"], body["temperature"], body["ignore_eos"]) == ("random", 0, True)
        key = "token_ids" if self.server.knows_ids else "text"
        chunks = [{"choices": [{key: [body["prompt"][-1] + i]}]} for i in range(body["max_tokens"])]
        self._send("".join(f"data: {json.dumps(c)}\n\n" for c in [*chunks, {"choices": []}]) + "data: [DONE]\n\n")

    def _send(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    server.knows_ids = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_is_asked_in_token_ids(server):
    url = f"http://127.0.0.1:{server.server_port}/"
    vllm = Vllm.open(Path(), [ROW], url)
    assert vllm.generate([[3, 4], [5]], 3, ROW) == [[4, 5, 6], [5, 6, 7]]
    (served,) = vllm.serve([Arrival(0.05, [7], 2)])
    assert served.tokens == [7, 8] and 0.05 < served.times[0] <= served.times[1]
    server.knows_ids = False
    with pytest.raises(RuntimeError, match="return_token_ids"):
        vllm.generate([[3]], 1, ROW)


# ---- all of it


def test_all_that_is_installed_agrees_on_a_tiny_model():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    wanted = ["folio", "hf", "hf-batching", "llama.cpp", "openvino", "gpt-fast"]
    command = [sys.executable, "-m", "bench.peers", "--shape", "tiny", "--rows", "b1,poisson", "--repeats", "1"]
    command += ["--new-tokens", "8", "--prompt-tokens", "16", "--engines", ",".join(wanted)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout.strip().splitlines()[-1])
    assert "gpt-fast: not asked for" in done.stdout
    assert all(reason.startswith("not ") for reason in record["absent"].values()), record["absent"]
    decoded = record["rows"]["b1"]
    assert set(decoded) | set(record["absent"]) == set(wanted)
    assert {"folio", "hf", "hf-batching"} <= set(decoded)
    assert {name: result["agree"] for name, result in decoded.items()} == dict.fromkeys(decoded, 1.0)
    served = record["rows"]["poisson"]
    assert served["folio"]["agree"] == served["hf-batching"]["agree"] == 1
    assert served["hf"] == {"failed": "takes no requests as they come"}
    assert record["rate"] > 0
