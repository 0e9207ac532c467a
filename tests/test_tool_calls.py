"""Tool calls out of text: each notation, any cut of the text, and what only looks like a call.

python -m pytest tests/test_tool_calls.py
"""

import json
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grammar_tools import CALLS

from grammar.tools import MARKS
from serving.tool_calls import NOTATIONS, CallDelta, ToolCalls

PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "where": {"type": "object"},
    "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": PROPERTIES}}},
    {"type": "function", "function": {"name": "now"}},
]
DSML = "｜DSML｜"
OSLO = CALLS | {
    "exaone": '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>',
    "mimo": "<tool_call><function=weather><parameter=city>Oslo</parameter></function></tool_call>",
    "deepseek_r1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Oslo"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek_v3_2": f'<{DSML}function_calls>\n<{DSML}invoke name="weather">\n<{DSML}parameter name="city" string="true">'
    f"Oslo</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}function_calls>",
    "deepseek_v4": f'<{DSML}tool_calls>\n<{DSML}invoke name="weather">\n<{DSML}parameter name="city" string="true">'
    f"Oslo</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>",
    "deepseek_v4_1": f'<{DSML} calls>\n<{DSML} invoke name="weather">\n<{DSML} parameter name="city" string="true">'
    f"Oslo</{DSML} parameter>\n</{DSML} invoke>\n</{DSML} calls>",
}
OSLO |= {"hermes": OSLO["qwen_3"], "qwen_3_5": OSLO["qwen_3_coder"]}
NOW = {
    "qwen_3": '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "llama": '{"name": "now", "parameters": {}}',
    "qwen_3_coder": "<tool_call>\n<function=now>\n\n</function>\n</tool_call>",
    "glm_4_7": "<tool_call>now</tool_call>",
    "minimax": '<minimax:tool_call>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
}


def parse(notation: str, *pieces: str) -> tuple[str, list[tuple[str, str, str]]]:
    """-> the text, and (id, name, arguments) of each call."""
    numbers = count()
    parser = ToolCalls(notation, TOOLS, new_id=lambda: f"id-{next(numbers)}")
    return added_up([p for new in pieces for p in parser.add(new)] + parser.finish())


def added_up(pieces: list[str | CallDelta]) -> tuple[str, list[tuple[str, str, str]]]:
    """-> the text, and of each call id, name and arguments."""
    text, calls = "", []
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if piece.name is not None:
            assert piece.index == len(calls)
            calls.append((piece.id, piece.name, ""))
        id, name, arguments = calls[piece.index]
        calls[piece.index] = (id, name, arguments + piece.arguments)
    return text, calls


def test_all_notations_but_one_can_be_read():
    assert set(MARKS) - set(NOTATIONS) == {
        "harmony",
        "cohere",
    }  # the first has a file of its own, the other nobody reads
    assert set(OSLO) == set(NOTATIONS)


@pytest.mark.parametrize("notation", sorted(OSLO))
def test_a_call_is_read_whole_and_letter_by_letter(notation):
    id = "functions.weather:0" if notation == "kimi" else "id-0"
    expected = ("I will look.", [(id, "weather", '{"city": "Oslo"}')])
    assert parse(notation, "I will look.\n\n" + OSLO[notation] + "\n") == expected
    assert parse(notation, *("I will look.\n\n" + OSLO[notation] + "\n")) == expected


@pytest.mark.parametrize("notation", sorted(NOW))
def test_a_call_without_arguments(notation):
    assert parse(notation, NOW[notation]) == ("", [("id-0", "now", "{}")])


@pytest.mark.parametrize("notation", sorted(OSLO))
def test_several_calls_with_nothing_between(notation):
    text, calls = parse(notation, OSLO[notation] + "\n" + OSLO[notation])
    assert text == "" and [name for _, name, _ in calls] == ["weather", "weather"]


