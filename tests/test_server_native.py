"""SGLang's routes, against a server that runs.

python -m pytest tests/test_server_native.py
"""

import asyncio
import itertools
import json
import re
import socket
import threading

import httpx
import pytest
from server_process import MODEL, ROOT, Server
from waiting import HANG, until

from engine import Engine, SamplingParams
from serving import messages
from serving.engine_process import load

PROMPT = "Once upon a time"
GREEDY = {"temperature": 0, "max_new_tokens": 24}
LONG = {"temperature": 0, "max_new_tokens": 1500, "ignore_eos": True}


@pytest.fixture(scope="module")
def http(server: Server):
    with httpx.Client(base_url=server.url, timeout=HANG) as client:
        yield client


@pytest.fixture(scope="module")
def offline() -> Engine:
    return Engine.from_pretrained(MODEL, dtype="float32")


def generate(http: httpx.Client, **body):
    response = http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(http: httpx.Client, **body) -> list[dict]:
    with http.stream("POST", "/generate", json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def refused(http: httpx.Client, path: str, body, status: int = 400) -> dict:
    response = http.post(path, json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


def state(http: httpx.Client) -> dict:
    """The engine's gauges, once it has proved that no page is lost."""
    return http.get("/server_info", params={"check": True}).json()["internal_states"][0]


def until_idle(http: httpx.Client) -> dict:
    until(lambda: not (now := state(http))["running"] and not now["waiting"])
    now = state(http)
    assert now["pages_free"] + now["pages_held"] == now["pages_total"] and not now["pages_locked"]
    return now


# ---- what it answers


def test_a_text_and_its_ids_get_what_the_engine_says(http, offline):
    said = offline.generate(PROMPT, SamplingParams(**GREEDY))[0].outputs[0]
    ids = offline.tokenizer.encode(PROMPT)
    for source in ({"text": PROMPT}, {"input_ids": ids}):
        answer = generate(http, **source, sampling_params=GREEDY)
        assert answer["text"] == said.text and answer["output_ids"] == said.token_ids
        meta = answer["meta_info"]
        assert meta["finish_reason"] == {"type": "length", "length": 24}
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(ids), 24) and meta["e2e_latency"] > 0


def test_a_stream_has_the_text_so_far(http):
    whole = generate(http, text=PROMPT, sampling_params=GREEDY)
    got = events(http, text=PROMPT, sampling_params=GREEDY, rid="mine")
    assert len(got) > 1 and got[-1]["text"] == whole["text"] and got[-1]["output_ids"] == whole["output_ids"]
    for before, after in itertools.pairwise(got):
        assert after["text"].startswith(before["text"]) and before["meta_info"]["finish_reason"] is None
    assert {e["meta_info"]["id"] for e in got} == {"mine"} and "index" not in got[0]


def test_a_batch_and_its_samples_keep_their_order(http):
    texts = [PROMPT, "One day", "The"]
    alone = [generate(http, text=text, sampling_params=GREEDY)["text"] for text in texts]
    batch = generate(http, text=texts, sampling_params=GREEDY | {"n": 2}, rid=["a", "b", "c"])
    assert [x["text"] for x in batch] == [text for text in alone for _ in range(2)]
    assert [x["meta_info"]["id"] for x in batch] == ["a", "a", "b", "b", "c", "c"]
    each = generate(http, text=texts, sampling_params=[GREEDY | {"max_new_tokens": n} for n in (1, 2, 3)])
    assert [len(x["output_ids"]) for x in each] == [1, 2, 3]
    last = {e["index"]: e["text"] for e in events(http, text=texts, sampling_params=GREEDY)}
    assert last == dict(enumerate(alone))


def test_a_batch_of_one_is_a_list(http):
    assert len(generate(http, text=[PROMPT], sampling_params=GREEDY)) == 1
    assert len(generate(http, input_ids=[[5, 6]], sampling_params=GREEDY)) == 1


def test_what_stops_a_text_is_said(http, offline):
    text = generate(http, text=PROMPT, sampling_params=GREEDY)["text"]
    stop = text[10:13]
    meta = generate(http, text=PROMPT, sampling_params=GREEDY | {"stop": [stop]})["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": stop}


def test_logprobs(http):
    params = {"return_logprob": True, "top_logprobs_num": 2, "return_text_in_logprobs": True}
    answer = generate(http, text=PROMPT, sampling_params=GREEDY, **params)
    meta = answer["meta_info"]
    assert [id for _, id, _ in meta["output_token_logprobs"]] == answer["output_ids"]
    assert "".join(text for *_, text in meta["output_token_logprobs"]) == answer["text"]
    for (logprob, id, _), top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert len(top) == 2 and top[0][:2] == [logprob, id] and logprob <= 0  # greedy: the likeliest
    assert (
        len(events(http, text=PROMPT, sampling_params=GREEDY, **params)[-1]["meta_info"]["output_token_logprobs"]) == 24
    )


def test_a_grammar_and_sglangs_own_names(http):
    params = {"regex": "[0-9]{4}", "sampling_seed": 7, "top_k": -1, "no_stop_trim": False}
    texts = {generate(http, text=PROMPT, sampling_params=params)["text"] for _ in range(2)}
    assert len(texts) == 1 and len(text := texts.pop()) == 4 and text.isdigit()
    form = {"json_schema": json.dumps({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]})}
    assert "a" in json.loads(generate(http, text=PROMPT, sampling_params=form | {"json_finish": True})["text"])


