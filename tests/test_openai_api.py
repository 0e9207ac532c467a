"""The OpenAI API, by the client that people have: `openai`, against the bundled model.

python -m pytest tests/test_openai_api.py
"""

import asyncio
import base64
import json
import math
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from openai_server import InProcess, Scripted, app_of, served
from pydantic import BaseModel
from server_process import running
from waiting import until

from engine import Engine, SamplingParams
from serving.api_errors import RequestFailed

TINY = Path(__file__).parent.parent / "assets" / "folio-tiny"
MODEL = "folio-tiny"
OSLO = [{"role": "user", "content": "What is the weather in Oslo?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(TINY, dtype="float32")


@pytest.fixture(scope="module")
def url(engine):
    with served(app_of(InProcess(engine), engine.tokenizer)) as address:
        yield address + "/v1"


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def conserved(engine):
    yield
    until(lambda: not engine.has_work)
    engine.check()


def offline(engine, prompt, **params) -> str:
    return engine.generate([prompt], SamplingParams(**params))[0].outputs[0].text


# ---- completions


def test_a_completion_is_what_the_engine_says(client, engine):
    answer = client.completions.create(model=MODEL, prompt="Once upon a time", temperature=0, max_tokens=12)
    ids = engine.tokenizer.encode("Once upon a time")
    assert answer.choices[0].text == offline(engine, ids, temperature=0, max_new_tokens=12)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    assert answer.usage.total_tokens == len(ids) + 12
    assert answer.object == "text_completion" and answer.model == MODEL


def test_sixteen_tokens_if_nothing_is_said(client):
    assert (
        client.completions.create(model=MODEL, prompt="Once", extra_body={"ignore_eos": True}).usage.completion_tokens
        == 16
    )


def test_a_stream_adds_up_to_the_whole(client):
    asked = dict(model=MODEL, prompt="Once upon a time", seed=5, max_tokens=20, n=2)
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts = {i: "".join(c.text for chunk in chunks for c in chunk.choices if c.index == i) for i in (0, 1)}
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert len(chunks) > 20
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_prompts_of_all_four_forms(client, engine):
    ids = engine.tokenizer.encode("Once upon a time")
    asked = dict(model=MODEL, temperature=0, max_tokens=6)
    text = client.completions.create(prompt="Once upon a time", **asked).choices[0].text
    assert client.completions.create(prompt=ids, **asked).choices[0].text == text
    for many in (["Once upon a time", "The cat"], [ids, engine.tokenizer.encode("The cat")]):
        answer = client.completions.create(prompt=many, n=2, **asked)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.choices[0].text == answer.choices[1].text == text != answer.choices[2].text
        assert answer.usage.prompt_tokens == len(ids) + len(engine.tokenizer.encode("The cat"))


def test_echo_brings_the_prompt_first(client, engine):
    ids = engine.tokenizer.encode("Once upon a time")
    for prompt in ("Once upon a time", ids):
        asked = dict(model=MODEL, prompt=prompt, temperature=0, max_tokens=4)
        plain = client.completions.create(**asked).choices[0].text
        assert client.completions.create(**asked, echo=True).choices[0].text == "Once upon a time" + plain
        chunks = client.completions.create(**asked, echo=True, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Once upon a time" + plain


def test_logprobs_of_a_completion(client):
    answer = client.completions.create(
        model=MODEL, prompt="Once upon", temperature=0, max_tokens=5, logprobs=2, extra_body={"ignore_eos": True}
    )
    choice, given = answer.choices[0], answer.choices[0].logprobs
    assert len(given.tokens) == len(given.token_logprobs) == len(given.top_logprobs) == len(given.text_offset) == 5
    assert "".join(given.tokens) == choice.text
    for token, at in zip(given.tokens, given.text_offset, strict=True):
        assert choice.text[at : at + len(token)] == token
    for token, logprob, top in zip(given.tokens, given.token_logprobs, given.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values()) and len(top) == 2


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_an_echo(client, engine, max_tokens, stream):
    text = "Once upon a time there was"
    ids = engine.tokenizer.encode(text)
    asked = dict(model=MODEL, prompt=[text, text], echo=True, logprobs=1, temperature=0, max_tokens=max_tokens)
    asked |= dict(extra_body={"ignore_eos": True}, stream=stream)
    answer = client.completions.create(**asked)
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    scored = engine.generate([ids], SamplingParams(prompt_logprobs=0, max_new_tokens=1))[0].prompt_logprobs
    for i in (0, 1):
        mine = [choice for choice in choices if choice.index == i]
        whole = "".join(choice.text for choice in mine)
        assert whole.startswith(text) and (len(whole) == len(text)) == (max_tokens == 0)
        assert mine[-1].finish_reason == "length"
        given = {
            field: [x for choice in mine if choice.logprobs for x in getattr(choice.logprobs, field)]
            for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        assert {len(values) for values in given.values()} == {len(ids) + max_tokens}
        assert given["token_logprobs"][0] is given["top_logprobs"][0] is None
        assert given["token_logprobs"][1 : len(ids)] == pytest.approx([token.logprob for token in scored], abs=1e-4)
        assert "".join(given["tokens"]) == whole
        assert given["text_offset"] == [len("".join(given["tokens"][:n])) for n in range(len(given["tokens"]))]
    if not stream:
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2 * len(ids), 2 * max_tokens)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("encoding", ["float", "base64", openai.NOT_GIVEN])
def test_embeddings(client, engine, pooling, encoding):
    texts = ["A dog.", "A cat sat on a mat."]
    ids = [engine.tokenizer.encode(text) for text in texts]
    extra = {"pooling": pooling}
    answer = client.embeddings.create(model=MODEL, input=texts, encoding_format=encoding, extra_body=extra)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
    for found, expected in zip(answer.data, engine.embed(ids, pooling), strict=True):
        if encoding == "base64":
            found.embedding = array("f", base64.b64decode(found.embedding)).tolist()
        length = math.hypot(*expected)
        assert found.embedding == pytest.approx([x / length for x in expected], abs=1e-5)
    again = client.embeddings.create(model=MODEL, input=ids[0], encoding_format="float", extra_body=extra)
    assert again.data[0].embedding == pytest.approx(
        [x / math.hypot(*engine.embed([ids[0]], pooling)[0]) for x in engine.embed([ids[0]], pooling)[0]], abs=1e-5
    )


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (dict(input=""), None),
        (dict(input=[]), "input"),
        (dict(input="a", dimensions=8), "dimensions"),
        (dict(input=[[99999]]), None),
    ],
)
def test_what_cannot_be_embedded(client, asked, param):
    with pytest.raises(openai.BadRequestError) as info:
        client.embeddings.create(model=MODEL, **asked)
    assert info.value.param == param


def test_cached_tokens_are_told(client):
    asked = dict(
        model=MODEL, prompt="A story of long ago. " * 20, max_tokens=1, extra_body={"cache_salt": "of this test"}
    )
    first, second = (client.completions.create(**asked).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 0 < second.prompt_tokens_details.cached_tokens < second.prompt_tokens


@pytest.mark.parametrize("field", ["guided_regex", "regex"])
def test_a_regex_is_kept_to(client, field):
    answer = client.completions.create(
        model=MODEL, prompt="My number is ", max_tokens=30, extra_body={field: "[0-9]{3}-[0-9]{4}", "min_p": 0.0}
    )
    head, _, tail = answer.choices[0].text.partition("-")
    assert head.isdigit() and tail.isdigit() and len(head + tail) == 7


def test_a_stop_string_ends_a_text(client, engine):
    text = offline(engine, "Once upon a time", temperature=0, max_new_tokens=30)
    stop = text[10:14]
    answer = client.completions.create(model=MODEL, prompt="Once upon a time", temperature=0, max_tokens=30, stop=stop)
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"


# ---- chat


def test_a_chat(client, engine):
    answer = client.chat.completions.create(model=MODEL, messages=OSLO, temperature=0, max_tokens=20)
    ids = engine.tokenizer.apply_chat_template(OSLO)
    assert answer.choices[0].message.content == offline(engine, ids, temperature=0, max_new_tokens=20)
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.tool_calls is None
    assert answer.usage.prompt_tokens == len(ids) and answer.id.startswith("chatcmpl-")


def test_a_chat_streams(client):
    asked = dict(model=MODEL, messages=OSLO, temperature=0, max_completion_tokens=20)
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_several_answers_differ_and_repeat_with_a_seed(client):
    story = [{"role": "user", "content": "Tell me a story."}]
    asked = dict(model=MODEL, messages=story, n=3, seed=7, temperature=1.2, max_tokens=16)
    texts = [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in client.chat.completions.create(**asked).choices]


def test_content_in_parts_and_a_developer(client, engine):
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "What is the"}, {"type": "text", "text": "weather?"}]},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=4)
    plain = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is the\nweather?"}]
    assert answer.usage.prompt_tokens == len(engine.tokenizer.apply_chat_template(plain))


