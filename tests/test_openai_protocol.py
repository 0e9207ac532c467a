"""Requests of the OpenAI API as models: what is taken, what it means, and how a refusal names what is wrong. No server, no engine.

python -m pytest tests/test_openai_protocol.py
"""

import json
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException

from errors import UserError
from scheduler.request import SamplingParams
from serving.api_errors import ApiError, error_response
from serving.openai_protocol import ChatRequest, CompletionRequest, refused
from serving.openai_route import NamingRoute
from serving.params import sampling_params

JSON = {"content-type": "application/json"}
HI = [{"role": "user", "content": "Hi"}]


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": HI} | fields)


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "Hi"} | fields)


@pytest.fixture(scope="module")
def client():
    routes = APIRouter(route_class=NamingRoute)

    @routes.post("/chat")
    def take_chat(body: ChatRequest) -> dict:
        return body.params()

    @routes.post("/completion")
    def take_completion(body: CompletionRequest) -> dict:
        return body.params() | {"prompts": len(body.prompts(1000))}

    async def answer(request: Request, error: Exception):
        return error_response(error)

    app = FastAPI()
    app.include_router(routes)
    for kind in (ApiError, HTTPException):
        app.add_exception_handler(kind, answer)
    return TestClient(app)


# ---- what it means


def test_every_sampling_field_reaches_the_engine():
    asked = dict(
        n=2, temperature=0.5, top_p=0.9, frequency_penalty=0.1, presence_penalty=0.2, seed=3, stop=["a"], logit_bias={"5": -1},
        max_tokens=9, top_k=4, min_p=0.05, repetition_penalty=1.1, min_tokens=2, ignore_eos=True, stop_token_ids=[7],
        skip_special_tokens=False,
    )  # fmt: skip
    expected = dict(asked, logit_bias={5: -1}, max_new_tokens=9, min_new_tokens=2)
    del expected["max_tokens"], expected["min_tokens"]
    for body, logprobs in ((chat(**asked, logprobs=True, top_logprobs=3), 3), (completion(**asked, logprobs=3), 3)):
        params = sampling_params(json.loads(json.dumps(body.params())))  # as it travels
        assert params == SamplingParams(**expected, logprobs=logprobs)


