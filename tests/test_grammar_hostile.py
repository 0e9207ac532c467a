"""Specs that are made to harm: each gets an answer in time, and nobody else notices.

python -m pytest tests/test_grammar_hostile.py
"""

import json
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import UserError
from grammar.compiler import Compiler
from grammar.spec import Spec
from grammar.vocabulary import Vocabulary
from tokenizer import Tokenizer

BUNDLED = Path(__file__).parents[1] / "assets" / "folio-tiny"
TIMEOUT = 2.0  # of a compile, in seconds
LONGEST = 60.0  # for an answer: the start of a worker, on a machine that has much else to do, and TIMEOUT


def schema(value: Any) -> Spec:
    return Spec("json_schema", json.dumps(value))


def objects(count: int, **more: Any) -> dict:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}, **more}


def nested(before: str, after: str, depth: int) -> Spec:
    """As text: Python's own JSON writer gives up before these depths."""
    return Spec("json_schema", before * depth + "{}" + after * depth)


def laughs(keyword: str, doublings: int = 30) -> Spec:
    """Each definition uses the next one twice."""
    twice = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(doublings)}
    if keyword == "properties":
        defs = {name: {"type": "object", "properties": {"a": ref, "b": ref}} for name, ref in twice.items()}
    else:
        defs = {name: {keyword: [ref, ref]} for name, ref in twice.items()}
    return schema({"$defs": {**defs, f"d{doublings}": {"type": "integer"}}, "$ref": "#/$defs/d0"})


def strings(levels: int, **bounds: int) -> dict:
    """A string in an array in an array ..."""
    value: dict[str, Any] = {"type": "string", **bounds}
    for _ in range(levels):
        value = {"type": "array", "items": value}
    return value


def tag(content: dict) -> Spec:
    return Spec("structural_tag", json.dumps({"type": "structural_tag", "format": content}))


def nested_tag(depth: int) -> Spec:
    text = '{"type": "sequence", "elements": [' * depth + '{"type": "any_text"}' + "]}" * depth
    return Spec("structural_tag", f'{{"type": "structural_tag", "format": {text}}}')


REPEATED = {"type": "repeat", "content": {"type": "const_string", "value": "a"}, "min": 0, "max": 10**9}

