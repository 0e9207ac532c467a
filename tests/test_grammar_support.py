"""What a schema is rewritten to, and which backend it goes to: nothing that constrains is ignored without a word.

pytest tests/test_grammar_support.py
"""

import copy
import itertools
import json
import random
import re
import sys
from contextlib import suppress
from typing import Any

import pytest
from grammar_schemas import EXAMPLES, TREE
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from grammar import dialects, support
from grammar.exclusion import Exclusion
from grammar.llguidance_backend import LlguidanceBackend
from grammar.normal import ANNOTATIONS, normalize
from grammar.spec import Spec
from grammar.subschemas import TYPES, subschemas, target, type_names
from grammar.vocabulary import Vocabulary
from grammar.xgrammar_backend import XgrammarBackend

BYTES = Vocabulary([*(bytes([i]) for i in range(256)), b""], [256], lambda text: list(text.encode()))
BACKENDS = {"xgrammar": XgrammarBackend(BYTES), "llguidance": LlguidanceBackend(BYTES)}
DRAFT4, DRAFT7 = ({"$schema": f"http://json-schema.org/draft-0{n}/schema#"} for n in (4, 7))
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}


def choose(schema: Any, wanted: str = "auto") -> str:
    return support.choose(Spec.json_schema(copy.deepcopy(schema)), wanted)


def normal(schema: Any) -> Any:
    return normalize(copy.deepcopy(schema))


def accepts(backend: str, schema: Any, instance: Any) -> bool:
    matcher = BACKENDS[backend].compile(Spec.json_schema(schema)).matcher()
    text = json.dumps(instance, ensure_ascii=False).encode()
    return all(matcher.accept(byte) for byte in text) and matcher.complete


# ---- who does what


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_every_example_has_a_backend_that_means_it(example):
    backend = choose(example.schema)
    assert all(accepts(backend, example.schema, instance) for instance in example.valid)
    assert not any(accepts(backend, example.schema, instance) for instance in example.invalid)


@pytest.mark.parametrize(
    "schema",
    [
        OBJECT,
        TREE,
        {"enum": ["a", 1]},
        {"type": "string", "pattern": "^[a-z]+$"},
        {"anyOf": [{"type": "null"}, OBJECT]},
        True,
        {},
    ],
    ids=json.dumps,
)
def test_xgrammar_is_preferred(schema):
    assert choose(schema) == choose(schema, "xgrammar") == "xgrammar"
    assert choose(schema, "llguidance") == "llguidance"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 20},
        {"type": "object", "properties": {"a": {"type": "integer"}}},
        {"type": "object", "properties": {"a": {"items": {"type": "string", "minLength": 3}, "type": "array"}}},
        {"type": "string", "pattern": "cat"},
        {"type": "string", "pattern": "^.*$"},
        {"type": "string", "format": "time"},
        {"type": "number", "minimum": 0},
        {"properties": {"a": {}}},
        {"const": {"a": 1}},
    ],
    ids=json.dumps,
)
def test_what_xgrammar_does_slowly_or_in_part_goes_to_llguidance(schema):
    assert choose(schema) == "llguidance"
    assert choose(schema, "xgrammar") == "xgrammar"