def test_what_sglangs_benchmark_sends_is_taken(http):
    body = {"text": PROMPT, "sampling_params": GREEDY | {"ignore_eos": True}, "return_logprob": False}
    body |= {"logprob_start_len": -1, "lora_path": None, "image_data": None}
    assert events(http, **body)[-1]["meta_info"]["completion_tokens"] == 24


def test_logprobs_of_the_prompt_from_a_position_on(http):
    ids, nothing = list(range(300, 340)), {"max_new_tokens": 0}
    body = {"input_ids": ids, "sampling_params": nothing, "return_logprob": True, "top_logprobs_num": 2}
    whole = generate(http, **body, logprob_start_len=0)["meta_info"]
    part = generate(http, **body, logprob_start_len=35, return_text_in_logprobs=True)["meta_info"]
    assert whole["completion_tokens"] == part["completion_tokens"] == 0 and part["cached_tokens"] == 32
    assert whole["input_token_logprobs"][0] == [None, 300, None] and whole["input_top_logprobs"][0] is None
    assert [id for _, id, _ in whole["input_token_logprobs"]] == ids
    assert [len(top) for top in part["input_top_logprobs"]] == [2] * 5
    for (logprob, id, text), (expected, same, _) in zip(
        part["input_token_logprobs"], whole["input_token_logprobs"][35:], strict=True
    ):
        assert id == same and logprob == pytest.approx(expected, abs=1e-4) and isinstance(text, str)
    assert part["output_token_logprobs"] == []


def test_a_cached_prefix_is_said_and_flushed_and_salted(http):
    ids = list(range(5, 105))
    cached = [
        generate(http, input_ids=ids, sampling_params={"max_new_tokens": 1}, **salt)["meta_info"]["cached_tokens"]
        for salt in ({}, {}, {"cache_salt": "mine"})
    ]
    assert cached == [0, 96, 0]
    until_idle(http)
    assert http.post("/flush_cache").json() == {"success": True, "pages_held": 0}
    assert generate(http, input_ids=ids, sampling_params={"max_new_tokens": 1})["meta_info"]["cached_tokens"] == 0


def test_tokens_there_and_back(http, offline):
    said = http.post("/tokenize", json={"prompt": PROMPT}).json()
    ids = offline.tokenizer.encode(PROMPT)
    assert said == {"tokens": ids, "count": len(ids), "max_model_len": 2048}
    assert http.post("/tokenize", json={"prompt": [PROMPT, ""]}).json()["count"] == [len(ids), 0]
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"text": PROMPT}
    assert http.post("/detokenize", json={"tokens": [ids, []]}).json() == {"text": [PROMPT, ""]}


def test_where_the_tokenizer_is_does_not_depend_on_who_asks(monkeypatch):
    monkeypatch.chdir(MODEL.parent)
    _, facts = load(messages.Start(options={"model": MODEL.name, "dtype": "float32"}))
    assert (facts.model_path, facts.checkpoint) == (MODEL.name, str(MODEL))


