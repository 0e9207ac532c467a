"""Jump-forward: what is jumped to is what the tokenizer would have written, whatever follows.

The judge is a replay. A "model" writes a text in its canonical tokens, one by one; at every position the grammar is asked
what it forces, and each token that is jumped to must be the model's own. The naive way, to encode the forced text as it
is, fails the same replay.

    python -m pytest tests/test_grammar_jump.py
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grammar.jump import MOST_BYTES, forced_tokens
from grammar.llguidance_backend import LlguidanceBackend
from grammar.matcher import Grammar, Matcher
from grammar.spec import Spec
from grammar.vocabulary import Vocabulary
from grammar.xgrammar_backend import XgrammarBackend
from tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_pretrained(Path(__file__).parent.parent / "assets" / "folio-tiny")
VOCABULARY = Vocabulary.of(TOKENIZER, 1024, [2, 0])
BACKENDS = {"xgrammar": XgrammarBackend(VOCABULARY), "llguidance": LlguidanceBackend(VOCABULARY)}
MASK = torch.zeros(1, 32, dtype=torch.int32)
LAYOUTS: dict[str, tuple[bool, dict]] = {  # any_whitespace, options of json.dumps
    "fixed": (False, {}),
    "spaced": (True, {}),
    "compact": (True, {"separators": (",", ":")}),
    "indented": (True, {"indent": 2}),
}


def of(required: bool = True, **properties) -> dict:
    names = list(properties) if required else []
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


STRING, INTEGER = {"type": "string"}, {"type": "integer"}
PERSON = of(name=STRING, age=INTEGER)
CASES: dict[str, tuple[dict, object]] = {
    "person": (PERSON, {"name": "Ann", "age": 31}),
    "long keys": (
        of(assistant_message_identifier=STRING, the_year_of_the_string={"type": "boolean"}),
        {"assistant_message_identifier": "x", "the_year_of_the_string": True},
    ),
    "optional": (of(False, name=STRING, nickname=STRING, age=INTEGER), {"nickname": "Bo", "age": 4}),
    "optional, one left out": (of(False, name=STRING, names=STRING), {"names": "B"}),
    "keys that begin alike": (
        of(order=STRING, orderId=STRING, orders=INTEGER),
        {"order": "a", "orderId": "b", "orders": 1},
    ),
    "enum": (of(unit={"enum": ["celsius", "fahrenheit", "kelvin"]}), {"unit": "fahrenheit"}),
    "enum that begins alike": (of(do={"enum": ["string", "strings", "stringent"]}), {"do": "stringent"}),
    "enum of numbers": (of(n={"enum": [1, 12, 123, -5]}), {"n": 123}),
    "const": (of(type={"const": "assistant room"}, at=INTEGER), {"type": "assistant room", "at": 0}),
    "const with quotes": (of(a={"const": 'say "hello", then: {"go"}'}), {"a": 'say "hello", then: {"go"}'}),
    "const of numbers": (of(name={"const": -12.5}, user={"const": None}), {"name": -12.5, "user": None}),
    "spaces": (of(a={"enum": ["a  b", "a  1", "a   "]}), {"a": "a  b"}),
    "spaces before a digit": (of(a={"enum": ["a  b", "a  1", "a   "]}), {"a": "a  1"}),
    "unicode keys": (of(**{"größe": INTEGER, "名前": STRING, "🙂x": STRING}), {"größe": 1, "名前": "愛", "🙂x": "🙂"}),
    "half a character": (of(a={"enum": ["café", "cafè", "愛", "愜"]}), {"a": "cafè"}),
    "nested": (
        of(user=of(address=of(city=STRING, zip=STRING), age=INTEGER)),
        {"user": {"address": {"city": "Rome", "zip": "00100"}, "age": 9}},
    ),
    "array": ({"type": "array", "items": PERSON, "minItems": 2}, [{"name": "A", "age": 1}, {"name": "B", "age": 22}]),
    "array of arrays": (
        of(m={"type": "array", "items": {"type": "array", "items": {"type": "boolean"}}}),
        {"m": [[True, False], [], [False]]},
    ),
    "any of": (
        {"anyOf": [of(kind={"const": "circle"}, radius=INTEGER), of(kind={"const": "circuit"}, volts=INTEGER)]},
        {"kind": "circuit", "volts": 12},
    ),
    "tool": (
        of(name={"const": "get_weather"}, arguments=of(city=STRING, days={"enum": [1, 3, 7]})),
        {"name": "get_weather", "arguments": {"city": "San José", "days": 7}},
    ),
    "scalar": ({"type": "integer"}, 42),
}
CALL = {"type": "tag", "begin": '<tool_call>\n{"name": "f", "arguments": ', "end": "}\n</tool_call>"}
CALL |= {"content": {"type": "json_schema", "json_schema": PERSON}}
TEXTS: dict[str, tuple[Spec, str]] = {
    "choices": (Spec.choices(["Yes, it is.", "Yes, it isn't.", "No"]), "Yes, it isn't."),
    "a long word": (Spec.choices(["assistants", "assistance"]), "assistants"),
    "an added token that begins alike": (Spec.choices(["so </tool_call>", "so </tool_cast>"]), "so </tool_call>"),
    "an added token that is not one": (Spec.choices(["so </tool_call>", "so </tool_cast>"]), "so </tool_cast>"),
    "contraction": (Spec.choices(["it's so", "it'so", "it's"]), "it'so"),
    "regex": (Spec.regex(r"(the year|the room) 19[0-9]{2}, said (he|her)"), "the year 1984, said her"),
    "ebnf": (Spec.ebnf('root ::= "assistant: " ("yes" | "year") "!"'), "assistant: year!"),
    "tool call": (
        Spec.structural_tag({"type": "structural_tag", "format": CALL}, any_whitespace=False),
        '<tool_call>\n{"name": "f", "arguments": {"name": "Ann", "age": 3}}\n</tool_call>',
    ),
}


def naive_tokens(matcher: Matcher, vocabulary: Vocabulary, recent: list[int], bitmask: torch.Tensor) -> list[int]:
    return vocabulary.encode(matcher.forced().decode())


def replay(grammar: Grammar, text: str, jump: Callable = forced_tokens, prompt: str = "") -> list[int] | None:
    """The tokens that were jumped to while the model wrote the text; None if one of them was not the model's."""
    recent = TOKENIZER.encode(prompt)
    ids, matcher, jumped = VOCABULARY.encode(text), grammar.matcher(), []
    at = 0
    while at < len(ids):
        tokens = jump(matcher, VOCABULARY, recent + ids[:at], MASK)
        if tokens != ids[at : at + len(tokens)]:
            return None
        jumped += tokens
        tokens = tokens or ids[at : at + 1]
        assert all(map(matcher.accept, tokens)), f"{grammar.backend} refuses {TOKENIZER.decode(ids[: at + 1])!r}"
        at += len(tokens)
    assert matcher.complete
    return jumped