def test_logprobs_of_a_chat(client):
    asked = dict(model=MODEL, messages=OSLO, temperature=0, max_tokens=40, logprobs=True, top_logprobs=3)
    choice = client.chat.completions.create(**asked).choices[0]
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    for token in choice.logprobs.content:
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 3 and token.logprob == max(top.logprob for top in token.top_logprobs) <= 0
    chunks = client.chat.completions.create(**asked, stream=True)
    streamed = [t.token for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == [token.token for token in choice.logprobs.content]
    without = client.chat.completions.create(**(asked | {"top_logprobs": None}), stream=False).choices[0].logprobs
    assert without.content[0].top_logprobs == []


# ---- structured output and tools


def test_parse_gives_an_object_of_the_model(client):
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Mia is 7."}],
        response_format=Person,
        temperature=0,
        max_tokens=100,
        extra_body={"json_finish": True},
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_any_json_object(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=OSLO,
        response_format={"type": "json_object"},
        max_tokens=60,
        seed=1,
        extra_body={"json_finish": True},
    )
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_a_tool_is_called(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=OSLO, tools=[WEATHER], tool_choice="required", temperature=0, max_tokens=100
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.tool_calls[0].function.name == "get_weather"
    assert set(json.loads(choice.message.tool_calls[0].function.arguments)) == {"city"}
    follow_up = [
        *OSLO,
        choice.message.model_dump(exclude_unset=True),
        {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": '{"sky": "sunny"}'},
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=follow_up, tools=[WEATHER], temperature=0, max_tokens=30
    )
    assert answer.choices[0].message.content


def test_the_model_may_choose_to_call(client):
    answer = client.chat.completions.create(model=MODEL, messages=OSLO, tools=[WEATHER], temperature=0, max_tokens=100)
    assert answer.choices[0].finish_reason == "tool_calls"  # it has learnt to
    none = client.chat.completions.create(
        model=MODEL, messages=OSLO, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=60
    )
    assert none.choices[0].message.tool_calls is None


def test_a_tool_call_streams(client):
    asked = dict(model=MODEL, messages=OSLO, tools=[WEATHER], temperature=0, max_tokens=100)
    asked["tool_choice"] = {"type": "function", "function": {"name": "get_weather"}}
    [whole] = client.chat.completions.create(**asked).choices[0].message.tool_calls
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    pieces = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert pieces[0].function.name == "get_weather" and pieces[0].id and len(pieces) > 2
    assert all(piece.index == 0 and piece.id is None for piece in pieces[1:])
    assert "".join(piece.function.arguments for piece in pieces) == whole.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"


def test_with_tools_and_a_schema_the_answer_is_either(client):
    asked = dict(model=MODEL, messages=OSLO, tools=[WEATHER], max_tokens=100, extra_body={"json_finish": True})
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": Person.model_json_schema()}}
    for seed in range(4):
        message = (
            client.chat.completions.create(**asked, response_format=form, seed=seed, temperature=1.2).choices[0].message
        )
        if message.tool_calls:
            assert set(json.loads(message.tool_calls[0].function.arguments)) == {"city"}
        else:
            assert Person.model_validate_json(message.content)


# ---- what is wrong


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        (dict(temperature=1000), "temperature", "temperature is 1000"),
        (dict(max_tokens=-1), "max_tokens", "max_tokens is -1"),
        (dict(n=0), "n", "n: "),
        (dict(n=129), "n", "n: Input should be less than or equal to 128"),
        (dict(max_tokens=10**6), None, "exceed the context"),
        (dict(logit_bias={"x": 1}), "logit_bias", "the key 'x'"),
        (dict(logit_bias={"99999": 1}), "logit_bias", "logit_bias has token id 99999"),
        (dict(stop=["a"] * 17), "stop", "16 is the limit"),
        (dict(stop="a" * 300), "stop", "256 is the limit"),
        (dict(store=True), "store", "store is not supported"),
        (dict(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "x"}}), "tool_choice", "names 'x'"),
        (dict(response_format={"type": "json_object"}, extra_body={"regex": "a"}), "response_format", "one of them at most"),
        (dict(extra_body={"regex": "a("}), "regex", "regex"),
        (dict(extra_body={"guided_json": {"type": "nothing"}}), "guided_json", "guided_json $.type is 'nothing'"),
        (dict(extra_body={"guided_grammar": "root ::= "}), "guided_grammar", "guided_grammar cannot be compiled"),
        (dict(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}),
         "response_format", "response_format $.type is 'nothing'"),
        (dict(reasoning_effort="high"), "reasoning_effort", "reasoning_effort is not supported"),
        (dict(extra_body={"chat_template_kwargs": {"enable_thinking": False}}), "chat_template_kwargs.enable_thinking", "variable"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_is_a_bad_request_that_names_the_field(client, asked, param, says, stream):
    with pytest.raises(openai.BadRequestError) as info:
        client.chat.completions.create(**(dict(model=MODEL, messages=OSLO) | asked), stream=stream)
    assert says in info.value.body["message"] and info.value.param == param
    assert info.value.type == "invalid_request_error"


def test_a_model_that_there_is_not(client):
    with pytest.raises(openai.NotFoundError) as info:
        client.chat.completions.create(model="gpt-4o", messages=OSLO)
    assert info.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_the_models(client, engine):
    [model] = client.models.list().data
    assert model.id == MODEL and model.max_model_len == engine.max_model_len
    assert client.models.retrieve(MODEL) == model


def test_an_id_in_use_is_refused(client):
    long = dict(model=MODEL, prompt="Once", max_tokens=400, extra_body={"rid": "mine", "ignore_eos": True})
    with client.completions.create(**long, stream=True) as stream:
        assert next(stream).id == "mine"
        with pytest.raises(openai.BadRequestError, match="in use"):
            client.completions.create(**long)


# ---- asyncio, and clients that leave


def test_many_at_once(url, engine):
    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=f"{i} birds", temperature=0, max_tokens=8, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(12)))

    texts = asyncio.run(main())
    assert texts == [offline(engine, f"{i} birds", temperature=0, max_new_tokens=8) for i in range(12)]