def test_what_it_says_of_itself(http):
    assert http.get("/health").json() == http.get("/health_generate").json() == {"status": "ok"}
    model, info = http.get("/get_model_info").json(), http.get("/server_info").json()
    assert model["model_path"] == info["model_path"] == info["tokenizer_path"] == str(MODEL)
    assert model["is_generation"] and model["served_model_name"] == "folio-tiny"
    assert info["max_running_requests"] == 4 and info["internal_states"][0]["healthy"]
    paths = set(http.get("/openapi.json").json()["paths"])
    assert paths >= {"/generate", "/flush_cache", "/abort_request", "/tokenize", "/detokenize", "/metrics", "/health"}


def test_what_the_docs_show_works(http):
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    shown = re.findall(r"curl localhost:30000(/generate) [^']*'Content-Type: application/json' \\\n +-d '(.*?)'", page)
    assert shown
    for path, body in shown:
        assert http.post(path, json=json.loads(body)).status_code == 200


# ---- what it refuses


@pytest.mark.parametrize(
    "body, param",
    [
        ({"text": "x", "nothing": 1}, "nothing"),
        ({"text": "x", "sampling_params": {"nothing": 1}}, "sampling_params.nothing"),
        ({"text": ["x"], "sampling_params": [{"nothing": 1}]}, "sampling_params.0.nothing"),
        ({"text": "x", "sampling_params": {"temperature": "hot"}}, "sampling_params.temperature"),
        ({"text": "x", "stream": 1}, "stream"),
        ({"text": "x", "logprob_start_len": -2, "return_logprob": True}, "logprob_start_len"),
        ({"text": "x", "lora_path": "a"}, "lora_path"),
        ({"text": "x", "sampling_params": {"no_stop_trim": True}}, "sampling_params.no_stop_trim"),
        ({"input_ids": ["x"]}, "input_ids.0"),
    ],
)
def test_a_field_that_is_wrong_is_named(http, body, param):
    error = refused(http, "/generate", body)
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["message"].startswith(param)


@pytest.mark.parametrize(
    "body, about",
    [
        ({}, "text or input_ids"),
        ({"text": "x", "logprob_start_len": 0}, "logprob_start_len is given, but return_logprob is not"),
        ({"text": "x", "logprob_start_len": 99, "return_logprob": True}, "logprob_start_len is 99; the prompt has"),
        ({"text": "x", "input_ids": [5]}, "text or input_ids"),
        ({"text": []}, "text"),
        ({"text": ""}, "empty"),
        ({"input_ids": [[5], []]}, "empty"),
        ({"text": ["x"] * 257}, "256 is the limit"),
        ({"text": ["x", "y"], "rid": "a"}, "rid"),
        ({"text": ["x", "y"], "rid": ["a", "a"]}, "in use"),
        ({"text": ["x", "y"], "sampling_params": [{}]}, "sampling_params"),
        ({"input_ids": [5] * 3000}, "2048"),
        ({"input_ids": [5000]}, "vocabulary"),
        ({"text": "x", "top_logprobs_num": 2}, "return_logprob"),
        ({"text": "x", "return_logprob": True, "top_logprobs_num": 21}, "logprobs"),
        ({"text": "x", "sampling_params": {"logprobs": 2}}, "return_logprob"),
        ({"text": "x", "sampling_params": {"n": 129}}, "n is 129"),
        ({"text": "x", "sampling_params": {"seed": 1, "sampling_seed": 2}}, "seed and sampling_seed are the same"),
        ({"text": "x", "sampling_params": {"logprob_start_len": 2}}, "stands beside sampling_params"),
        ({"text": "x", "sampling_params": {"stop": ["a"] * 17}}, "stop"),
        ({"text": "x", "sampling_params": {"stop": "a" * 300}}, "stop"),
        ({"text": "x", "sampling_params": {"logit_bias": dict.fromkeys(map(str, range(301)), 1)}}, "logit_bias"),
        ({"text": "x", "sampling_params": {"regex": "(" * 300}}, "regex"),
        ({"text": "x", "sampling_params": {"json_schema": {"type": "nothing"}}}, "json_schema"),
        ({"text": "x", "stream": True, "sampling_params": {"ebnf": "root ::= nowhere"}}, "ebnf"),
    ],
)
def test_a_value_that_is_wrong_is_said(http, body, about):
    assert about in refused(http, "/generate", body)["message"]


