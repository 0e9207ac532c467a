"""The page's files, and the events that it lives from: who may look, what they see, and that nobody pays when nobody looks.

python -m pytest tests/test_debug_events.py
"""

import asyncio
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import aclosing, contextmanager

import httpx
import pytest
from server_process import ROOT, running
from test_server_client import LONG, run  # noqa: F401 (a fixture)
from waiting import HANG

from serving.api_errors import ServerBusy
from serving.client import EngineClient
from serving.watchers import MOST_WATCHERS, Watchers
from snapshot import Snapshot

STORY = {"text": "Once upon a time there was a fox who", "sampling_params": {"max_new_tokens": 60, "temperature": 0}}
Event = tuple[str, dict]


@contextmanager
def looking(http: httpx.Client) -> Iterator[Iterator[Event]]:
    """The events, as long as one looks."""

    def read(lines: Iterator[str]) -> Iterator[Event]:
        for line in lines:
            if line.startswith("event: "):
                yield line.removeprefix("event: "), json.loads(next(lines).removeprefix("data: "))

    with http.stream("GET", "/debug/events") as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield read(response.iter_lines())


def first(events: Iterator[Event], name: str, fits=lambda content: True) -> dict:
    return next(content for kind, content in events if kind == name and fits(content))


# ---- the files


def test_the_page_is_small_and_asks_nobody_else():
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "web").iterdir()}
    assert sum(text.count("\n") for text in texts.values()) < 600
    for name, text in texts.items():
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w/.-]*", text)) - {"http://www.w3.org/2000/svg"}
        assert not addresses, name
        assert "innerHTML = `" not in text or "${" not in re.search(r"innerHTML = `([^`]*)`", text)[1], name


def test_its_files_are_served_and_nothing_beside_them(server):
    with httpx.Client(base_url=server.url, timeout=HANG) as http:
        page = http.get("/")
        assert page.status_code == 200 and "<title>Folio</title>" in page.text
        assert "default-src 'self'" in page.headers["content-security-policy"]
        files = re.findall(r'(?:src|href)="(/web/[^"]+)"', page.text)
        assert len(files) >= 3
        for file in files:
            got = http.get(file)
            assert got.status_code == 200 and "default-src 'self'" in got.headers["content-security-policy"], file
        for path in ("/web/", "/web/nothing.js", "/web/%2e%2e/server.py", "/web/..%2fserver.py", "/web//etc/passwd"):
            assert http.get(path).status_code == 404, path


# ---- the events


def test_they_say_what_the_engine_holds(server):
    with httpx.Client(base_url=server.url, timeout=HANG) as http, looking(http) as events:
        kind, model = next(events)
        assert kind == "model" and model["max_running_requests"] == 4 and model["name"] == "folio-tiny"
        assert http.post("/generate", json=STORY).status_code == 200
        now = first(events, "snapshot", lambda s: any(n["text"].startswith("Once upon a time") for n in s["nodes"]))
        assert len(now["cells"]) * now["pages_per_cell"] >= now["stats"]["pages_total"]
        spans = first(events, "snapshot", lambda s: s["spans"])["spans"]
        assert {span["row"] for span in spans} == {"host", "device"}
        long = threading.Thread(
            target=lambda: http.post(
                "/generate",
                json={"text": "A", "rid": "mine", "sampling_params": {"max_new_tokens": 500, "ignore_eos": True}},
            )
        )
        long.start()
        (request,) = first(events, "snapshot", lambda s: s["requests"])["requests"]
        assert request["id"] == "mine" and request["max_new_tokens"] == 500  # its client's name, not the engine's
        http.post("/abort_request", json={"rid": "mine"})
        long.join(HANG)


def test_ids_beyond_the_tokenizer_do_not_end_them(server):
    with httpx.Client(base_url=server.url, timeout=HANG) as http, looking(http) as events:
        last = http.get("/get_model_info").json()
        body = {"input_ids": [3] * 20, "sampling_params": {"max_new_tokens": 4}}
        assert last and http.post("/generate", json=body).status_code == 200
        assert first(events, "snapshot", lambda s: any(n["tokens"] >= 16 for n in s["nodes"]))


def test_behind_the_key_with_the_engine_killed_and_not_in_the_way_of_ctrl_c():
    with (
        running("--api-key", "secret", "--drain-seconds", "1000") as server,
        httpx.Client(base_url=server.url, timeout=HANG, headers={"Authorization": "Bearer secret"}) as http,
    ):
        assert httpx.get(server.url + "/debug/events").status_code == 401
        assert httpx.get(server.url + "/").status_code == httpx.get(server.url + "/web/style.css").status_code == 200
        with looking(http) as events:
            first(events, "snapshot")
            os.kill(http.get("/server_info").json()["internal_states"][0]["engine_pid"], signal.SIGKILL)
            assert "died" in first(events, "away")["why"]
            assert first(events, "snapshot")["stats"]["healthy"]
            server.process.send_signal(signal.SIGINT)
            for _ in events:
                pass
            assert server.process.wait(HANG) in (0, 130)


# ---- who looks


def test_the_engine_takes_snapshots_only_while_somebody_looks(run):  # noqa: F811
    async def body(client: EngineClient) -> None:
        async with aclosing(client.watchers.look()) as one, aclosing(client.watchers.look()) as two:
            assert isinstance(await anext(one), Snapshot) and isinstance(await anext(two), Snapshot)
        await client.stats()  # what the engine says after it has been told that nobody looks
        last = client.watchers._newest
        async for _ in client.generate("r", [1, 2, 3], LONG):
            pass
        await client.stats()
        assert client.watchers._newest is last and client.watchers.count == 0

    run(body)


def test_who_is_slow_gets_the_newest_and_holds_up_nobody():
    async def body() -> None:
        switched: list[bool] = []
        watchers = Watchers(switched.append)
        one, two = watchers.look(), watchers.look()
        async with aclosing(one), aclosing(two):
            waiting = [asyncio.ensure_future(anext(who)) for who in (one, two)]
            await asyncio.sleep(0)
            watchers.show(a := snapshot_at(1), {})
            assert [await w for w in waiting] == [a, a]
            for at in (2, 3):
                watchers.show(snapshot_at(at), {})
            waiting = asyncio.ensure_future(anext(one))
            await asyncio.sleep(0)
            watchers.show(snapshot_at(4), {})
            assert (await waiting).at == 4
        assert switched == [True, False]

    asyncio.run(body())


def test_there_is_a_limit_to_how_many_look(monkeypatch):
    async def body() -> None:
        watchers = Watchers(lambda on: None)
        lookers = [watchers.look() for _ in range(MOST_WATCHERS)]
        tasks = [asyncio.ensure_future(anext(looker)) for looker in lookers]
        await asyncio.sleep(0)
        with pytest.raises(ServerBusy, match=str(MOST_WATCHERS)):
            watchers.refuse_if_full()
        watchers.show(snapshot_at(1), {})
        await asyncio.gather(*tasks)
        await lookers[0].aclose()
        watchers.refuse_if_full()
        for looker in lookers:
            await looker.aclose()

    asyncio.run(body())


def test_silence_is_told(monkeypatch):
    monkeypatch.setattr("serving.watchers.SILENCE", 0.01)

    async def body() -> None:
        async with aclosing(Watchers(lambda on: None).look()) as looker:
            assert await anext(looker) is None

    asyncio.run(body())


def snapshot_at(at: float) -> Snapshot:
    return Snapshot(at, None, [], "", 1, [], [])