@pytest.mark.parametrize("prompt", ["Once", ["Once", "Twice", "Thrice"]])
def test_a_client_that_leaves_a_stream_is_aborted(client, engine, prompt):
    before = engine.steps
    room = engine.max_model_len - 10
    asked = dict(model=MODEL, prompt=prompt, max_tokens=room, stream=True, extra_body={"ignore_eos": True})
    with client.completions.create(**asked) as stream:
        next(stream)
    until(lambda: not engine.has_work)
    assert engine.steps - before < room / 2


# ---- what a model would say that has learnt to think


@contextmanager
def saying(engine, text: str, error: Exception | None = None, **settings) -> Iterator[openai.OpenAI]:
    app = app_of(Scripted(text, error), engine.tokenizer, **settings)
    with served(app) as address, openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_thought_answer_and_call_come_apart(engine):
    text = "<think>\nHm.\n</think>\n\nLet me see.\n"
    text += '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    asked = dict(model=MODEL, messages=OSLO, tools=[WEATHER])
    with saying(engine, text, reasoning_parser="qwen3") as client:
        message = client.chat.completions.create(**asked).choices[0].message
        deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    assert (message.reasoning_content, message.content) == ("Hm.", "Let me see.")
    assert message.tool_calls[0].function.arguments == '{"city": "Oslo"}'
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    assert "".join(call.function.arguments for delta in deltas for call in delta.tool_calls or ()) == '{"city": "Oslo"}'