# What xgrammar takes, and an instance that shows it.
IGNORED = [
    ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "allOf", "#", "x"),
    ({"type": "integer", "anyOf": [{"minimum": 3}, {"maximum": 1}]}, "type", "#", "x"),
    ({"minimum": 3}, "minimum", "#", 1),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf", "#", 1),
    ({"type": "array", "items": {"type": "number", "multipleOf": 0.5}}, "multipleOf", "#/items", [0.3]),
    ({"type": "integer", "multipleOf": 7, "minimum": 0}, "multipleOf", "#", 8),
    ({"type": "string", "pattern": "^a*$", "minLength": 2}, "minLength", "#", "a"),
    ({"type": "string", "pattern": "^(?!a)[a-z]$"}, "pattern", "#", "a"),
    ({"type": "string", "format": "uuid", "maxLength": 3}, "maxLength", "#", "f81d4fae-7dec-11d0-a765-00a0c91e6bf6"),
    ({"type": "object", "patternProperties": {"^a$": {"type": "integer"}}}, "patternProperties", "#", None),
    (
        {"type": "object", "properties": {"ab": {}}, "patternProperties": {"a": {"enum": [2]}}},
        "patternProperties",
        "#",
        {"ab": 1},
    ),
    ({"type": "array", "uniqueItems": True}, "uniqueItems", "#", [1, 1]),
    ({"type": "array", "contains": {"type": "null"}}, "contains", "#", [1]),
    ({"type": "object", "properties": {"x": {"not": {"const": 1}}}}, "not", "#/properties/x", {"x": 1}),
    ({"if": {"const": 1}, "then": False}, "if", "#", 1),
    ({"type": "object", "properties": {"a": {}}, "propertyNames": {"maxLength": 1}}, "propertyNames", "#", None),
    ({"$ref": "https://example.org/x"}, "$ref", "#", 1),
    ({"$defs": {"x": {"uniqueItems": True}}, "anyOf": [{"$ref": "#/$defs/x"}]}, "uniqueItems", "#/$defs/x", [1, 1]),
    ({"type": "string", "format": "regex"}, "format", "#", "("),
]


@pytest.mark.parametrize(("schema", "keyword", "path", "wrong"), IGNORED, ids=lambda value: json.dumps(value)[:60])
def test_xgrammar_is_not_asked_for_what_it_ignores(schema, keyword, path, wrong):
    with pytest.raises(UserError, match="xgrammar ignores") as caught:
        choose(schema, "xgrammar")
    assert f"xgrammar ignores {keyword!r} at {path}" in str(caught.value)
    if wrong is not None:
        assert accepts("xgrammar", schema, wrong)  # so it does


@pytest.mark.parametrize("backend", ["auto", "llguidance"])
@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"type": "array", "uniqueItems": True}, "'uniqueItems' at #"),
        ({"properties": {"x": {"if": {"const": 1}, "then": False}}}, "'if' at #/properties/x"),
        ({"type": "string", "format": "regex"}, "'format' at #"),
        ({"type": "string", "pattern": "(?=a)"}, "'pattern' at #"),
        (
            {"type": "object", "minProperties": 1, "properties": {"a": {}}, "patternProperties": {"b": {}}},
            "'minProperties' at #",
        ),
    ],
    ids=json.dumps,
)
def test_what_neither_does_is_refused_by_name(schema, fault, backend):
    with pytest.raises(UserError) as caught:
        choose(schema, backend)
    assert f"llguidance refuses {fault}" in str(caught.value)
    with pytest.raises((RuntimeError, UserError)):  # so it does
        BACKENDS["llguidance"].compile(Spec.json_schema(schema))


def test_definitions_that_nobody_uses_say_nothing():
    assert choose({"$defs": {"x": {"not": {"const": 1}}}, "type": "integer"}) == "xgrammar"


def test_data_is_no_schema():
    assert choose({"enum": ["not", "if"], "default": {"not": 1}}) == "xgrammar"
    assert choose(OBJECT | {"properties": {"not": {}, "uniqueItems": {"type": "null"}}}) == "xgrammar"
    assert choose({"const": {"not": {"if": 1}}}) == "llguidance"


def test_other_kinds():
    assert support.choose(Spec.regex("[a-z]+")) == support.choose(Spec.choices(["a"])) == "xgrammar"
    assert support.choose(Spec.regex("(?i)x")) == "llguidance"
    assert support.choose(Spec.choices(["a"]), "llguidance") == "llguidance"
    for text, fault in (("a(?=b)b", "ignores '(?='"), (r"a\b", r"refuses '\\b'"), ("a^b", "ignores '^'")):
        with pytest.raises(UserError) as caught:
            support.choose(Spec.regex(text))
        assert f"xgrammar {fault}" in str(caught.value)
    with pytest.raises(UserError, match="there are auto, xgrammar and llguidance"):
        support.choose(Spec.regex("a"), "outlines")
    with pytest.raises(UserError, match="llguidance refuses 'ebnf'"):
        support.choose(Spec.ebnf("root ::= 'a'"), "llguidance")


