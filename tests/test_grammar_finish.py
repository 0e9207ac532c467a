"""The short way to a valid end: whatever was sampled, the text is whole when the tokens run out.

The judge is a random walk through the mask, half of it over tokens that open and close things, with all numbers of tokens
from the fewest that the schema needs. It must end complete, parse, and be valid.

    python -m pytest tests/test_grammar_finish.py
"""

import json
import random
from functools import cache
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

from grammar import finish
from grammar.finish import Finisher, shortest_end
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
BEYOND = (0, 1, 3, 8, 20, 50, 110)  # tokens more than the shortest end
SEED = random.randrange(1 << 32)


def of(required: bool = True, **properties) -> dict:
    names = list(properties) if required else []
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def array(items: dict, least: int = 0) -> dict:
    return {"type": "array", "items": items, "minItems": least}


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
NODE = {"$ref": "#/$defs/node"}
CHAIN = of(child=NODE, name=STRING) | {"required": ["name"]}
SCHEMAS: dict[str, dict | bool] = {
    "anything": True,
    "integer": INTEGER,
    "number": NUMBER,
    "below zero": {"type": "integer", "maximum": -3},
    "range": {"type": "integer", "minimum": 150, "maximum": 4000},
    "boolean": {"type": "boolean"},
    "any object": {"type": "object"},
    "person": of(name=STRING, age=INTEGER),
    "label": of(label={"enum": ["positive", "negative", "neutral"]}),
    "strings": array(STRING),
    "three numbers": array(NUMBER, 3),
    "two objects": array(of(name=STRING, tags=array(STRING, 2)), 2),
    "nested": of(user=of(address=of(city=STRING, zip=STRING), age=INTEGER)),
    "optional and heavy": of(False, note=STRING, at=of(street=STRING, city=STRING, code=STRING, x=NUMBER), age=INTEGER),
    "minLength": of(text={"type": "string", "minLength": 12}),
    "maxLength": of(text={"type": "string", "maxLength": 5}, then=STRING),
    "pattern": of(id={"type": "string", "pattern": "^[a-z]{2,5}-[0-9]{3}$"}),
    "colour": of(colour={"type": "string", "pattern": "^#[0-9A-F]{6}$"}),
    "time": of(at={"type": "string", "format": "time"}),
    "one of two": {"anyOf": [of(kind={"const": "circle"}, r=NUMBER), of(kind={"const": "box"}, w=NUMBER, name=STRING)]},
    "chain": {"$defs": {"node": CHAIN}} | NODE,
    "tree": {"$defs": {"node": of(name=STRING, kids=array(NODE))}} | NODE,
    "map": {"type": "object", "additionalProperties": of(x=INTEGER, y=INTEGER)},
    "characters": of(**{"größe": INTEGER, "名前": {"enum": ["愛", "愜", "café"]}}),
    "union": of(v={"type": ["string", "integer", "null", "array"]}, w=STRING),
    "const": of(c={"const": 'it is [so] {very} "nice"'}, d=STRING),
    "many": of(False, **dict.fromkeys(["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"], STRING)),
}


@cache
def compiled(backend: str, spec: Spec) -> Grammar:
    return BACKENDS[backend].compile(spec)


def matcher_behind(backend: str, spec: Spec, text: str | bytes) -> Matcher:
    matcher = compiled(backend, spec).matcher()
    byte_ids = {token: i for i, token in enumerate(VOCABULARY.tokens) if len(token) == 1}
    for byte in text.encode() if isinstance(text, str) else text:
        assert matcher.accept(byte_ids[bytes([byte])])
    return matcher


def spell(ids: list[int]) -> bytes:
    return b"".join(VOCABULARY.tokens[i] for i in ids)


OPENING = np.array([any(sign in token for sign in b'{[,:"\\') for token in VOCABULARY.tokens])


def walk(grammar: Grammar, most: int, rng: random.Random) -> tuple[list[int], bool]:
    """At most so many tokens, sampled or forced; and whether they are complete."""
    matcher, finisher, ids = grammar.matcher(), Finisher(VOCABULARY, most), []
    while len(ids) < most:
        token = finisher.next(matcher, most - len(ids), MASK)
        if token is None:
            assert matcher.fill(MASK, 0)
            allowed = np.unpackbits(MASK[0].numpy().view(np.uint8), bitorder="little").astype(bool)
            opening = np.flatnonzero(allowed & OPENING)
            token = int(rng.choice(opening if len(opening) and rng.random() < 0.5 else np.flatnonzero(allowed)))
        assert matcher.accept(token)
        if matcher.ended:
            break
        ids.append(token)
    return ids, matcher.complete


@pytest.mark.parametrize("any_whitespace", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SCHEMAS)
def test_what_can_end_in_time_does(name: str, backend: str, any_whitespace: bool):
    schema = SCHEMAS[name]
    grammar = compiled(backend, Spec.json_schema(schema, any_whitespace))
    least = len(shortest_end(grammar.matcher(), VOCABULARY, MASK, 200))
    for beyond in BEYOND:
        seed = f"{SEED} {name} {backend} {any_whitespace} {beyond}"
        ids, complete = walk(grammar, least + beyond, random.Random(seed))
        text = spell(ids).decode(errors="replace")
        assert complete, (seed, text)
        # xgrammar lets raw control characters into strings with length bounds, which only a random walk would write
        jsonschema.validate(json.loads(text, strict=False), schema)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SCHEMAS)