def test_without_a_parser_thoughts_are_text(engine):
    with saying(engine, "<think>Hm.</think>Yes.") as client:
        message = client.chat.completions.create(model=MODEL, messages=OSLO).choices[0].message
    assert message.content == "<think>Hm.</think>Yes." and not hasattr(message, "reasoning_content")


def test_what_breaks_is_told_by_status_or_inside_the_stream(engine):
    with saying(engine, "", RequestFailed("lost")) as client, pytest.raises(openai.InternalServerError, match="lost"):
        client.chat.completions.create(model=MODEL, messages=OSLO, stream=True)
    with saying(engine, "So f", RequestFailed("lost")) as client:
        with pytest.raises(openai.InternalServerError, match="lost"):
            client.chat.completions.create(model=MODEL, messages=OSLO)
        heard = ""
        with pytest.raises(openai.APIError, match="lost"):
            for chunk in client.chat.completions.create(model=MODEL, messages=OSLO, stream=True):
                heard += chunk.choices[0].delta.content or ""
        assert heard == "So f"


# ---- the server itself


def test_by_way_of_the_server_it_is_the_same(engine):
    """Two processes, and everything that passes between them."""
    asked = dict(model=MODEL, messages=OSLO, tools=[WEATHER], temperature=0, max_tokens=100)
    with running("--api-key", "secret") as server:
        wrong = openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0)
        with wrong as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with openai.OpenAI(base_url=server.url + "/v1", api_key="secret", max_retries=0) as client:
            assert client.models.list().data[0].id == MODEL
            message = client.chat.completions.create(**asked).choices[0].message
            assert message.tool_calls[0].function.name == "get_weather"
            chunks = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
            pieces = [call.function.arguments for c in chunks for x in c.choices for call in x.delta.tool_calls or ()]
            assert "".join(pieces) == message.tool_calls[0].function.arguments
            echo = client.completions.create(
                model=MODEL, prompt="Once upon", echo=True, logprobs=0, max_tokens=0
            ).choices[0]
            scored = engine.generate(["Once upon"], SamplingParams(prompt_logprobs=0, max_new_tokens=1))[
                0
            ].prompt_logprobs
            assert echo.logprobs.token_logprobs[1:] == pytest.approx([token.logprob for token in scored], abs=1e-4)
            found = client.embeddings.create(model=MODEL, input="Once upon").data[0].embedding
            [expected] = engine.embed(["Once upon"])
            assert found == pytest.approx([x / math.hypot(*expected) for x in expected], abs=1e-5)
            with pytest.raises(openai.BadRequestError) as info:
                client.chat.completions.create(**(asked | {"top_p": 7}))
            assert info.value.param == "top_p"