def test_schemas_in_structural_tags_are_looked_at():
    def tag(schema: Any) -> Spec:
        part = {"type": "json_schema", "json_schema": schema}
        return Spec.structural_tag({"type": "structural_tag", "format": {"type": "sequence", "elements": [part]}})

    assert support.choose(tag(OBJECT)) == support.choose(tag({"type": "array", "prefixItems": [OBJECT]})) == "xgrammar"
    with pytest.raises(UserError, match="xgrammar ignores 'uniqueItems' at #/format/elements/0/json_schema/items"):
        support.choose(tag({"type": "array", "items": {"type": "array", "uniqueItems": True}}))


# ---- one form


SAME = [
    ({"title": "x", "type": "integer", "examples": [1], "$comment": "y"}, {"type": "integer"}),
    (DRAFT4 | {"type": "integer", "minimum": 3, "exclusiveMinimum": True}, {"type": "integer", "exclusiveMinimum": 3}),
    (DRAFT4 | {"maximum": 3, "exclusiveMaximum": False}, {"maximum": 3}),
    (DRAFT7 | {"items": [{"type": "null"}], "additionalItems": False}, {"prefixItems": [{"type": "null"}], "items": False}),
    (DRAFT7 | {"items": {"type": "null"}, "additionalItems": False}, {"items": {"type": "null"}}),
    ({"type": "string", "format": "colour"}, {"type": "string"}),
    ({"type": "string", "enum": ["a", 1, None]}, {"enum": ["a"]}),
    ({"type": "integer", "const": "a"}, {"enum": []}),
    ({"type": "integer", "enum": [1, 2.0, 2.5, True]}, {"enum": [1, 2.0]}),
    ({"anyOf": [False, {"type": "null"}]}, {"type": "null"}),
    ({"anyOf": [{"type": "null"}, True]}, {}),
    ({"allOf": [{"type": "null"}, {}]}, {"type": "null"}),
    ({"not": {"not": {"type": "null"}}}, {"type": "null"}),
    ({"not": {}}, {"enum": []}),
    ({"not": False}, {}),
    ({"if": {"const": 1}}, {}),
    ({"then": {"const": 1}}, {}),
    ({"uniqueItems": False, "minItems": 0, "required": []}, {}),
    ({"prefixItems": [True, False, {}], "maxItems": 1}, {"prefixItems": [{}], "maxItems": 1}),
    ({"properties": {"a": {}}, "unevaluatedProperties": False}, {"properties": {"a": {}}, "additionalProperties": False}),
    ({"additionalProperties": {"type": "null"}, "unevaluatedProperties": False}, {"additionalProperties": {"type": "null"}}),
    ({"required": ["b"], "additionalProperties": {"type": "null"}},
     {"required": ["b"], "additionalProperties": {"type": "null"}, "properties": {"b": {"type": "null"}}}),
    ({"propertyNames": {"pattern": "^a"}}, {"patternProperties": {"^a": True}, "additionalProperties": False}),
    ({"oneOf": [{"type": "null"}, {"type": "integer"}]}, {"anyOf": [{"type": "null"}, {"type": "integer"}]}),
    (DRAFT7 | {"$defs": {"a": {"$ref": "#", "minimum": 1}}, "type": "null"}, {"$defs": {"a": {"$ref": "#"}}, "type": "null"}),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "form"), SAME, ids=lambda value: json.dumps(value)[:70])
def test_forms(schema, form):
    assert normal(schema) == form