def test_other_routes_refuse_likewise(http):
    assert refused(http, "/tokenize", {"prompt": 1})["param"] == "prompt"
    assert "limit" in refused(http, "/tokenize", {"prompt": [""] * 257})["message"]
    assert "limit" in refused(http, "/detokenize", {"tokens": [[]] * 257})["message"]
    assert "vocabulary" in refused(http, "/detokenize", {"tokens": [5000]})["message"]
    assert "rid or abort_all" in refused(http, "/abort_request", {})["message"]
    assert http.get("/server_info?check=maybe").json()["error"]["param"] == "check"
    assert refused(http, "/tokenize", {"prompt": "a", "model": "other"}, 404)["param"] == "model"
    assert refused(http, "/nothing", {}, 404)["type"] == "not_found_error"
    assert http.get("/generate").status_code == 405 and "error" in http.get("/generate").json()
    assert refused(http, "/generate", {"text": "x" * 2**20}, 413)["code"] == "body_too_large"


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b'{"text": "a', "application/json", "the body is not valid JSON: "),
        (b'{"text": "\xff"}', "application/json", "the body is not JSON in UTF-8"),
        (b'{"text": "a"}', "text/plain", "only if it is sent with Content-Type: application/json"),
    ],
)
def test_a_body_that_is_no_json_is_told_so(http, path, content, kind, says):
    response = http.post(path, content=content, headers={"Content-Type": kind})
    assert response.status_code == 400 and says in response.json()["error"]["message"]


def test_a_batch_with_one_wrong_prompt_leaves_nothing_behind(http):
    refused(http, "/generate", {"input_ids": [[5], [6], [5000]], "sampling_params": LONG})
    assert until_idle(http)["healthy"]


def test_a_queue_that_is_full_says_when_to_come_again(http):
    response = http.post("/generate", json={"text": ["x"] * 65, "sampling_params": LONG})  # 4 run, 60 wait
    assert response.status_code == 503 and response.headers["retry-after"]
    assert response.json()["error"]["code"] == "server_busy"
    until_idle(http)


# ---- who leaves


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_aborted(http, server, stream):
    before = state(http)["steps"]

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=server.url) as client:
            body = {"text": [PROMPT, "x"], "sampling_params": LONG | {"n": 2}, "stream": stream}
            async with asyncio.timeout(HANG):
                if not stream:
                    task = asyncio.create_task(client.post("/generate", json=body))
                    while not (await client.get("/server_info")).json()["internal_states"][0]["running"]:
                        pass
                    task.cancel()
                    return
                async with client.stream("POST", "/generate", json=body) as response:
                    async for _ in response.aiter_lines():
                        return

    asyncio.run(leave())
    assert until_idle(http)["steps"] - before < 1000  # it would have gone on for 1,500
    assert http.get("/server_info").json()["open_requests"] == 0


def test_a_client_that_does_not_read_holds_nobody(http, server):
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"text": PROMPT, "sampling_params": LONG, "stream": True}).encode()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((host, int(port)))
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        raw.sendall(head.encode() + b"\r\n\r\n" + body)
        until(lambda: state(http)["running"])
        assert generate(http, text="x", sampling_params=GREEDY)["text"]
        until(lambda: http.get("/server_info").json()["open_requests"] == 0)  # all 1,500 tokens are there, and wait
        until_idle(http)
        raw.settimeout(HANG)
        got = b""
        while b"[DONE]" not in got[-100:]:
            chunk = raw.recv(1 << 20)
            assert chunk, "cut off"
            got += chunk
    assert got.count(b'"type":"length"') == 1


def test_a_request_can_be_aborted_by_its_id(http):
    got = []
    reader = threading.Thread(
        target=lambda: got.extend(events(http, text=PROMPT, sampling_params=LONG, rid="to abort"))
    )
    reader.start()
    until(lambda: state(http)["running"])
    assert http.post("/abort_request", json={"rid": "another"}).json() == {"success": True}
    assert http.post("/abort_request", json={"rid": "to abort"}).json() == {"success": True}
    reader.join(HANG)
    assert got[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    until_idle(http)