def test_with_too_few_tokens_it_is_cut_off(name: str, backend: str):
    grammar = compiled(backend, Spec.json_schema(SCHEMAS[name], any_whitespace=False))
    least = len(shortest_end(grammar.matcher(), VOCABULARY, MASK, 200))
    assert shortest_end(grammar.matcher(), VOCABULARY, MASK, least - 1) is None
    assert Finisher(VOCABULARY, least - 1).next(grammar.matcher(), least - 1, MASK) is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("schema", "text", "end"),
    [
        (of(a=STRING), '{"a": "b', '"}'),
        (of(a=STRING), '{"a": "b\\', '""}'),
        (of(a=STRING), b'{"a": "b\xe6\x84', None),
        (of(a=STRING), '{"a": "b\\u00', None),
        (of(a=NUMBER), '{"a": -', "0}"),
        (of(a=NUMBER), '{"a": 1.', None),
        (of(a=NUMBER), '{"a": 1e', None),
        (of(a={"enum": ["red", "reduced"]}), '{"a": "re', 'd"}'),
        (of(a={"enum": ["red", "reduced"]}), '{"a": "redu', 'ced"}'),
        (of(a=STRING, b=INTEGER), '{"a": "', '", "b": 0}'),
        (array(INTEGER, 3), "[7", ", 0, 0]"),
        (array(array(array(array(STRING)))), '[[[["', '"]]]]'),
        (of(False, a=STRING, b=STRING), '{"a": ""', "}"),
        (INTEGER, "12", ""),
    ],
)
def test_ends_from_half_way(backend: str, schema: dict, text: str | bytes, end: str | None):
    spec = Spec.json_schema(schema, any_whitespace=False)
    ids = shortest_end(matcher_behind(backend, spec, text), VOCABULARY, MASK, 20)
    written = (text.encode() if isinstance(text, str) else text) + spell(ids)
    jsonschema.validate(json.loads(written), schema)
    assert end is None or spell(ids).decode() == end


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_end_is_written_in_the_tokenizers_own_tokens(backend: str):
    matcher = compiled(backend, Spec.json_schema(SCHEMAS["nested"], any_whitespace=False)).matcher()
    ids = shortest_end(matcher, VOCABULARY, MASK, 100)
    assert ids == VOCABULARY.encode('{"user": {"address": {"city": "", "zip": ""}, "age": 0}}')


def test_other_grammars_end_too():
    for spec, texts in {
        Spec.regex("(a|b)*c"): {"c"},
        Spec.regex("[0-9]{3}-[0-9]{4}"): {"000-0000"},
        Spec.choices(["yes", "no"]): {"yes", "no"},
        Spec.ebnf('root ::= "[" root "]" | "x"'): {"x"},
    }.items():
        assert spell(shortest_end(compiled("xgrammar", spec).matcher(), VOCABULARY, MASK, 20)).decode() in texts


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_matcher_stays_as_it_is(backend: str):
    def state(matcher: Matcher) -> tuple:
        assert matcher.fill(MASK, 0)
        return matcher.complete, matcher.ended, matcher.forced(), MASK.tolist()

    matcher = matcher_behind(backend, Spec.json_schema(SCHEMAS["tree"]), '{"name": "a", "kids": [{"name"')
    before = state(matcher)
    assert shortest_end(matcher, VOCABULARY, MASK, 50)
    assert Finisher(VOCABULARY, 50).next(matcher, 20, MASK) is None
    assert state(matcher) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_forced_while_there_is_room(backend: str):
    matcher = matcher_behind(backend, Spec.json_schema(SCHEMAS["label"], any_whitespace=False), '{"label": "')
    longest = max(len(VOCABULARY.encode(f'{label}"}}')) for label in ("positive", "negative", "neutral"))
    assert Finisher(VOCABULARY, 100).next(matcher, longest + 8, MASK) is None
    end = shortest_end(matcher, VOCABULARY, MASK, 100)
    assert Finisher(VOCABULARY, 100).next(matcher, len(end), MASK) in (None, end[0])


def test_a_number_that_is_complete_is_ended_with_a_stop_token():
    matcher = matcher_behind("xgrammar", Spec.json_schema(NUMBER), "12")
    assert Finisher(VOCABULARY, 100).next(matcher, 1, MASK) == VOCABULARY.stop_ids[0]
    assert Finisher(VOCABULARY, 100).next(matcher, 9, MASK) is None


def test_an_end_in_hand_is_looked_at_again_when_other_tokens_were_taken():
    spec = Spec.json_schema(array(of(name=STRING, age=INTEGER)), any_whitespace=False)
    matcher = matcher_behind("xgrammar", spec, '[{"name": "a')
    finisher = Finisher(VOCABULARY, 100)
    end = shortest_end(matcher, VOCABULARY, MASK, 100)
    first = finisher.next(matcher, len(end), MASK)
    assert first == end[0] and matcher.accept(first)
    for token in VOCABULARY.encode(' "age": 5'):  # jumped to and sampled
        assert matcher.accept(token)
    rest = shortest_end(matcher, VOCABULARY, MASK, 100)
    assert finisher.next(matcher, len(rest), MASK) == rest[0]


def test_a_hostile_schema_is_given_up(monkeypatch):
    go, gone = finish._Way.go, []
    monkeypatch.setattr(finish._Way, "go", lambda way, *token: gone.append(token) or go(way, *token))
    heavy = of(**{f"key{i}": array(of(a=STRING, b=NUMBER), 5) for i in range(30)})
    matcher = compiled("xgrammar", Spec.json_schema(heavy)).matcher()
    assert shortest_end(matcher, VOCABULARY, MASK, 10_000) is None
    assert finish.BUDGET < len(gone) < 3 * finish.BUDGET