VALUES = [None, True, 0, 1, 2, 2.5, -7, "", "a", "ab", "a/b", [], [1], [1, 2], [None, "a"], [1, 1], {}, {"a": 1}, {"a": "x"},
          {"b": 1}, {"a": 1, "b": 2}, {"a": 1, "b": 2, "c": 3}, {"c": {"a": 1}}, {"ab": 0}]  # fmt: skip
NAMES = st.sampled_from(["a", "b", "c"])
LITERALS = st.sampled_from(VALUES)
SCALARS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from([*TYPES, ["integer", "null"], ["object", "array"]]),
        "enum": st.lists(LITERALS, min_size=1, max_size=4),
        "const": LITERALS,
        "minimum": st.integers(-3, 3),
        "exclusiveMaximum": st.integers(-3, 3),
        "multipleOf": st.integers(1, 3),
        "minLength": st.integers(0, 2),
        "pattern": st.sampled_from(["^a", "^a$", "b"]),
        "minItems": st.integers(0, 2),
        "maxItems": st.integers(0, 2),
        "uniqueItems": st.booleans(),
        "required": st.lists(NAMES, max_size=2, unique=True),
        "maxProperties": st.integers(0, 2),
        "dependentRequired": st.dictionaries(NAMES, st.lists(NAMES, max_size=2), max_size=2),
        "title": st.just("x"),
    },
)
PLACES = ["#/$defs/s", "#/$defs/t", "#/$defs/s/items", "#named", "#/$defs/s/anyOf/0"]
REFERENCES = st.sampled_from([{"$ref": place} for place in PLACES])


def grown(inner):
    schema = inner | st.booleans()
    some = st.lists(schema, min_size=1, max_size=3)
    keywords = {
        "items": schema, "prefixItems": some, "contains": schema, "properties": st.dictionaries(NAMES, schema, max_size=3),
        "additionalProperties": schema, "patternProperties": st.dictionaries(st.just("^a"), schema, max_size=1),
        "propertyNames": schema, "anyOf": some, "oneOf": some, "allOf": some, "not": schema, "if": schema, "then": schema,
        "else": schema, "dependentSchemas": st.dictionaries(NAMES, schema, max_size=1), "unevaluatedProperties": schema,
        "unevaluatedItems": schema,
    }  # fmt: skip
    return st.builds(lambda a, b: a | b, SCALARS, st.fixed_dictionaries({}, optional=keywords))


SCHEMAS = st.recursive(SCALARS | REFERENCES, grown, max_leaves=8)