@pytest.mark.parametrize(
    ("asked", "means"),
    [
        (dict(guided_json={"type": "integer"}), dict(json_schema='{"type": "integer"}')),
        (dict(guided_json='{"type": "integer"}'), dict(json_schema='{"type": "integer"}')),
        (dict(guided_regex="a+"), dict(regex="a+")),
        (dict(regex="a+"), dict(regex="a+")),
        (dict(guided_choice=["a", "b"]), dict(choices=["a", "b"])),
        (dict(choice=["a", "b"]), dict(choices=["a", "b"])),
        (dict(guided_grammar="root ::= a"), dict(ebnf="root ::= a")),
        (dict(ebnf="root ::= a"), dict(ebnf="root ::= a")),
        (dict(structural_tag={"type": "structural_tag"}), dict(structural_tag='{"type": "structural_tag"}')),
        (dict(response_format={"type": "json_object"}), dict(json_object=True)),
        (dict(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": True}}),
         dict(json_schema="{}")),
        (dict(response_format={"type": "structural_tag", "format": {"type": "any_text"}}),
         dict(structural_tag='{"type": "structural_tag", "format": {"type": "any_text"}}')),
        (dict(response_format={"type": "text"}), {}),
    ],
)  # fmt: skip
def test_what_the_output_must_be(asked, means):
    assert completion(**asked).params() == {"max_new_tokens": 16, "logprobs": None} | means
    assert chat(**asked).params() == {"max_new_tokens": None, "logprobs": None} | means


def test_null_is_the_same_as_nothing():
    nothing = {name: None for name in ChatRequest.model_fields if name != "messages"}
    assert chat(**nothing).params() == chat().params() == {"max_new_tokens": None, "logprobs": None}


def test_top_k_minus_one_is_off():
    assert chat(top_k=-1).params()["top_k"] == 0


def test_max_completion_tokens_is_the_newer_name():
    assert chat(max_completion_tokens=5).params()["max_new_tokens"] == 5
    assert chat(max_completion_tokens=5, max_tokens=5).params()["max_new_tokens"] == 5


@pytest.mark.parametrize(("as_text", "arguments"), [(True, '{"city": "Oslo"}'), (False, {"city": "Oslo"})])
def test_a_call_of_the_history_has_the_arguments_that_its_template_wants(as_text, arguments):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    said = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    [message] = chat(messages=[said]).messages
    rendered = message.for_template(as_text)
    assert rendered["tool_calls"][0]["function"]["arguments"] == arguments
    assert rendered.keys() == {"role", "tool_calls"}


@pytest.mark.parametrize("arguments", ["{", "[]", "5", "[" * 100_000])
def test_arguments_that_are_no_object_are_refused(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    [message] = chat(messages=[{"role": "assistant", "tool_calls": [call]}]).messages
    with pytest.raises(ApiError, match="the arguments of a tool call"):
        message.for_template(arguments_as_text=False)


# ---- what is refused


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        (dict(frequency=1), "frequency", "frequency is not supported"),
        (dict(functions=[]), "functions", "functions is not supported"),
        (dict(temperature="hot"), "temperature", "temperature: 'hot' is not a number"),
        (dict(temperature=True), "temperature", "True is not a number"),
        (dict(n="2"), "n", "n: "),
        (dict(n=2.5), "n", "n: "),
        (dict(seed=2**63), "seed", "seed: "),
        (dict(stop=[5]), "stop[0]", "stop[0]: "),
        (dict(stream="yes"), "stream", "stream: "),
        (dict(stream_options={"include_usage": True}), None, "set stream to true"),
        (dict(stream=True, stream_options={"obfuscate": True}), "stream_options.obfuscate", "is not supported"),
        (dict(messages=[]), "messages", "messages: "),
        (dict(messages="Hi"), "messages", "messages: "),
        (dict(messages=[{"role": "robot", "content": "Hi"}]), "messages[0].role", "messages[0].role: "),
        (dict(messages=[{"role": "user"}]), "messages[0]", "content is missing"),
        (dict(messages=[{"content": "Hi"}]), "messages[0].role", "messages[0].role is missing"),
        (dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
         "messages[0].content[0]", "a part of type 'image_url' is not supported"),
        (dict(messages=[{"role": "user", "content": "Hi", "tool_calls": [
            {"function": {"name": "a", "arguments": "{}"}}]}]), "messages[0]", "only an assistant"),
        (dict(messages=[*HI, {"role": "user", "content": "\ud800"}]), "messages[1].content", "not valid Unicode"),
        (dict(rid="\ud800"), "rid", "not valid Unicode"),
        (dict(rid=""), "rid", "rid: "),
        (dict(max_tokens=5, max_completion_tokens=6), None, "say different things"),
        (dict(top_logprobs=3), None, "logprobs is not true"),
        (dict(tool_choice="required"), None, "tool_choice is about tools"),
        (dict(parallel_tool_calls=True), None, "parallel_tool_calls is about tools"),
        (dict(tools=[{"type": "web_search"}]), "tools[0].type", "tools[0].type: "),
        (dict(response_format={"type": "json_schema"}), "response_format", "json_schema goes with the type"),
        (dict(response_format={"type": "xml"}), "response_format.type", "response_format.type: "),
        (dict(regex="a", ebnf="b"), "ebnf", "regex and ebnf are given"),
        (dict(logit_bias={"-1": 1}), "logit_bias", "must be a token id"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field(client, asked, param, says):
    answer = client.post("/chat", content=json.dumps({"messages": HI} | asked), headers=JSON)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error") and says in error["message"]


@pytest.mark.parametrize(
    ("prompt", "param"),
    [(None, "prompt"), ([], "prompt"), ({}, "prompt"), (["a", 5], "prompt[1]"), ([[1], ["a"]], "prompt[1][0]"),
     (["a"] * 2000, "prompt"), ([1.5], "prompt[0]")],
)  # fmt: skip
def test_a_prompt_that_is_none(client, prompt, param):
    answer = client.post("/completion", json={"prompt": prompt})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff\xfe", b"null", b"[]", b'{"messages": NaN}', b'{"temperature": 1e999, "messages": []}',
        b'{"seed": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"temperature": NaN, "messages": [{"role": "user", "content": "a"}]}',
    ],
)  # fmt: skip
def test_hostile_bodies_are_bad_requests(client, body):
    answer = client.post("/chat", content=body, headers=JSON)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_body_that_does_not_say_it_is_json(client):
    answer = client.post("/chat", content=json.dumps({"messages": HI}))
    assert answer.status_code == 400 and "Content-Type" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("message", "asked", "told", "param"),
    [
        ("top_p is 7; it must be", dict(top_p=7), "top_p is 7; it must be", "top_p"),
        ("max_new_tokens is -1; no", dict(max_tokens=-1), "max_tokens is -1; no", "max_tokens"),
        ("regex is wrong", dict(guided_regex="("), "guided_regex is wrong", "guided_regex"),
        ("json_schema $ is", dict(response_format={"type": "json_object"}), "response_format $ is", "response_format"),
        ("the prompt is empty", {}, "the prompt is empty", None),
        ("top_p is 7", {}, "top_p is 7", None),
    ],
)
def test_what_the_engine_refuses_is_told_by_the_name_that_the_client_used(message, asked, told, param):
    error = refused(UserError(message), chat(**asked))
    assert (error.status, str(error), error.param) == (400, told, param)