@cache
def compiled(backend: str, spec: Spec) -> Grammar:
    return BACKENDS[backend].compile(spec)


def every_case() -> list[tuple[str, str, Spec, str]]:
    """(name, backend, spec, text) of all."""
    cases = []
    for name, (schema, value) in CASES.items():
        for layout, (any_whitespace, options) in LAYOUTS.items():
            text = json.dumps(value, ensure_ascii=False, **options)
            cases += [(f"{name}, {layout}", b, Spec.json_schema(schema, any_whitespace), text) for b in BACKENDS]
    for name, (spec, text) in TEXTS.items():
        both = spec.kind in ("choices", "regex")
        cases += [(name, backend, spec, text) for backend in BACKENDS if both or backend == "xgrammar"]
    return cases


@pytest.mark.parametrize(
    ("name", "backend", "spec", "text"), every_case(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_only_canonical_tokens_are_jumped_to(name: str, backend: str, spec: Spec, text: str):
    assert replay(compiled(backend, spec), text) is not None
    assert replay(compiled(backend, spec), text, prompt="<|im_start|>assistant\n") is not None
    assert replay(compiled(backend, spec), text, prompt="Answer in JSON. ") is not None


def test_encoding_the_forced_text_as_it_is_fails():
    failed = [
        name
        for name, backend, spec, text in every_case()
        if replay(compiled(backend, spec), text, naive_tokens) is None
    ]
    assert len(failed) > len(every_case()) / 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_third_of_fixed_json_is_jumped_to(backend: str):
    jumped = written = 0
    for schema, value in CASES.values():
        text = json.dumps(value, ensure_ascii=False)
        jumped += len(replay(compiled(backend, Spec.json_schema(schema, any_whitespace=False)), text))
        written += len(VOCABULARY.encode(text))
    assert jumped > written / 3


def test_an_added_token_is_jumped_to_as_one():
    spec, text = TEXTS["tool call"]
    jumped = replay(compiled("xgrammar", spec), text)
    begin, end = (TOKENIZER.backend.token_to_id(name) for name in ("<tool_call>", "</tool_call>"))
    assert begin in jumped and end in jumped


@pytest.mark.parametrize("backend", BACKENDS)
def test_control_tokens_are_never_jumped_to(backend: str):
    matcher = compiled(backend, Spec.choices(["so<|im_end|>?", "so<|im_end|>!"])).matcher()
    while tokens := forced_tokens(matcher, VOCABULARY, [], MASK) or VOCABULARY.encode(matcher.forced().decode()[:1]):
        assert not TOKENIZER.special_ids & {*tokens} and all(map(matcher.accept, tokens))
    assert matcher.accept(VOCABULARY.encode("?")[0]) and matcher.complete


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_end_is_not_jumped_to(backend: str):
    matcher = compiled(backend, Spec.choices(["yes"])).matcher()
    tokens = forced_tokens(matcher, VOCABULARY, [], MASK)
    assert TOKENIZER.decode(tokens) == "yes" and all(map(matcher.accept, tokens))
    assert forced_tokens(matcher, VOCABULARY, tokens, MASK) == []
    assert matcher.accept(VOCABULARY.stop_ids[0]) and matcher.ended
    assert forced_tokens(matcher, VOCABULARY, tokens, MASK) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_jumped_to_behind_what_would_be_cut_otherwise(backend: str):
    spec = Spec.choices(["system!"])
    matcher = compiled(backend, spec).matcher()
    s, y = VOCABULARY.encode("s") + VOCABULARY.encode("y")
    assert matcher.accept(s) and matcher.accept(y)  # the tokenizer has "sy"
    assert forced_tokens(matcher, VOCABULARY, [s, y], MASK) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_matcher_stays_as_it_is(backend: str):
    def state(matcher: Matcher) -> tuple:
        assert matcher.fill(MASK, 0)
        return matcher.complete, matcher.ended, matcher.forced(), MASK.tolist()

    schema, value = CASES["tool"]
    matcher = compiled(backend, Spec.json_schema(schema, any_whitespace=False)).matcher()
    ids = VOCABULARY.encode(json.dumps(value, ensure_ascii=False))
    for i, token in enumerate(ids):
        before = state(matcher)
        forced_tokens(matcher, VOCABULARY, ids[:i], MASK)
        assert state(matcher) == before
        assert matcher.accept(token)
    matcher.rollback(len(ids))
    assert not matcher.complete and matcher.accept(ids[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_text_is_taken_in_parts(backend: str):
    text = "Once upon a time 愛 " * 400
    matcher = compiled(backend, Spec.json_schema({"const": text}, any_whitespace=False)).matcher()
    tokens = forced_tokens(matcher, VOCABULARY, [], MASK)
    assert 0 < len(b"".join(VOCABULARY.tokens[i] for i in tokens)) <= MOST_BYTES
    text = json.dumps(text, ensure_ascii=False)
    assert replay(compiled(backend, Spec.json_schema({"const": json.loads(text)}, any_whitespace=False)), text)


WORDS = st.sampled_from(
    [text for token in VOCABULARY.tokens if token and (text := token.decode(errors="replace")) and text.isprintable()]
)
PIECES = st.one_of(WORDS, st.text("aestr \n\t01.,'\"{}[]é愛🙂", max_size=3))
SOME_TEXTS = st.lists(
    st.lists(PIECES, min_size=1, max_size=6).map("".join).filter(bool), min_size=1, max_size=5, unique=True
)


@given(
    texts=SOME_TEXTS,
    more=SOME_TEXTS,
    common=st.lists(PIECES, max_size=3).map("".join),
    backend=st.sampled_from([*BACKENDS]),
)
@settings(max_examples=100)
def test_of_any_enum_and_key_only_canonical_tokens_are_jumped_to(texts: list, more: list, common: str, backend: str):
    texts = [common + text for text in texts]
    schema = of(**({"a": {"enum": texts}, "b": {"const": more[0]}} | {more[-1]: {"enum": more}}))
    values = [{"a": text, "b": more[0]} | {more[-1]: more[-1]} for text in texts if more[-1] not in ("a", "b")]
    grammar = BACKENDS[backend].compile(Spec.json_schema(schema, any_whitespace=False))
    for value in values:
        assert replay(grammar, json.dumps(value, ensure_ascii=False)) is not None


@given(texts=SOME_TEXTS, common=st.lists(PIECES, max_size=3).map("".join), backend=st.sampled_from([*BACKENDS]))
@settings(max_examples=150)
def test_of_any_choices_only_canonical_tokens_are_jumped_to(texts: list, common: str, backend: str):
    texts = [common + text for text in texts]
    grammar = BACKENDS[backend].compile(Spec.choices(texts))
    for text in texts:
        assert replay(grammar, text) is not None
        assert replay(grammar, text, prompt="Write one of these:\n") is not None