@settings(max_examples=80)
@given(SCHEMAS, SCALARS)
def test_the_one_form_means_the_same(schema, other):
    """python-jsonschema is the judge, on a few values. A reference may lead to nothing, or to itself."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = schema | {"$defs": {"s": {"anyOf": [{"type": "null"}], "items": other}, "t": other | {"$anchor": "named"}}}
    before, after = jsonschema.Draft202012Validator(schema), jsonschema.Draft202012Validator(normal(schema))
    for value in VALUES:
        try:
            expected = before.is_valid(value)
        except RecursionError:
            continue
        assert after.is_valid(value) == expected, value


@settings(max_examples=60)
@given(SCHEMAS, SCHEMAS)
def test_what_is_shown_to_exclude_excludes(one, other):
    jsonschema = pytest.importorskip("jsonschema")
    root = {"$defs": {"s": {"items": {}, "anyOf": [{}]}, "t": {"type": "null", "$anchor": "named"}}}
    if Exclusion(root).shown(one, other):
        for value in VALUES:
            assert not all(jsonschema.Draft202012Validator(schema | root).is_valid(value) for schema in (one, other))


def test_exclusion_can_be_shown():
    root = {"$defs": {"cat": {"properties": {"kind": {"const": "cat"}}, "required": ["kind"], "type": "object"}}}
    cat, dog = (
        {"$ref": "#/$defs/cat"},
        {"type": "object", "properties": {"kind": {"enum": ["dog", "hound"]}}, "required": ["kind"]},
    )
    closed = {"type": "object", "properties": {"a": {}}, "additionalProperties": False}
    untyped = {"properties": {"kind": {"const": "cow"}}, "required": ["kind"]}
    exclude = [
        (cat, dog),
        (cat, untyped),
        (closed, dog),
        (False, {}),
        ({"allOf": [{}, dog]}, cat),
        ({"anyOf": [{"type": "null"}, dog]}, {"type": "string"}),
        ({"enum": [1, "a"]}, {"enum": [2, "b"]}),
        ({"type": "string", "maxLength": 1}, {"type": ["null", "number"]}),
    ]
    overlap = [
        (cat, cat),
        (closed, {"type": "object"}),
        (untyped, {"properties": {"kind": {"const": "pig"}}}),
        ({"type": "integer"}, {"type": "number"}),
        ({"enum": [1, "a"]}, {"enum": ["a"]}),
        ({}, {}),
        (True, dog),
    ]
    assert [pair for pair in exclude if not Exclusion(root).shown(*pair)] == []
    assert [pair for pair in overlap if Exclusion(root).shown(*pair)] == []
    assert Exclusion(root).shown(untyped, {"properties": {"kind": {"const": "pig"}}}, frozenset({"object"}))
    assert not Exclusion(root, looks=1).shown({"anyOf": [{"type": "null"}]}, {"type": "string"})


def test_one_property_of_several():
    schema = {"type": "object", "oneOf": [{"required": [name], "title": name} for name in "abc"]}
    form = normal(schema)
    assert "oneOf" not in json.dumps(form) and choose(schema) == "llguidance"
    for value in ({}, {"a": 1}, {"b": 1, "x": 2}, {"a": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}):
        assert accepts("llguidance", schema, value) == (len(value.keys() & set("abc")) == 1)


@pytest.mark.parametrize(
    ("reference", "schema"),
    [
        ("#/definitions/a", {"definitions": {"a": {"type": "null"}}}),
        ("#/definitions/a~1b", {"definitions": {"a/b": {"type": "null"}}}),
        ("#/definitions/a%20b", {"definitions": {"a b": {"type": "null"}}}),
        ("#/items/0", {"items": [{"type": "null"}]}),
        ("#/elsewhere/x", {"elsewhere": {"x": {"type": "null", "title": "x"}}}),
        ("#here", {"$defs": {"b": {"$anchor": "here", "type": "null"}}}),
        ("https://example.org/a", {"$id": "https://example.org/root", "$defs": {"b": {"$id": "/a", "type": "null"}}}),
        (
            "a#/$defs/c",
            {"$id": "https://example.org/root", "$defs": {"b": {"$id": "a", "$defs": {"c": {"type": "null"}}}}},
        ),
        ("#/$defs/c", {"$id": "urn:x:y", "$defs": {"c": {"type": "null"}}}),
    ],
)
def test_references_lead_to_definitions(reference, schema):
    form = normal(schema | {"properties": {"x": {"$ref": reference}}})
    found = target(form["properties"]["x"]["$ref"], form)
    assert found == {"type": "null"} or found["type"] == "null"
    assert not any(key in node for _, node in subschemas(form) for key in ("$id", "$anchor", "$schema"))


def test_references_to_nowhere_stay():
    for reference in ("https://example.org/x", "#/$defs/none", "#none", "other.json"):
        assert normal({"$ref": reference}) == {"$ref": reference}
        with pytest.raises(UserError, match=r"xgrammar ignores '\$ref' at #; llguidance refuses"):
            choose({"$ref": reference})


def test_of_the_type():
    assert type_names(3.0) == type_names(3) == {"integer", "number"}
    assert type_names(True) == {"boolean"} and type_names(2.5) == {"number"}


def test_nothing_but_a_user_error():
    """Whatever JSON is given as a schema."""
    keywords = st.sampled_from(
        [*support.CONSTRAINTS, *ANNOTATIONS, "$defs", "definitions", "$id", "$anchor", "$schema", "x"]
    )
    values = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=4)
    )
    anything = st.recursive(
        values, lambda v: st.lists(v, max_size=3) | st.dictionaries(keywords, v, max_size=4), max_leaves=25
    )

    @settings(max_examples=120)
    @given(st.dictionaries(keywords, anything, max_size=5))
    def holds(schema: dict):
        for wanted in ("auto", *support.BACKENDS):
            try:
                assert choose(schema, wanted) in support.BACKENDS
            except UserError as error:
                assert len(str(error)) < 1000 and "\n" not in str(error)

    holds()


MOST_CALLS = 5_000_000


def test_hostile_schemas_cost_little():
    """In calls of functions: seconds are the machine's. All five take 1.6 million."""
    deep: Any = {}
    for _ in range(400):
        deep = {"anyOf": [deep, {"type": "array", "items": {"$ref": "#"}}]}
    some = {str(i): {"properties": {"a": {}}} for i in range(2000)}
    wide = {"oneOf": [{"$ref": f"#/$defs/{i}"} for i in some], "$defs": some}
    chain = {"$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(5000)}, "$ref": "#/$defs/0"}
    doubling = {
        "$defs": {str(i): {"oneOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(40)},
        "$ref": "#/$defs/0",
    }
    calls = itertools.count()

    def bound(_frame: object, event: str, _what: object) -> None:
        assert event != "call" or next(calls) < MOST_CALLS

    before = sys.getprofile()
    sys.setprofile(bound)
    try:
        for schema in (deep, wide, chain, doubling, {"type": "string", "pattern": "(" * 50_000}):
            with suppress(UserError):
                support.choose(Spec.json_schema(schema))
    finally:
        sys.setprofile(before)


# ---- patterns


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("^a[^]b]+$", ["anchor", "literal", "class", "repeat", "anchor"]),
        (r"(?:a|\(b)*?", ["group", "literal", "or", "escape", "literal", "close", "repeat"]),
        (r"(?=a)(?<!b)(?<n>c)\1\b\p{L}(?i)", ["look", "literal", "close", "look", "literal", "close", "group", "literal", "close",
                                             "back", "boundary", "property", "flags"]),
        (r"[\]\\]{2,3}.{4}", ["class", "repeat", "literal", "repeat"]),
    ],
)  # fmt: skip
def test_pieces(text, kinds):
    assert [kind for kind, _ in dialects.pieces(text)] == kinds
    assert "".join(piece for _, piece in dialects.pieces(text)) == text


def test_whole_patterns():
    assert all(map(dialects.whole, ["^$", "^abc$", "^(a|b)$", r"^a\$$", "^[^|$]$"]))
    assert not any(map(dialects.whole, ["", "a", "^a", "a$", "^a|b$", "^a$|^b$", r"^a\$", "^(^a)$"]))
    assert dialects.without_anchors("^(a|b)$") == "(a|b)" and dialects.without_anchors("^a|b$") == "^a|b$"


def test_patterns_mean_what_they_say_where_they_go():
    """Random patterns of simple parts against Python's `re`, in the backend that is chosen."""
    rng = random.Random(5)
    parts = [
        "a",
        "b",
        "[ab]",
        "[^a]",
        ".",
        r"\d",
        r"\w",
        "(a|b)",
        "(?:ab)?",
        "a{2}",
        "b{1,2}",
        '"',
        r"\\",
        "é",
        r"\S",
        r"[\d-]",
    ]
    letters = 'ab"\\1é -'
    for _ in range(80):
        text = "".join(rng.choices(parts, k=rng.randint(1, 3)))
        text = rng.choice(["", "^"]) + text + rng.choice(["", "$"])
        backend = choose({"type": "string", "pattern": text})
        for _ in range(12):
            value = "".join(rng.choices(letters, k=rng.randint(0, 4)))
            expected = re.search(text, value, re.ASCII) is not None
            assert accepts(backend, {"type": "string", "pattern": text}, value) == expected, (backend, text, value)
