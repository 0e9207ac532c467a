"""gpt-oss's texts taken apart: channels and calls, at any cut of the text, and from the API.

python -m pytest tests/test_harmony.py
"""

import json
from itertools import count

import openai
import pytest
from harmony_tokenizer import harmony_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_server import Scripted, app_of, served
from test_grammar_harmony import CALL, FINAL, PREAMBLE, THOUGHT, TOOLS, compiler, takes
from test_tool_calls import added_up

from errors import UserError
from grammar.harmony import HEADS
from serving.chat import Chats
from serving.harmony import MOST_HEAD, Harmony
from serving.openai_protocol import ChatRequest
from serving.tool_calls import CallDelta
from tokenizer import Tokenizer

__all__ = ["compiler"]  # a fixture
HI = [{"role": "user", "content": "Hi"}]
OSLO = ("id-0", "weather", '{"city": "Oslo"}')
START = "<|start|>assistant"


def parse(*texts: str) -> tuple[str, str, list[tuple[str, str, str]]]:
    """-> thought, answer, and (id, name, arguments) of each call."""
    numbers = count()
    reader = Harmony(TOOLS, new_id=lambda: f"id-{next(numbers)}")
    parts = [reader.add(text) for text in texts] + [reader.finish()]
    answer, calls = added_up([piece for part in parts for piece in part.pieces])
    assert reader.calls == len(calls)
    return "".join(part.thought for part in parts), answer, calls


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FINAL, ("", "It is sunny.", [])),
        (THOUGHT + FINAL + "<|return|>", ("It is 5 < 6.", "It is sunny.", [])),
        (THOUGHT + CALL, ("It is 5 < 6.", "", [OSLO])),
        (THOUGHT + PREAMBLE + THOUGHT + CALL, ("It is 5 < 6.\nIt is 5 < 6.", "I will look.", [OSLO])),
        (PREAMBLE + FINAL, ("", "I will look.\nIt is sunny.", [])),
        (CALL + START + CALL, ("", "", [OSLO, ("id-1", *OSLO[1:])])),
        (CALL.replace('{"city": "Oslo"}', ""), ("", "", [("id-0", "weather", "{}")])),
        (CALL.removesuffix("<|call|>"), ("", "", [OSLO])),
        (CALL[: CALL.index("slo")], ("", "", [("id-0", "weather", '{"city": "O')])),
        (CALL.replace("weather", "python"), ('{"city": "Oslo"}', "", [])),  # a tool that nobody has: it is thinking
        (THOUGHT.replace("<|end|>", "") + FINAL, ("It is 5 < 6.", "It is sunny.", [])),  # a mark forgotten
        ("It is sunny.", ("", "It is sunny.", [])),
        ("to be", ("", "to be", [])),
        ("t", ("", "t", [])),
        (THOUGHT.removesuffix(START) + "It is sunny.", ("It is 5 < 6.", "It is sunny.", [])),
        (THOUGHT + "<|channel|>fin", ("It is 5 < 6.", "", [])),
        (FINAL + "<|en", ("", "It is sunny.<|en", [])),
        ("<|channel|>" + "x" * MOST_HEAD, ("", "<|channel|>" + "x" * MOST_HEAD, [])),
        ("", ("", "", [])),
    ],
    ids=range(19),
)  # fmt: skip
def test_a_text_is_taken_apart_whole_and_letter_by_letter(text, expected):
    assert parse(text) == expected
    assert parse(*text) == expected


@pytest.mark.parametrize("head", HEADS)
def test_every_head_that_the_grammar_allows_is_read(head):
    assert parse(THOUGHT + head.format("weather") + '{"city": "Oslo"}') == ("It is 5 < 6.", "", [OSLO])


def test_pieces_are_passed_on_as_they_come():
    reader = Harmony(TOOLS)
    assert reader.add("<|channel|>analysis<|message|>So").thought == "So"
    assert reader.add(" 4.<|e").thought == " 4."
    assert reader.add("nd|>" + START + "<|channel|>commentary to=functions.now <|cons").pieces == []
    begun, arguments = reader.add("train|>json<|message|>{").pieces
    assert (begun.name, arguments) == ("now", CallDelta(0, arguments="{"))


