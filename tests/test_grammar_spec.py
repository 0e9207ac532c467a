"""Spec: its constructors, what they take, and what they say of what they do not take."""

import json
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from errors import UserError
from grammar.spec import Spec

TAG = {"type": "structural_tag", "format": {"type": "any_text"}}


class Person(BaseModel):
    name: str
    age: int = 0


class Plain:
    pass


class NoJson(BaseModel):
    call: Callable[[int], int]


def deep(levels: int) -> dict:
    schema = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def circular() -> dict:
    schema = {"type": "object"}
    schema["properties"] = {"again": schema}
    return schema


def test_a_schema_is_the_same_from_a_model_a_dict_and_text():
    schema = Person.model_json_schema()
    specs = {Spec.json_schema(Person), Spec.json_schema(schema), Spec.json_schema(json.dumps(schema, indent=4))}
    (spec,) = specs
    assert spec.kind == "json_schema" and spec.any_whitespace
    assert json.loads(spec.text) == schema


def test_whitespace_is_part_of_what_is_asked():
    assert Spec.json_schema({}, any_whitespace=False) != Spec.json_schema({})
    assert not Spec.structural_tag(TAG, any_whitespace=False).any_whitespace


def test_properties_keep_their_order():
    names = ["zebra", "ant", "Mole"]
    spec = Spec.json_schema({"properties": {name: {} for name in names}})
    assert list(json.loads(spec.text)["properties"]) == names


@pytest.mark.parametrize("schema", [True, False, "true", "{}", {}])
def test_a_schema_may_be_a_boolean_or_empty(schema):
    assert json.loads(Spec.json_schema(schema).text) in (True, False, {})


def test_text_is_kept_as_it_is_beyond_ascii():
    assert "é😀" in Spec.json_schema({"const": "é😀"}).text
    assert Spec.regex("é+").text == "é+"
    assert json.loads(Spec.choices(["é", "😀"]).text) == ["é", "😀"]


def test_any_object():
    assert json.loads(Spec.json_object().text) == {"type": "object"}
    assert Spec.json_object(any_whitespace=False) == Spec("json_schema", Spec.json_object().text, False)


def test_choices_are_told_once_each_in_order():
    assert json.loads(Spec.choices(("yes", "no", "yes")).text) == ["yes", "no"]


def test_the_others_keep_their_text():
    assert Spec.ebnf('root ::= "a"') == Spec("ebnf", 'root ::= "a"')
    assert Spec.structural_tag(TAG) == Spec.structural_tag(json.dumps(TAG))
    assert Spec.structural_tag(TAG).kind == "structural_tag"


def test_equal_specs_are_one_key_of_a_cache():
    assert len({Spec.regex("a"), Spec.regex("a"), Spec.regex("b"), Spec.ebnf("a")}) == 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Spec.json_schema(Plain), "json_schema is the class Plain, which is no pydantic model"),
        (lambda: Spec.json_schema(int), "the class int"),
        (lambda: Spec.json_schema(NoJson), "json_schema is the class NoJson, which has no schema"),
        (lambda: Spec.json_schema("{"), "json_schema is not valid JSON"),
        (lambda: Spec.json_schema(""), "json_schema is not valid JSON"),
        (lambda: Spec.json_schema("3"), "json_schema is a JSON int"),
        (lambda: Spec.json_schema("[]"), "json_schema is a JSON list"),
        (lambda: Spec.json_schema('"text"'), "json_schema is a JSON str"),
        (lambda: Spec.json_schema(None), "json_schema is a JSON NoneType"),
        (lambda: Spec.json_schema(7), "json_schema is a JSON int"),
        (lambda: Spec.json_schema([{}]), "json_schema is a JSON list"),
        (lambda: Spec.json_schema({"const": float("nan")}), "json_schema is not valid JSON"),
        (lambda: Spec.json_schema({"const": float("inf")}), "json_schema is not valid JSON"),
        (lambda: Spec.json_schema('{"const": NaN}'), "json_schema is not valid JSON"),
        (lambda: Spec.json_schema('{"const": -Infinity}'), "json_schema is not valid JSON"),
        (lambda: Spec.json_schema('{"const": 1e999}'), "json_schema is not valid JSON"),
        (lambda: Spec.json_schema('{"const": 1' + "0" * 5000 + "}"), "json_schema is not valid JSON"),
        (lambda: Spec.json_schema({"const": {1, 2}}), "json_schema is not valid JSON"),
        (lambda: Spec.json_schema({"const": b"bytes"}), "json_schema is not valid JSON"),
        (lambda: Spec.json_schema({(1, 2): {}}), "json_schema is not valid JSON"),
        (lambda: Spec.json_schema(circular()), "json_schema is not valid JSON"),
        (lambda: Spec.json_schema(deep(100_000)), "json_schema is nested too deeply"),
        (lambda: Spec.json_schema("[" * 100_000), "json_schema is nested too deeply"),
        (lambda: Spec.json_schema({"const": "\ud800"}), "json_schema is not valid Unicode"),
        (lambda: Spec.json_schema({"\udfff": {}}), "json_schema is not valid Unicode"),
        (lambda: Spec.json_schema('{"const": "\\ud800"}'), "json_schema is not valid Unicode"),
        (lambda: Spec.json_schema('{"const": "\ud800"}'), "json_schema is not valid Unicode"),
        (lambda: Spec.regex(b"a"), "regex is a bytes; it must be text"),
        (lambda: Spec.regex(None), "regex is a NoneType"),
        (lambda: Spec.regex("a\ud800"), "regex is not valid Unicode: surrogates not allowed at 1"),
        (lambda: Spec.ebnf(3), "ebnf is a int"),
        (lambda: Spec.ebnf("\udc00"), "ebnf is not valid Unicode"),
        (lambda: Spec.choices("yes"), "choices is a str; it must be a list of texts"),
        (lambda: Spec.choices({"yes", "no"}), "it must be a list of texts"),
        (lambda: Spec.choices(None), "choices is a NoneType"),
        (lambda: Spec.choices([]), "choices is empty"),
        (lambda: Spec.choices(["yes", ""]), "choices has an empty text"),
        (lambda: Spec.choices(["yes", 1]), "choices is a int; it must be text"),
        (lambda: Spec.choices(["\ud800"]), "choices is not valid Unicode"),
        (lambda: Spec.structural_tag("[]"), "structural_tag is a JSON list"),
        (lambda: Spec.structural_tag(True), "structural_tag is a JSON bool"),
        (lambda: Spec.structural_tag("no"), "structural_tag is not valid JSON"),
    ],
)
def test_what_cannot_be_asked(build, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        build()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
)


@given(anything)
def test_whatever_is_given_is_a_spec_or_a_users_error(value):
    for build in (Spec.json_schema, Spec.regex, Spec.ebnf, Spec.choices, Spec.structural_tag):
        try:
            spec = build(value)
        except UserError:
            continue
        spec.text.encode()
        if spec.kind in ("json_schema", "structural_tag") and not isinstance(value, str):
            assert json.loads(spec.text) == json.loads(json.dumps(value))