def test_calls_inside_of_one_section():
    call = '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Oslo"}<｜tool▁call▁end｜>'
    text, calls = parse("deepseek_v3_1", f"<｜tool▁calls▁begin｜>{call}{call}<｜tool▁calls▁end｜> Done.")
    assert text.strip() == "Done." and len(calls) == 2


def test_arguments_are_passed_on_as_they_come():
    parser = ToolCalls("qwen_3", TOOLS)
    assert parser.add('<tool_call>\n{"name": "weather", "arguments": ') == []
    begun, first = parser.add('{"city": "Os')
    assert (begun.name, first) == ("weather", CallDelta(0, arguments='{"city": "Os'))
    assert parser.add('lo \\"}\\" {"}}') == [CallDelta(0, arguments='lo \\"}\\" {"}')]
    assert parser.add("\n</tool_call>") == parser.finish() == []


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("city", "5", "5"),
        ("city", 'a "b"\n  c', 'a "b"\n  c'),
        ("city", "", ""),
        ("days", " 5 ", 5),
        ("days", "five", "five"),
        ("where", '{"lat": [1, 2]}', {"lat": [1, 2]}),
        ("unit", "null", None),
        ("unit", "5", "5"),
        ("other", "5", 5),
        ("other", "NaN", "NaN"),
        ("other", "[" * 100_000, "[" * 100_000),
    ],
)
def test_a_value_in_xml_is_what_its_schema_says(key, value, meant):
    coder = f"<tool_call>\n<function=weather>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>"
    glm = f"<tool_call>weather\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
    for notation, text in (("qwen_3_coder", coder), ("glm_4_7", glm)):
        rest, [(_, _, arguments)] = parse(notation, text)
        assert rest == "" and json.loads(arguments) == {key: meant}


@pytest.mark.parametrize(
    "text",
    [
        "5 < 6 and {so on}",
        "<tool_call>",
        "<tool_call>\n",
        '<tool_call>\n{"name": "whether", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "parameters": {}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": 5}\n</tool_call>',
        '<tool_call>\n{"name": "wea',
        "</tool_call> </tool_call>",
        " \n",
    ],
)
def test_what_only_looks_like_a_call_is_text(text):
    assert parse("qwen_3", text) == (text, [])
    assert parse("qwen_3", *text) == (text, [])


def test_a_call_that_is_cut_off_keeps_what_it_has():
    call = OSLO["qwen_3"]
    assert parse("qwen_3", call[:-10]) == ("", [("id-0", "weather", '{"city": "Oslo"}')])
    assert parse("qwen_3", call[: call.index("slo")]) == ("", [("id-0", "weather", '{"city": "O')])
    assert parse("glm_4_7", OSLO["glm_4_7"].removesuffix("</tool_call>")) == (
        "",
        [("id-0", "weather", '{"city": "Oslo"')],
    )


def test_behind_a_call_that_does_not_end_rightly_is_text():
    wrong = OSLO["qwen_3"].replace("</tool_call>", "</tool>") + " Sorry."
    text, calls = parse("qwen_3", wrong)
    assert text == "}\n</tool> Sorry." and calls == [("id-0", "weather", '{"city": "Oslo"}')]
    text, calls = parse("glm_4_7", "<tool_call>weather<arg>city</arg></tool_call>")
    assert text == "<arg>city</arg></tool_call>" and calls == [("id-0", "weather", "{}")]


@given(data=st.data(), notation=st.sampled_from(sorted(OSLO)))
@settings(max_examples=400)
def test_any_cut_gives_the_same(data, notation):
    call = OSLO[notation]
    piece = st.one_of(
        st.just(call),
        st.integers(0, len(call)).map(lambda n: call[:n]),
        st.integers(0, len(call)).map(lambda n: call[n:]),
        st.sampled_from([" ", "\n", "\n\n  ", "<", "{", "Well.", '"', "}", "\\", "weather", "1"]),
    )
    text = "".join(data.draw(st.lists(piece, max_size=6)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(notation, *pieces) == parse(notation, text) == parse(notation, *text)
