"""Harmony as a grammar: thoughts, then one call to a tool with its arguments, or an answer.

python -m pytest tests/test_grammar_harmony.py
"""

import pytest
from harmony_tokenizer import harmony_tokenizer

from grammar import harmony
from grammar.compiler import Compiler
from grammar.spec import Spec
from grammar.tools import tool_tag
from grammar.vocabulary import Vocabulary

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
THOUGHT = "<|channel|>analysis<|message|>It is 5 < 6.<|end|><|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>'
FINAL = "<|channel|>final<|message|>It is sunny."
NAMED = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def compiler():
    tokenizer, stop_ids = harmony_tokenizer()
    with Compiler(Vocabulary.of(tokenizer, tokenizer.vocab_size, stop_ids)) as compiler:
        yield compiler


def takes(compiler: Compiler, tag: dict, text: str) -> bool:
    grammar = compiler.compile(Spec.structural_tag(tag)).result()
    matcher = grammar.matcher()
    return all(map(matcher.accept, grammar.vocabulary.encode(text))) and matcher.complete


@pytest.mark.parametrize("head", harmony.HEADS)
def test_a_call_may_begin_in_each_of_these_ways(compiler, head):
    tag = tool_tag(TOOLS, "harmony", tool_choice="required")
    call = head.format("weather") + '{"city": "Oslo"}<|call|>'
    for text in (call, THOUGHT + call, THOUGHT + PREAMBLE + THOUGHT + call):
        assert takes(compiler, tag, text)
    for wrong in (call.replace("weather", "whether"), call.replace("city", "town"), call.removesuffix("<|call|>")):
        assert not takes(compiler, tag, wrong)
    assert not takes(compiler, tag, call + "<|start|>assistant" + call)


@pytest.mark.parametrize(
    ("choice", "call", "final", "nothing"),
    [
        ("auto", True, True, False),
        ("required", True, False, False),
        ("none", False, True, False),
        (NAMED, False, False, False),
    ],
)
def test_what_a_choice_allows(compiler, choice, call, final, nothing):
    tag = tool_tag(TOOLS, "harmony", tool_choice=choice)
    for before in ("", THOUGHT):
        assert takes(compiler, tag, before + CALL) == call
        assert takes(compiler, tag, before + FINAL) == final
        assert takes(compiler, tag, before) == nothing
    if choice == NAMED:
        assert takes(compiler, tag, CALL.replace("weather", "now").replace("city", "any"))


def test_without_thoughts(compiler):
    tag = tool_tag(TOOLS, "harmony", reasoning="disabled")
    assert takes(compiler, tag, CALL) and takes(compiler, tag, FINAL)
    assert not takes(compiler, tag, THOUGHT + CALL)


def test_marks_are_no_words(compiler):
    tag = tool_tag(TOOLS, "harmony")
    assert not takes(compiler, tag, FINAL + "<|end|><|start|>assistant" + FINAL)
    assert not takes(compiler, tag, THOUGHT.replace("It", "<|channel|>") + FINAL)


def test_an_answer_of_a_form(compiler):
    form = harmony.behind_thoughts(harmony.answer({"type": "regex", "pattern": "[0-9]+"}))
    tag = {"type": "structural_tag", "format": form}
    assert takes(compiler, tag, THOUGHT + FINAL.replace("It is sunny.", "42"))
    assert not takes(compiler, tag, THOUGHT + FINAL)