@given(data=st.data())
@settings(max_examples=400)
def test_any_cut_gives_the_same(data):
    whole = st.sampled_from([THOUGHT, PREAMBLE, CALL, FINAL, START])
    mark = st.sampled_from(
        ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>", "final", "analysis", " to=", "now"]
    )
    piece = st.one_of(
        whole,
        st.tuples(whole, st.integers(0, 60)).map(lambda x: x[0][: x[1]]),
        st.tuples(whole, st.integers(0, 60)).map(lambda x: x[0][x[1] :]),
        mark,
        st.sampled_from([" ", "\n", "<", "<|", "|>", "Well.", "{}"]),
        st.just("x" * 200),
    )
    text = "".join(data.draw(st.lists(piece, max_size=8)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(*pieces) == parse(text) == parse(*text)


# ---- a chat


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return harmony_tokenizer()[0]


def prompt_of(tokenizer: Tokenizer, messages=HI, **fields):
    return Chats(tokenizer).prompt(ChatRequest.model_validate({"messages": messages} | fields))


def test_a_template_that_speaks_it_is_known(tokenizer):
    chats = Chats(tokenizer)
    assert chats.harmony and chats.thinks == "gpt-oss" and chats.notation == "harmony"
    assert prompt_of(tokenizer).params["skip_special_tokens"] is False
    plain = Tokenizer(tokenizer.backend, {}, {"default": "{{ messages[0].content }}"})
    assert not Chats(plain).harmony
    assert Chats(plain, "openai").harmony and Chats(plain, None, "gpt-oss").harmony


@pytest.mark.parametrize("parsers", [("hermes", "gpt-oss"), ("gpt-oss", "off"), (None, "qwen3")])
def test_half_of_it_cannot_be_had(tokenizer, parsers):
    with pytest.raises(UserError, match="both must be gpt-oss"):
        Chats(tokenizer, *parsers)


def test_its_template_gets_the_thought_of_a_call(tokenizer):
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    said = {"role": "assistant", "reasoning_content": "hm", "content": "I will look.", "tool_calls": [call]}
    text = tokenizer.decode(prompt_of(tokenizer, [*HI, said]).ids, skip_special_tokens=False)
    assert text.endswith(
        '<|start|>assistant<|message|>hm\nI will look.|to=functions.weather{"city": "Oslo"}<|end|><|start|>assistant'
    )


@pytest.mark.parametrize(
    ("fields", "takes_call", "takes_answer", "takes_number"),
    [
        ({"tools": TOOLS}, True, True, True),
        ({"tools": TOOLS, "tool_choice": "required"}, True, False, False),
        ({"regex": "[0-9]+"}, False, False, True),
        ({"tools": TOOLS, "regex": "[0-9]+"}, True, False, True),
    ],
)
def test_it_is_kept_to_tools_and_form(tokenizer, compiler, fields, takes_call, takes_answer, takes_number):
    tag = json.loads(prompt_of(tokenizer, **fields).params["structural_tag"])
    for before in ("", THOUGHT):
        assert takes(compiler, tag, before + CALL) == takes_call
        assert takes(compiler, tag, before + FINAL) == takes_answer
        assert takes(compiler, tag, before + "<|channel|>final<|message|>42") == takes_number


def test_the_api_has_all_of_it(tokenizer):
    app = app_of(Scripted(THOUGHT + PREAMBLE + CALL.removesuffix("<|call|>")), tokenizer)
    with served(app) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        asked = dict(model="folio-tiny", messages=HI, tools=TOOLS)
        choice = client.chat.completions.create(**asked).choices[0]
        chunks = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I will look."
    assert choice.message.reasoning_content == "It is 5 < 6."
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in chunks) == "It is 5 < 6."
    assert "".join(d.content or "" for d in chunks) == "I will look."
    pieces = [call.function.arguments for d in chunks for call in d.tool_calls or []]
    assert "".join(pieces) == '{"city": "Oslo"}' and len(pieces) > 5