HOSTILE: dict[str, Spec] = {
    **{f"arrays nested {n}": nested('{"type": "array", "items": ', "}", n) for n in (100, 200, 400, 600, 1000, 10_000)},
    **{
        f"objects nested {n}": nested('{"type": "object", "properties": {"a": ', "}}", n)
        for n in (100, 200, 400, 1000, 100_000)
    },
    **{f"{n} optional properties": schema(objects(n)) for n in (100, 300, 600, 1000)},
    "100 optional properties, some of them": schema(objects(100, minProperties=3, maxProperties=60)),
    **{f"enum of {n}": schema({"enum": [f"value {i}" for i in range(n)]}) for n in (1000, 4000, 8000, 10_000, 100_000)},
    **{f"const of {n} bytes": schema({"const": "x" * n}) for n in (10_000, 100_000, 1_000_000)},
    "100 enums of 10 KB": schema(objects(0, properties={f"p{i}": {"enum": [f"{i} " * 3000]} for i in range(100)})),
    **{f"maxLength {n}": schema(strings(0, maxLength=n)) for n in (50, 200, 10**9, 2**31, 10**30, -1)},
    "minLength 1000": schema(strings(0, minLength=1000)),
    "arrays of arrays of bounded strings": schema(strings(4, maxLength=100)),
    **{f"multipleOf {n}": schema({"type": "integer", "multipleOf": n}) for n in (1000, 10**9)},
    "EBNF of 50 000 rules": Spec.ebnf("\n".join(["root ::= r0", *(f'r{i} ::= "{i}"' for i in range(50_000))])),
    "EBNF that is ambiguous": Spec.ebnf('root ::= root root | "a"'),
    "EBNF without an end": Spec.ebnf("root ::= root"),
    "EBNF without a root": Spec.ebnf('a ::= "a"'),
    **{f"EBNF with {n} parentheses": Spec.ebnf(f'root ::= {"(" * n}"a"{")" * n}') for n in (2000, 100_000)},
    **{f"regex with {n} parentheses": Spec.regex("(" * n + "a" + ")" * n) for n in (2000, 20_000, 50_000, 1_000_000)},
    **{f"pattern with {n} parentheses": schema({"pattern": "(" * n + "a" + ")" * n}) for n in (2000, 50_000)},
    **{
        f"pattern {pattern}": schema({"type": "string", "pattern": pattern})
        for pattern in (".{1,100000}", "^.{0,200}$", "(a{1000}){1000}", "(a|b)*a(a|b){20}", "((a+)+)+b", "(", "a{9,1}")
    },
    **{
        f"regex {pattern}": Spec.regex(pattern)
        for pattern in (".{1,100000}", "(a{1000}){1000}", "((a{99}){99}){99}", "(a|b)*a(a|b){20}", "((a+)+)+b", "(a")
    },
    **{f"a billion laughs in {keyword}": laughs(keyword) for keyword in ("anyOf", "oneOf", "allOf", "properties")},
    "items without end": schema({"type": "array", "minItems": 10**9, "maxItems": 10**9}),
    "a schema that is itself": schema({"$ref": "#"}),
    "two schemas that are each other": schema(
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    ),
    "a choice of itself": schema({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}),
    "a reference to nowhere": schema({"$ref": "#/$defs/none"}),
    "a reference to a file": schema({"$ref": "file:///etc/passwd"}),
    "tags repeated without end": tag(REPEATED),
    **{f"tags nested {n}": nested_tag(n) for n in (5000, 100_000)},
    "choices of 1 MB": Spec.choices(["x" * 1_000_000, "y"]),
    "100 000 choices": Spec.choices([f"choice {i}" for i in range(100_000)]),
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.of(Tokenizer.from_pretrained(BUNDLED), 1024, [2, 0])


@pytest.fixture(scope="module", params=["auto", "xgrammar"])
def compiler(vocabulary: Vocabulary, request: pytest.FixtureRequest) -> Iterator[Compiler]:
    """Of its own accord it takes llguidance for much of what is slow in xgrammar."""
    with Compiler(vocabulary, request.param, timeout=TIMEOUT) as compiler:
        yield compiler


@pytest.mark.parametrize("name", HOSTILE)
def test_it_gets_an_answer_and_harms_nobody(compiler, vocabulary, name):
    hostile = compiler.compile(HOSTILE[name])
    # no other row asks for this one, so it has to be compiled
    harmless = compiler.compile(
        schema({"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]})
    )
    matcher = harmless.result(LONGEST).matcher()
    assert all(matcher.accept(token) for token in vocabulary.encode(json.dumps({name: 7}))) and matcher.complete
    error = hostile.exception(LONGEST)
    if error is None:
        mask = torch.zeros(1, 32, dtype=torch.int32)
        assert not hostile.result().matcher().fill(mask, 0) or mask.any(), "a grammar that matches nothing"
    else:
        assert isinstance(error, UserError) and "\n" not in str(error) and len(str(error)) < 500


def test_all_of_them_at_once(vocabulary):
    with Compiler(vocabulary, timeout=TIMEOUT) as compiler:
        hostile = [compiler.compile(spec) for spec in HOSTILE.values()]
        harmless = compiler.compile(schema({"type": "object", "properties": {"name": {"type": "string"}}}))
        assert harmless.result(LONGEST).matcher().accept(vocabulary.encode("{")[0])
        assert not wait(hostile, LONGEST).not_done
        assert all(future.exception() is None or isinstance(future.exception(), UserError) for future in hostile)
