"""Bodies that nobody should send: always an answer, always JSON, never a 5xx, and the engine lives.

python -m pytest tests/test_server_hostile.py
"""

import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_process import Server
from waiting import HANG

from serving.native_protocol import AbortRequest, DetokenizeRequest, GenerateRequest, SGLangParams, TokenizeRequest
from serving.openai_protocol import ChatRequest, CompletionRequest, EmbeddingRequest

ODD = st.sampled_from([
    float("nan"), float("inf"), -float("inf"), 1e308, -1, 2**31, 2**63, 2**64, 10**400, 1e-320, True, None, "", "\x00",
    "\ud800", "a" * 5000, "💥" * 100, [], {}, [[]], [None], {"": ""}, "(" * 50, "[" * 500, "\\", "NaN", "0",
])  # fmt: skip
TREES = st.recursive(ODD, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))


def values(fields) -> st.SearchStrategy:
    """An object with some of these fields, and odd things in them."""
    return st.dictionaries(st.sampled_from(sorted(fields)) | st.text(max_size=5), ODD | TREES, max_size=3)


SHORT = {"max_new_tokens": 2}
GENERATE = values(GenerateRequest.model_fields).map(lambda x: {"text": "a", "sampling_params": SHORT} | x)
PARAMS = values(SGLangParams.model_fields).map(lambda x: {"text": "a", "sampling_params": SHORT | x})
OTHERS = st.one_of(
    *(
        st.tuples(st.just(path), values(model.model_fields))
        for path, model in (
            ("/tokenize", TokenizeRequest),
            ("/detokenize", DetokenizeRequest),
            ("/abort_request", AbortRequest),
        )
    )
)
HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
CHAT = values(ChatRequest.model_fields).map(lambda x: HI | x)
TOOL = st.fixed_dictionaries(
    {"type": st.just("function"), "function": values(("name", "parameters", "strict", "description"))}
)
CALLED = st.lists(TOOL | TREES, max_size=3).map(lambda tools: HI | {"tools": tools, "tool_choice": "required"})
SAID = st.lists(
    values(("role", "content", "tool_calls", "name", "tool_call_id", "reasoning_content")) | ODD, max_size=3
)
SAYING = SAID.map(lambda messages: HI | {"messages": HI["messages"] + messages})
COMPLETION = values(CompletionRequest.model_fields).map(lambda x: {"prompt": "a", "max_tokens": 2} | x)
EMBEDDING = values(EmbeddingRequest.model_fields).map(lambda x: {"input": "a"} | x)
OPENAI = st.one_of(
    st.tuples(st.just("/v1/chat/completions"), CHAT | CALLED | SAYING),
    st.tuples(st.just("/v1/completions"), COMPLETION),
    st.tuples(st.just("/v1/embeddings"), EMBEDDING),
)
ROUTES = [
    "/generate",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/abort_request",
]
QUICK = settings(max_examples=120)


@pytest.fixture(scope="module")
def http(server: Server):
    with httpx.Client(base_url=server.url, timeout=HANG) as client:
        yield client
        assert client.get("/health_generate").status_code == 200
        assert client.get("/server_info").json()["engine_restarts"] == 0


