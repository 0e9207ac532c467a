"""Tools -> a structural tag in the model's own notation: what it accepts, what it refuses, what the bundled model makes of it.

python -m pytest tests/test_grammar_tools.py
"""

import json
import re
from pathlib import Path

import pytest
import torch

from engine import Engine, SamplingParams
from errors import UserError
from grammar import limits
from grammar.compiler import Compiler
from grammar.jump import forced_tokens
from grammar.spec import Spec
from grammar.tools import NOTATIONS, tool_notation, tool_tag
from grammar.vocabulary import Vocabulary
from tokenizer import Tokenizer

TINY = Path(__file__).parent.parent / "assets" / "folio-tiny"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
CALLS = {  # a call of weather(city="Oslo"), as each notation says it
    "qwen_3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    "llama": '{"name": "weather", "parameters": {"city": "Oslo"}}',
    "qwen_3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
    "deepseek_v3_1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
    '{"city": "Oslo"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    '{"city": "Oslo"}<|tool_call_end|><|tool_calls_section_end|>',
    "glm_4_7": "<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>",
    "minimax": '\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Oslo</parameter>\n</invoke>\n'
    "</minimax:tool_call>",
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    tokenizer = Tokenizer.from_pretrained(TINY)
    return Vocabulary.of(tokenizer, tokenizer.vocab_size, [0, 2])


@pytest.fixture(scope="module")
def compiler(vocabulary):
    with Compiler(vocabulary) as compiler:
        yield compiler


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(TINY, dtype="float32")


def test_the_bundled_template_has_the_notation_of_qwen():
    assert tool_notation(Tokenizer.from_pretrained(TINY).chat_template) == "qwen_3"


@pytest.mark.parametrize("notation", sorted(CALLS))
def test_a_template_that_writes_such_calls_is_known(notation):
    source = {"llama": '<|eot_id|>{"name": "\' + name + \'", "parameters": \''}
    assert tool_notation("{{ '" + source.get(notation, CALLS[notation]) + "' }}") == notation


@pytest.mark.parametrize("template", [None, "", "{{ messages }}", "<tool_call>"])
def test_other_templates_are_not(template):
    assert tool_notation(template) is None


@pytest.mark.parametrize("choice", ["none", "auto", "required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("notation", NOTATIONS)
def test_every_notation_passes_the_gate_and_compiles(compiler, notation, choice):
    tools = TOOLS[:1] if notation == "minimax_m3" else TOOLS  # which refuses arguments of any name
    spec = Spec.structural_tag(tool_tag(tools, notation, tool_choice=choice))
    limits.check(spec)
    assert compiler.compile(spec).result().backend == "xgrammar"


def takes(compiler, tag: dict, text: str) -> bool:
    matcher = compiler.compile(Spec.structural_tag(tag)).result().matcher()
    return all(map(matcher.accept, compiler.vocabulary.encode(text))) and matcher.complete


@pytest.mark.parametrize("notation", sorted(CALLS))
def test_a_call_must_be_to_a_tool_with_its_arguments(compiler, notation):
    call, tag = CALLS[notation], tool_tag(TOOLS, notation, tool_choice="required")
    assert takes(compiler, tag, call)
    assert not takes(compiler, tag, call.replace("weather", "whether"))
    assert not takes(compiler, tag, call.replace("city", "town"))
    assert not takes(compiler, tag, "It is sunny.")
    assert takes(compiler, tool_tag(TOOLS, notation), "It is sunny.")


def test_two_calls_are_one_too_many_if_they_may_not_be_parallel(compiler):
    twice = "\n".join([CALLS["qwen_3"]] * 2)
    assert takes(compiler, tool_tag(TOOLS, "qwen_3", tool_choice="required"), twice)
    assert not takes(compiler, tool_tag(TOOLS, "qwen_3", tool_choice="required", parallel_tool_calls=False), twice)


def test_thoughts_may_come_first(compiler):
    thought = "<think>hm</think>\n\n" + CALLS["qwen_3"]
    assert takes(compiler, tool_tag(TOOLS, "qwen_3", tool_choice="required"), thought)
    assert not takes(compiler, tool_tag(TOOLS, "qwen_3", tool_choice="required", reasoning="disabled"), thought)


@pytest.mark.parametrize("function", [{"name": "now"}, {"name": "now", "strict": False, "parameters": CITY}])
def test_any_object_is_an_argument_of_a_function_that_does_not_say(compiler, function):
    tag = tool_tag([{"type": "function", "function": function}], "qwen_3", tool_choice="required")
    say = '<tool_call>\n{{"name": "now", "arguments": {}}}\n</tool_call>'.format
    assert takes(compiler, tag, say('{"a": [1]}'))
    assert not takes(compiler, tag, say("1"))


# ---- control tokens: what a notation spells is text, and only there


def call_between_control_tokens(begin: str, end: str) -> dict:
    call = {"type": "tag", "begin": begin, "content": {"type": "json_schema", "json_schema": CITY}, "end": end}
    return {"type": "structural_tag", "format": call}


def allowed(grammar, *text: int) -> set[int]:
    matcher = grammar.matcher()
    assert all(map(matcher.accept, text))
    bitmask = torch.zeros(1, -(-len(grammar.vocabulary) // 32), dtype=torch.int32)
    matcher.fill(bitmask, 0)
    return {i for i in range(len(grammar.vocabulary)) if bitmask[0, i // 32] >> i % 32 & 1}


def test_a_control_token_that_a_tag_spells_can_be_written(vocabulary, compiler):
    names = {name: i for i, name in vocabulary.control.items()}
    start, end = names["<|im_start|>"], names["<|im_end|>"]
    tag = call_between_control_tokens("<|im_start|>call ", "<|im_start|>")
    grammar = compiler.compile(Spec.structural_tag(tag)).result()
    bitmask = torch.zeros(1, -(-len(vocabulary) // 32), dtype=torch.int32)
    assert forced_tokens(grammar.matcher(), grammar.vocabulary, [], bitmask)[0] == start  # one token, not its letters
    text = grammar.vocabulary.encode('<|im_start|>call {"city": "O')
    assert text[0] == start and end not in allowed(grammar, *text)
    plain = compiler.compile(Spec.json_schema(CITY)).result()
    assert start not in allowed(plain, *vocabulary.encode('{"city": "O'))


def test_the_worker_knows_such_a_token_too(vocabulary, monkeypatch):
    monkeypatch.setattr(limits, "may_be_slow", lambda spec: True)
    monkeypatch.setattr("grammar.worker.QUICK_SECONDS", 0)  # else it would not be sent
    tag = call_between_control_tokens("<|im_start|>call ", "<|im_end|>")
    with Compiler(vocabulary) as compiler:
        grammar = compiler.compile(Spec.structural_tag(tag)).result()
        assert all(
            map(grammar.matcher().accept, grammar.vocabulary.encode('<|im_start|>call {"city": "Oslo"}<|im_end|>'))
        )


def test_the_last_stop_token_is_not_text():
    tokenizer = Tokenizer.from_pretrained(TINY)
    with Compiler(Vocabulary.of(tokenizer, tokenizer.vocab_size, [2])) as compiler:
        spec = Spec.structural_tag(call_between_control_tokens("call ", "<|im_end|>"))
        with pytest.raises(UserError, match=re.escape("it spells '<|im_end|>', without which nothing ends a text")):
            compiler.compile(spec).result()


def test_a_stop_token_that_a_tag_spells_ends_the_request(engine):
    params = SamplingParams(
        temperature=0, max_new_tokens=64, structural_tag=call_between_control_tokens("call ", "<|im_end|>")
    )
    ids = engine.tokenizer.apply_chat_template([{"role": "user", "content": "What is the weather in Oslo?"}])
    output = engine.generate([ids], params)[0].outputs[0]
    assert output.finish_reason == "stop" and output.token_ids[-1] in engine.tokenizer.eos_token_ids
    assert set(json.loads(output.text.removeprefix("call "))) == {"city"}


# ---- the bundled model


def calls(text: str) -> list[dict]:
    return [json.loads(call) for call in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL)]


def ask(engine: Engine, choice: str | dict, **params) -> str:
    chat = [{"role": "user", "content": "What is the weather in Oslo?"}]
    tag = tool_tag(TOOLS, "qwen_3", tool_choice=choice, reasoning="disabled")
    ids = engine.tokenizer.apply_chat_template(chat, tools=TOOLS)
    output = engine.generate([ids], SamplingParams(structural_tag=tag, max_new_tokens=200, **params))[0].outputs[0]
    assert output.finish_reason == "stop", output
    return output.text


@pytest.mark.parametrize("seed", range(5))
def test_required_calls_are_valid_however_hot(engine, seed):
    for call in calls(ask(engine, "required", temperature=1.5, seed=seed, json_finish=True)):
        assert call["name"] in ("weather", "now") and isinstance(call["arguments"], dict)
        assert call["name"] == "now" or set(call["arguments"]) == {"city"}


def test_a_named_function_is_called(engine):
    assert [
        call["name"] for call in calls(ask(engine, {"type": "function", "function": {"name": "now"}}, temperature=0))
    ] == ["now"]


def test_none_is_free_text(engine):
    assert calls(ask(engine, "none", temperature=0, stop=["<tool_call>"])) == []


def nested(levels: int) -> dict:
    schema = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(tools="weather"), "tools is a str"),
        (dict(tools=[{"type": "web_search"}]), "tools[0] must be"),
        (dict(tools=[{"function": {"name": 'a"b'}}]), "tools[0].function.name"),
        (dict(tools=[{"function": {"name": "a", "parameters": 5}}]), "tools[0].function.parameters"),
        (dict(tools=TOOLS + TOOLS[:1]), "two functions of the name 'weather'"),
        (dict(notation="qwen_9"), "'qwen_9'; it must be one of"),
        (dict(notation=None), "no tool calls of a known notation"),
        (dict(tool_choice="always"), "tool_choice is 'always'"),
        (dict(tool_choice={"type": "function", "function": {"name": "then"}}), "names 'then'; the tools are weather, now"),
        (dict(tools=[], tool_choice="required"), "there are no tools"),
        (dict(reasoning="much"), "reasoning is 'much'; it must be one of"),
        (dict(tools=[{"function": {"name": "a", "parameters": nested(900)}}]), "tools cannot be used"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(wrong, says):
    with pytest.raises(UserError, match=re.escape(says)):
        tool_tag(**({"tools": TOOLS, "notation": "qwen_3"} | wrong))


# ---- tools inside of a structural tag


def said(**fields) -> dict:
    return {"type": "tool_calls", "notation": "qwen_3", "tools": TOOLS} | fields


@pytest.mark.parametrize(
    "fields", [{}, {"tool_choice": "required", "reasoning": "disabled", "parallel_tool_calls": False}]
)
def test_a_format_stands_for_tools(fields):
    spec = Spec.structural_tag({"type": "structural_tag", "format": said(**fields)})
    assert json.loads(spec.text) == tool_tag(TOOLS, "qwen_3", **fields)


def test_it_stands_beside_others(compiler):
    form = {"type": "or", "elements": [{"type": "regex", "pattern": "[0-9]+"}, said(tool_choice="required")]}
    tag = {"type": "structural_tag", "format": form}
    assert takes(compiler, tag, "42") and takes(compiler, tag, CALLS["qwen_3"])
    assert not takes(compiler, tag, "Oslo")
    assert form["elements"][1]["type"] == "tool_calls"  # the caller's own is as it was


def test_a_schema_may_speak_of_tool_calls():
    schema = {"const": {"type": "tool_calls"}}
    tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}}
    assert json.loads(Spec.structural_tag(tag).text) == tag


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": None}, "tools is a NoneType"),
        ({"tools": TOOLS * 65}, "tools has 130 functions; 128 is the limit"),
        ({"tools": [{"function": {"name": "a", "parameters": {"title": "x" * 300_000}}}]}, "is the limit"),
        ({"notation": []}, "the notation of tool calls is []"),
        ({"reasoning": "much"}, "reasoning is 'much'"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls is 1"),
        ({"other": 1}, "has the field 'other'"),
    ],
)
def test_what_is_wrong_with_it_is_named(fields, says):
    with pytest.raises(UserError, match=re.escape(says)):
        Spec.structural_tag({"type": "structural_tag", "format": said(**fields)})
