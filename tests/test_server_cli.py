"""server.py as it is started and stopped, with its engine killed, and with a key.

python -m pytest tests/test_server_cli.py
"""

import json
import os
import signal
import subprocess
import sys
import threading

import httpx
import pytest
from server_process import ROOT, running
from waiting import HANG, until

import server as server_module
from errors import UserError
from serving.settings import Settings

LONG = {"text": "Once", "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}}

STREAM = LONG | {"stream": True}
COMPLETION = {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True, "stream": True}


def error_of(response: httpx.Response) -> dict:
    """What a request that has failed was told: all of the answer, or the last event of a stream but for [DONE]."""
    if response.status_code != 200:
        return response.json()["error"]
    *_, last, done = [line for line in response.text.splitlines() if line]
    assert done == "data: [DONE]"
    return json.loads(last.removeprefix("data: "))["error"]


def test_behind_a_key_with_its_engine_killed_under_load_and_drained_in_the_end():
    with (
        running("--api-key", "secret", "--served-model-name", "mine", "--cors-origin", "http://page") as server,
        httpx.Client(base_url=server.url, timeout=HANG, headers={"Authorization": "Bearer secret"}) as http,
    ):
        routes = set(http.get("/openapi.json").json()["paths"]) - {"/", "/health"}
        for path in routes | {"/openapi.json", "/nothing"}:
            for method in ("GET", "POST"):
                assert httpx.request(method, server.url + path).status_code == 401, path
        assert httpx.get(server.url + "/health").status_code == 200
        assert http.get("/get_model_info").json()["served_model_name"] == "mine"
        asks = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
        assert httpx.options(server.url + "/generate", headers=asks).status_code == 200  # asked without the key
        assert httpx.options(server.url + "/generate", headers=asks | {"Origin": "x"}).status_code == 400

        ends: list[httpx.Response] = []
        asked = [
            ("/generate", LONG),
            ("/generate", STREAM),
            ("/v1/completions", COMPLETION),
            ("/v1/chat/completions", CHAT),
        ]
        load = [
            threading.Thread(target=lambda ask=ask: ends.append(http.post(ask[0], json=ask[1]))) for ask in asked * 6
        ]
        for thread in load:
            thread.start()
        state = lambda: http.get("/server_info").json()  # noqa: E731
        until(lambda: state()["open_requests"] == 24)
        os.kill(state()["internal_states"][0]["engine_pid"], signal.SIGKILL)
        until(lambda: http.get("/health").status_code == 503)
        assert http.post("/generate", json=LONG).json()["error"]["code"] == "engine_down"
        for thread in load:
            thread.join(HANG)
        assert [error_of(response)["code"] for response in ends] == ["engine_down"] * 24
        assert {response.status_code for response in ends} == {200, 503}  # a stream that has begun ends with an event
        until(lambda: http.get("/health").status_code == 200)
        assert state()["engine_restarts"] == 1 and http.get("/health_generate").status_code == 200

        short = LONG | {"sampling_params": {"max_new_tokens": 100, "ignore_eos": True}}
        last = threading.Thread(target=lambda: ends.append(http.post("/generate", json=short)))
        last.start()
        until(lambda: state()["open_requests"] == 1)
        assert server.stop() in (0, 130)
        last.join(HANG)
        assert ends[-1].status_code == 200 and len(ends[-1].json()["output_ids"]) == 100


def test_time_is_limited_and_so_is_the_drain():
    eight = {
        "text": "Once",
        "sampling_params": LONG["sampling_params"] | {"n": 8},
    }  # one after another: longer than a second
    with running("--request-timeout", "1", "--drain-seconds", "1", "--max-running-requests", "1") as server:
        with httpx.Client(base_url=server.url, timeout=HANG) as http:
            response = http.post("/generate", json=eight)
            assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
            with http.stream("POST", "/generate", json=eight | {"stream": True}) as stream:
                lines = [line for line in stream.iter_lines() if line]
            assert '"timeout"' in lines[-2] and lines[-1] == "data: [DONE]"
            until(lambda: not http.get("/server_info").json()["internal_states"][0]["running"])
        assert server.stop(signal.SIGTERM) in (0, -signal.SIGTERM)


def test_what_cannot_be_served_is_one_line():
    command = [sys.executable, str(ROOT / "server.py"), "--page-size", "1000"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("server.py: ") and result.stderr.count("\n") == 1


def test_flags_reach_where_they_belong(monkeypatch):
    told = {}

    class Told:
        def __init__(self, options, compile, **settings):
            told.update(options, compile=compile, **settings)

        async def start(self):
            raise UserError("enough")

    monkeypatch.setattr("serving.client.EngineClient", Told)
    flags = [
        "--max-running-requests",
        "3",
        "--max-model-len",
        "99",
        "--schedule-policy",
        "fcfs",
        "--no-radix",
        "--compile",
    ]
    flags += [
        "--no-restart",
        "--max-queue",
        "7",
        "--request-timeout",
        "8",
        "--watchdog-timeout",
        "9",
        "--no-jump-forward",
    ]
    assert server_module.main(flags) == 2
    assert (told["max_batch_size"], told["max_model_len"], told["schedule_policy"], told["radix"]) == (
        3,
        99,
        "fcfs",
        False,
    )
    assert (told["compile"], told["restart"], told["max_queue"], told["jump_forward"]) == ("default", False, 7, False)
    assert (told["request_timeout"], told["watchdog"]) == (8, 9)


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-queue", "-1"],
        ["--request-timeout", "nan"],
        ["--port", "x"],
        ["--port", "65536"],
        ["--api-key", ""],
        ["--mod", "x"],
    ],
)
def test_a_flag_that_makes_no_sense(flags, capsys):
    with pytest.raises(SystemExit) as raised:
        server_module.parse_args(flags)
    assert raised.value.code == 2 and "usage" in capsys.readouterr().err


def test_what_is_open_by_default_is_next_to_nothing():
    args = server_module.parse_args([])
    assert args.host == "127.0.0.1" and args.cors_origin == [] and Settings().cors_origins == ()