def post(http: httpx.Client, path: str, content: bytes, kind: str = "application/json") -> None:
    response = http.post(path, content=content, headers={"Content-Type": kind})
    assert response.status_code < 500, response.text
    if response.headers["content-type"] == "application/json":
        json.loads(response.content.decode(), parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@QUICK
@given(GENERATE)
def test_odd_requests(http, body):
    post(http, "/generate", json.dumps(body).encode())


@QUICK
@given(PARAMS, st.booleans())
def test_odd_sampling_parameters(http, body, stream):
    post(http, "/generate", json.dumps(body | {"stream": stream}).encode())


@QUICK
@given(OTHERS)
def test_odd_requests_to_other_routes(http, asked):
    path, body = asked
    post(http, path, json.dumps(body).encode())


@QUICK
@given(OPENAI, st.booleans())
def test_odd_requests_to_the_openai_routes(http, asked, stream):
    path, body = asked
    post(http, path, json.dumps({"stream": stream} | body if path != "/v1/embeddings" else body).encode())


@QUICK
@given(
    st.sampled_from(ROUTES), st.binary(max_size=200) | TREES.map(lambda x: json.dumps(x, ensure_ascii=True).encode())
)
def test_bodies_that_are_none(http, path, content):
    post(http, path, content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"text": "a"',
        b'{"text": "\xff"}',
        '{"text": "a"}'.encode("utf-16"),
        b"\xef\xbb\xbf" + b'{"text": "a"}',
        b"[" * 100_000,
        b'{"text": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"}",
        b'{"text": "a", "sampling_params": {"json_schema": ' + b'{"items":' * 900 + b"true" + b"}" * 900 + b"}}",
        b'{"text": "a", "priority": 1' + b"0" * 5_000 + b"}",
        b'{"text": "a", "text": "b"}',
        b'{"input_ids": [' + b"5," * 100_000 + b"5]}",
        b'{"text": "' + b"a" * 1_000_000 + b'"}',
        b'{"input_ids": [' + b'"5",' * 200_000 + b"5]}",
        b'{"text": [' + b"5," * 200_000 + b"5]}",
        json.dumps({"text": "a"} | dict.fromkeys(map(str, range(60_000)), 1)).encode(),
        json.dumps(
            {"text": "a", "sampling_params": {"logit_bias": dict.fromkeys(map(hex, range(60_000)), 1)}}
        ).encode(),
    ],
    ids=range(17),
)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize(
    "path, field", [("/generate", b'"text"'), ("/v1/chat/completions", b'"messages"'), ("/v1/completions", b'"prompt"')]
)
def test_bodies_made_by_hand(http, path, field, content, kind):
    post(http, path, content.replace(b'"text"', field), kind)


DEEP = b'{"items":' * 900 + b"true" + b"}" * 900
TOOL_OF = b'{"messages": [{"role": "user", "content": "Hi"}], "tools": [{"type": "function", "function": %s}]}'


@pytest.mark.parametrize(
    "content",
    [
        TOOL_OF % (b'{"name": "a", "parameters": ' + DEEP + b"}"),
        TOOL_OF % b'{"name": "a", "parameters": {"$ref": "#"}}',
        TOOL_OF % b'{"name": "\\ud800"}',
        TOOL_OF % b'{"name": "a", "parameters": {"type": "object", "properties": {"a": {"pattern": "(" }}}}',
        TOOL_OF % b'{"name": "a"}}, {"type": "function", "function": {"name": "a"}',
        b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[[["}}]}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}',
        b'{"messages": [{"role": "user", "content": "{{ 7 * 7 }}{% raw %}"}], "max_tokens": 1}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"messages": []}}',
        b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"messages": [{"role": "user", "content": "Hi"}], "guided_json": ' + DEEP + b"}",
        b'{"messages": [{"role": "user", "content": "Hi"}], "structural_tag": {"type": "structural_tag", "format": '
        b'{"type": "tool_calls", "notation": "qwen_3", "tools": [' + b'{"function": {"name": "a"}},' * 20_000 + b"1]}}}",
        b'{"messages": [{"role": "user", "content": "Hi"}], "structural_tag": {"type": "structural_tag", "format": '
        b'{"type": "tool_calls", "notation": [], "tools": 1, "other": 1}}}',
    ],
    ids=range(13),
)  # fmt: skip
def test_chats_made_by_hand(http, content):
    post(http, "/v1/chat/completions", content)


@pytest.mark.parametrize("priority", [2**31, -(2**63), 2**63, 2**70])
def test_numbers_that_are_large(http, priority):
    post(http, "/generate", json.dumps({"text": "a", "sampling_params": SHORT, "priority": priority}).encode())


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "nothing"])
def test_bodies_that_are_encoded(http, path, encoding):
    response = http.post(
        path, content=b"\x1f\x8b\x08\x00", headers={"Content-Encoding": encoding, "Content-Type": "application/json"}
    )
    assert response.status_code == 400 and response.json()["error"]["message"]


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00", b"POST /generate HTTP/1.1\r\nHost: x\r\n"]
)
def test_what_is_no_http(http, server, said):
    import socket

    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=HANG) as raw:
        raw.sendall(said)
        raw.shutdown(socket.SHUT_WR)
        assert not raw.recv(4096).startswith(b"HTTP/1.1 5")
