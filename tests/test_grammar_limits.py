"""The gate: each limit at and one above it, what is malformed or empty, and hostile specs of every kind."""

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from errors import UserError
from grammar import limits
from grammar.limits import check, may_be_slow
from grammar.spec import Spec


def schema(document, **keywords) -> Spec:
    return Spec("json_schema", json.dumps({**document, **keywords} if keywords else document))


def tag(form) -> Spec:
    return Spec("structural_tag", json.dumps({"type": "structural_tag", "format": form}))


def nested(levels: int, wrap, inner) -> dict:
    for _ in range(levels):
        inner = wrap(inner)
    return inner


def lists(levels: int) -> Spec:
    """levels: of objects and lists in the document."""
    return schema(nested(levels - 1, lambda inner: {"items": inner}, {"type": "integer"}))


def optional(count: int, **keywords) -> Spec:
    return schema({"type": "object", "properties": {f"p{i}": {} for i in range(count)}, **keywords})


def groups(levels: int) -> str:
    return "(" * levels + "a" + ")" * levels


def rules(count: int) -> Spec:
    return Spec("ebnf", "\n".join(["root ::= r1", *(f'r{i} ::= "a"' for i in range(1, count))]))


def padded(spec: Spec, size: int) -> Spec:
    return Spec(spec.kind, spec.text + " " * (size - len(spec.text)))


def refused(spec: Spec) -> str:
    with pytest.raises(UserError) as caught:
        check(spec)
    message = str(caught.value)
    assert message.startswith(spec.kind) and "\n" not in message and len(message) < 600
    return message


def star(form) -> dict:
    return {"type": "star", "content": form}


any_text = {"type": "any_text"}

# what, how to build one of a size, the limit, what the message says of one more
LIMITS = [
    ("bytes", lambda n: padded(schema({}), n), limits.MAX_BYTES, "has 262,145 bytes"),
    ("depth", lists, limits.MAX_DEPTH, "65 deep in each other"),
    ("values", lambda n: schema({"default": [0] * (n - 2)}), limits.MAX_NODES, "has 30,001 values"),
    ("optional", optional, limits.MAX_OPTIONAL, "$ has 257 properties that are not required"),
    (
        "optional, counted",
        lambda n: optional(n, minProperties=1),
        limits.MAX_OPTIONAL_COUNTED,
        "$.minProperties has 101 properties that are not required",
    ),
    ("enum", lambda n: schema({"items": {"enum": list(range(n))}}), limits.MAX_ENUM, "$.items.enum has 4,001 values"),
    ("const", lambda n: schema({"const": "a" * (n - 2)}), limits.MAX_SPELLED_BYTES, "has 65,537 bytes in enum and const"),
    (
        "enums together",
        lambda n: schema({"anyOf": [{"enum": ["a" * 998]}] * 65, "const": "a" * (n - 65_002)}),
        limits.MAX_SPELLED_BYTES,
        "has 65,537 bytes in enum and const",
    ),
    ("name", lambda n: schema({"properties": {"a" * n: {}}}), limits.MAX_NAME_BYTES, "$ names a property of 257 bytes"),
    ("name in UTF-8", lambda n: schema({"properties": {"é" * (n // 2) + "a" * (n % 2): {}}}), limits.MAX_NAME_BYTES, "257 bytes"),
    ("required name", lambda n: schema({"required": ["a" * n]}), limits.MAX_NAME_BYTES, "$ names a property of 257 bytes"),
    ("maxLength", lambda n: schema({"maxLength": n}), limits.MAX_COUNT, "$.maxLength is 2,147,483,648"),
    ("minItems", lambda n: schema({"minItems": n}), limits.MAX_COUNT, "$.minItems is 2,147,483,648"),
    ("maxProperties", lambda n: schema({"maxProperties": n}), limits.MAX_COUNT, "$.maxProperties is 2,147,483,648"),
    ("maximum", lambda n: schema({"type": "integer", "maximum": n}), limits.MAX_INTEGER, "$.maximum is, without its sign,"),
    ("minimum", lambda n: schema({"type": ["integer"], "minimum": -n}), limits.MAX_INTEGER, "$.minimum is"),
    ("pattern", lambda n: schema({"items": {"pattern": "a" * n}}), limits.MAX_PATTERN, "$.items.pattern has 1,025 characters"),
    ("pattern of names", lambda n: schema({"patternProperties": {"a" * n: {}}}), limits.MAX_PATTERN, "has 1,025 characters"),
    ("groups", lambda n: schema({"pattern": groups(n)}), limits.MAX_NESTING, "$.pattern has 101 groups in each other"),
    ("repeat", lambda n: schema({"pattern": f"a{{{n}}}"}), limits.MAX_UNROLLED, "$.pattern has, with its repeats"),
    (
        "repeats in each other",
        lambda n: schema({"pattern": f"((a{{0,10}}){{10}}){{2,{n // 100}}}" + "b" * (n % 100)}),
        limits.MAX_UNROLLED,
        "$.pattern has, with its repeats written out, 10,001 characters and classes",
    ),
    ("regex", lambda n: Spec("regex", "a" * n), limits.MAX_PATTERN, "regex has 1,025 characters"),
    ("regex groups", lambda n: Spec("regex", groups(n)), limits.MAX_NESTING, "regex has 101 groups"),
    ("regex repeat", lambda n: Spec("regex", f"[a-z]{{1,{n}}}"), limits.MAX_UNROLLED, "regex has, with its repeats"),
    ("ebnf", lambda n: padded(rules(2), n), limits.MAX_EBNF_BYTES, "ebnf has 65,537 bytes"),
    ("rules", rules, limits.MAX_RULES, "ebnf has 2,001 rules"),
    ("parentheses", lambda n: Spec("ebnf", f"root ::= {groups(n)}\na ::= [a]"), limits.MAX_NESTING, "has 101 parentheses"),
    ("parentheses of a macro", lambda n: Spec("ebnf", f"root ::= Token{'(' * n}1{')' * n}"), limits.MAX_NESTING, "101 parentheses"),
    ("ebnf repeat", lambda n: Spec("ebnf", f'root ::= "a"{{0,{n}}}'), limits.MAX_REPEAT, "ebnf repeats 10,001 times"),
    ("literals", lambda n: Spec("ebnf", f'root ::= "{"a" * (n - 5)}" "b"'), limits.MAX_SPELLED_BYTES - 20, None),
    ("choices", lambda n: Spec("choices", json.dumps([f"{i}" for i in range(n)])), limits.MAX_CHOICES, "choices has 1,001 texts"),
    ("bytes of choices", lambda n: Spec("choices", json.dumps(["a" * n])), limits.MAX_SPELLED_BYTES, "choices has 65,537 bytes"),
    ("tags", lambda n: tag({"type": "repeat", "min": 0, "max": n, "content": any_text}), limits.MAX_COUNT, "$.format.max is"),
    ("text of a tag", lambda n: tag({"type": "const_string", "value": "a" * n}), limits.MAX_SPELLED_BYTES, "has 65,537 bytes"),
    ("trigger", lambda n: tag({**any_text, "excludes": ["a" * n]}), limits.MAX_NAME_BYTES, "looks for a text of 257 bytes"),
    ("depth of a tag", lambda n: tag(nested(n - 2, star, any_text)), limits.MAX_DEPTH, "65 deep"),
    (
        "pattern in a tag",
        lambda n: tag({"type": "sequence", "elements": [any_text, {"type": "regex", "pattern": "a" * n}]}),
        limits.MAX_PATTERN,
        "$.format.elements[1].pattern has 1,025 characters",
    ),
    (
        "rules in a tag",
        lambda n: tag({"type": "tag", "begin": "<", "end": ">", "content": {"type": "grammar", "grammar": rules(n).text}}),
        limits.MAX_RULES,
        "$.format.content.grammar has 2,001 rules",
    ),
    (
        "schema in a tag",
        lambda n: tag({"type": "json_schema", "json_schema": {"properties": {"a b": {"enum": list(range(n))}}}}),
        limits.MAX_ENUM,
        '$.format.json_schema.properties["a b"].enum has 4,001 values',
    ),
]  # fmt: skip


@pytest.mark.parametrize(("build", "limit", "message"), [row[1:] for row in LIMITS], ids=[row[0] for row in LIMITS])
def test_a_limit_lets_through_what_reaches_it_and_refuses_one_more(build, limit, message):
    check(build(limit))
    if message is not None:
        assert message in refused(build(limit + 1))


REF = {"$ref": "#"}
MALFORMED = [
    ({"type": 5}, "$.type is 5"),
    ({"type": "text"}, "$.type is 'text'"),
    ({"type": []}, "$.type"),
    ({"type": ["string", "string"]}, "$.type"),
    ({"type": ["string", None]}, "$.type"),
    ({"required": "a"}, "$.required is 'a'; it must be a list of names"),
    ({"required": [1]}, "$.required"),
    ({"properties": []}, "$.properties is []; it must be an object"),
    ({"properties": {"a": 5}}, "$.properties.a is 5; it must be a schema"),
    ({"items": "string"}, "$.items is 'string'"),
    ({"items": [{"type": 1}]}, "$.items[0].type"),
    ({"anyOf": []}, "$.anyOf"),
    ({"oneOf": {}}, "$.oneOf"),
    ({"allOf": [None]}, "$.allOf[0] is null"),
    ({"enum": []}, "$.enum is []; it must be a list of at least one value"),
    ({"enum": "a"}, "$.enum"),
    ({"pattern": 5}, "$.pattern is 5; it must be text"),
    ({"format": None}, "$.format is null"),
    ({"minLength": -1}, "$.minLength is -1; it must be a whole number from 0 up"),
    ({"maxLength": 2.5}, "$.maxLength"),
    ({"maxItems": True}, "$.maxItems is true"),
    ({"minProperties": "1"}, "$.minProperties"),
    ({"minimum": "1"}, "$.minimum"),
    ({"multipleOf": 0}, "$.multipleOf is 0; it must be a number above 0"),
    ({"multipleOf": True}, "$.multipleOf"),
    ({"$ref": 5}, "$.$ref"),
    ({"$ref": "#/$defs/none"}, "$.$ref is '#/$defs/none', which is not in the schema"),
    ({"$ref": "#none"}, "which is not in the schema"),
    ({"$ref": "#/enum/7", "enum": [{}]}, "which is not in the schema"),
    ({"$ref": "#/enum", "enum": [1]}, "$.enum is [1]; it must be a schema"),
    ({"$ref": "http://example.com/a.json"}, "'http://example.com/a.json'; references to other documents are not followed"),
    ({"$ref": "other.json#/a"}, "references to other documents are not followed"),
    ({"properties": {"a": {"pattern": "a("}}}, "$.properties.a.pattern has 1 groups that do not close"),
    ({"patternProperties": {"[": {}}}, '$.patternProperties["["] has a [ that does not end'),
    ({"pattern": "a\0"}, "$.pattern has a NUL"),
]  # fmt: skip


@pytest.mark.parametrize(("document", "message"), MALFORMED, ids=[json.dumps(row[0]) for row in MALFORMED])
def test_a_malformed_schema_is_refused_by_the_place(document, message):
    assert message in refused(schema(document))


def defs(root, **more) -> dict:
    return {**root, "$defs": more}


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}
EMPTY = [
    (False, "$ is false"),
    ({"not": {}}, "$ fits no value"),
    ({"allOf": [True, False]}, "$ fits no value"),
    ({"anyOf": [False, {"not": True}]}, "$ fits no value"),
    ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "$ fits no value"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "$ fits no value"),
    ({"type": "array", "items": False, "minItems": 1}, "$ fits no value"),
    ({"type": "array", "prefixItems": [True, False], "minItems": 2}, "$ fits no value"),
    ({"type": "array", "contains": False}, "$ fits no value"),
    (REF, "$ leads back to itself"),
    ({"allOf": [REF]}, "leads back to itself"),
    ({"anyOf": [REF, {"type": "null"}]}, "leads back to itself"),
    ({"oneOf": [{"allOf": [REF]}]}, "leads back to itself"),
    (defs({"$ref": "#/$defs/a"}, a={"$ref": "#/$defs/b"}, b={"$ref": "#/$defs/a"}), "$.$defs."),
    (defs({"properties": {"x": {"$ref": "#/$defs/a"}}}, a={"$ref": "#/$defs/a"}), "$.$defs.a leads back"),
    (defs({"$ref": "#/$defs/node"}, node=NODE), "has no end"),
    (defs({"type": "object", "properties": {"list": {"$ref": "#/$defs/node"}}}, node=NODE), "$.properties.list has no end"),
    ({"properties": {"a": REF}, "required": ["a"]}, "$ has no end"),
    ({"type": "array", "items": REF, "minItems": 2}, "$ has no end"),
    ({"type": "object", "additionalProperties": REF, "required": ["a"]}, "$ has no end"),
    (
        defs(
            {"$ref": "#/$defs/a"},
            a={"items": {"$ref": "#/$defs/b"}, "minItems": 1},
            b={"properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]},
        ),
        "has no end",
    ),
    ({"minLength": 3, "maxLength": 2}, "$.minLength is 3 and maxLength is 2"),
    ({"items": {"minimum": 2, "maximum": 1}}, "$.items.minimum is 2"),
    ({"minimum": 2, "exclusiveMaximum": 2}, "$.minimum is 2 and exclusiveMaximum is 2"),
    ({"exclusiveMinimum": 1, "exclusiveMaximum": 1}, "nothing is between"),
    ({"minItems": 2, "maxItems": 1}, "$.minItems"),
    ({"maxProperties": 1, "required": ["a", "b"]}, "$.maxProperties is 1, and 2 properties are required"),
]  # fmt: skip


@pytest.mark.parametrize(("document", "message"), EMPTY, ids=[json.dumps(row[0]) for row in EMPTY])
def test_a_schema_that_nothing_fits_is_refused(document, message):
    assert message in refused(schema(document))


@pytest.mark.parametrize(
    "document",
    [
        True,
        {},
        {"type": "object", "properties": {"child": REF}},
        {"type": "array", "items": REF},
        {"type": "array", "prefixItems": [REF], "minItems": 0},
        {"type": ["object", "null"], "properties": {"next": REF}, "required": ["next"]},
        {"type": "object", "properties": {"next": {"anyOf": [REF, {"type": "null"}]}}, "required": ["next"]},
        {"type": "object", "properties": {"a": False}},
        {"type": "object", "patternProperties": {"^a": True}, "required": ["ab"], "additionalProperties": False},
        {"anyOf": [False, {"type": "null"}]},
        {"items": False},
        {"contains": False, "minContains": 0},
        {"minimum": 1, "maximum": 1},
        {"minimum": 1, "exclusiveMinimum": True},
        {"const": None},
        {"not": {"type": "null"}},
        {"dependencies": {"a": ["b"], "c": {"required": ["d"]}}},
        {"enum": [{"$ref": "no reference"}], "default": {"type": 5}},
        {"properties": {"type": {"type": "string"}, "$ref": {"type": "string"}}},
        defs({"$ref": "#/$defs/a"}, a={"type": "integer"}, unused={"type": 5}),
        defs({"$ref": "#/$defs/a~1b%20c"}, **{"a/b c": {"type": "integer"}}),
        {"$ref": "#/anyOf/1/items", "anyOf": [{}, {"items": {"type": "integer"}}]},
        defs({"$ref": "#here"}, a={"$anchor": "here"}),
        defs({"$ref": "http://example.com/s#/$defs/a", "$id": "http://example.com/s"}, a={}),
        {"type": "number", "maximum": 1e300, "minimum": -(10**30)},
        {"type": "string", "pattern": r"^(?=a)(?<name>[)(\]]|\(|a{}|\d{2,3}?)+$"},
        {"const": "a\0b", "properties": {"a\0b": {}}},
    ],
    ids=json.dumps,
)
def test_what_has_an_end_passes(document):
    check(schema(document))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a", "has 1 groups that do not close"),
        ("a)", "closes a group that is not open, at character 1"),
        ("[a", "has a [ that does not end, at character 0"),
        ("a\\", "has a \\ that does not end, at character 1"),
        ("*a", "repeats nothing, at character 0"),
        ("(+a)", "repeats nothing, at character 1"),
        ("a|?", "repeats nothing"),
        ("a{5,2}", "the first number above the second"),
        ("a\0b", "has a NUL at character 1"),
    ],
)
def test_a_malformed_regex_is_refused(pattern, message):
    assert message in refused(Spec("regex", pattern))


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("", "has no rule named root"),
        ('main ::= "a"', "has no rule named root"),
        ("root ::= root", "rule root has no end"),
        ('root ::= "a" root', "rule root has no end"),
        ('root ::= "a" | b\nb ::= "x" (b | b "y")+', "rule b has no end"),
        ("root ::= []", "rule root has no end"),
        ("root ::= x{1,3}\nx ::= x", "has no end"),
        ("root ::= other", "uses rule other, which is not defined"),
        ('root ::= "a"\nroot ::= "b"', "defines rule root twice"),
        ('root ::= ("a"', "1 parentheses in rule root that do not close"),
        ('root ::= "a")', "closes a parenthesis that is not open"),
        ('root ::= "a', "which cannot be read, at character 9"),
        ("root ::= [a", "which cannot be read"),
        ('"a" root ::= "b"', "where a rule should begin"),
        ('root ::= "a"\0 "b"', "has a NUL"),
        ("root ::= Token(", "has a Token( that does not close"),
        ('root ::= "a"{99999999999999999999}', "ebnf repeats 999,999,999,999 times"),
        ('root ::= Regex("(a{1000}){1000}")', "with its repeats written out"),
        ('root ::= Regex("(\\\\")', "has a \\ that does not end"),
    ],
)
def test_a_malformed_or_endless_grammar_is_refused(grammar, message):
    assert message in refused(Spec("ebnf", grammar))


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "a"',
        'root ::= "a" root | ""',
        "root ::= (root)?",
        "root ::= root* # a comment ( [\n",
        'root ::= x{0,3} "a"\nx ::= "b" [^\\]] | x "c"',
        'root ::= nothing text\nnothing ::= "\\"("\ntext ::= [a-z\\]("]+',
        'root[max_chars=10, stop="]"] ::= part\npart [capture] ::= "a" (= "b")'.replace("part [", "part["),
        'root ::= TagDispatch(("<a>", a), loop_after_dispatch=false)\na ::= "x"',
        "root ::= Token(1, 2) ExcludeToken(3) [^a]{2,-1}",
        'root ::= -a .b\n-a ::= "a"\n.b ::= "b"',
        'root ::= Regex("\\\\(a{2}")',
    ],
)
def test_a_grammar_with_an_end_passes(grammar):
    check(Spec("ebnf", grammar))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (None, "$.format must be a format"),
        ({"type": "none"}, "$.format must be a format"),
        ({"type": ["tag"]}, "$.format must be a format"),
        ({"type": "sequence"}, "$.format.elements must be a list"),
        ({"type": "or", "elements": []}, "$.format.elements must be a list of at least one"),
        ({"type": "tag", "begin": "<", "end": ">"}, "$.format.content must be a format"),
        ({"type": "dispatch", "rules": [["a"]]}, "$.format.rules must be a list of pairs"),
        ({"type": "dispatch", "rules": [["a", {"type": "regex"}]]}, "$.format.rules[0][1].pattern must be text"),
        ({"type": "regex", "pattern": "("}, "$.format.pattern has 1 groups"),
        ({"type": "grammar", "grammar": "root ::= root"}, "$.format.grammar rule root has no end"),
        ({"type": "json_schema", "json_schema": REF}, "$.format.json_schema leads back to itself"),
        ({"type": "json_schema"}, "$.format.json_schema is null"),
        ({"type": "repeat", "min": 2, "max": 1, "content": any_text}, "$.format.min is 2 and max is 1"),
        ({"type": "repeat", "min": -1, "max": 1, "content": any_text}, "$.format.min must be a whole number"),
        ({"type": "repeat", "min": 1, "content": any_text}, "$.format.max must be a whole number"),
    ],
)
def test_a_malformed_tag_is_refused(form, message):
    assert message in refused(tag(form))


def test_a_tag_with_everything_passes():
    call = {
        "type": "tag",
        "begin": "<f=a>",
        "end": ["</f>", "</g>"],
        "content": {"type": "json_schema", "json_schema": {}},
    }
    forms = [
        {"type": "triggered_tags", "triggers": ["<f="], "tags": [call], "excludes": ["no"]},
        {"type": "tags_with_separator", "separator": ",", "tags": [call]},
        {"type": "repeat", "min": 2, "max": -1, "content": {"type": "regex", "pattern": "a+"}},
        {
            "type": "dispatch",
            "rules": [["a", {"type": "optional", "content": {"type": "grammar", "grammar": 'root ::= "a"'}}]],
        },
        {"type": "token_dispatch", "rules": [[5, {"type": "plus", "content": {"type": "token", "token": 7}}]]},
        {"type": "const_string", "value": "a\0b"},
    ]
    check(tag({"type": "sequence", "elements": [{"type": "or", "elements": forms}, any_text]}))


@pytest.mark.parametrize("text", ["{}", "[]", '[""]', "[1]", '"a"', "no JSON", "[" * 100_000])
def test_malformed_choices_are_refused(text):
    refused(Spec("choices", text))


@pytest.mark.parametrize("kind", ["json_schema", "structural_tag", "choices"])
@pytest.mark.parametrize(
    "text",
    ["", "{", "nul", '{"const": NaN}', '{"const": 1e999}', '{"const": "\\ud800"}', '{"const": 1' + "0" * 5000 + "}"],
)
def test_what_is_no_json_is_refused(kind, text):
    refused(Spec(kind, text))


# Hostile specs --------------------------------------------------------------------------------------------------------


def laughs(keyword: str) -> dict:
    def twice(i: int) -> dict:
        ref = {"$ref": f"#/$defs/d{i - 1}"}
        return {"properties": {"a": ref, "b": ref}} if keyword == "properties" else {keyword: [ref, ref]}

    return defs({"$ref": "#/$defs/d99"}, d0={"type": "integer"}, **{f"d{i}": twice(i) for i in range(1, 100)})


def chain(count: int, last) -> dict:
    links = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}, "minItems": 1} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{count}": last}}


def ring(count: int) -> dict:
    links = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{(i + 1) % count}"}]} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": links}


HOSTILE = {
    **{f"{shape} {n} deep": f'{{"{key}":' * n + "{}" + "}" * n
       for n in (100, 1_000, 10_000, 100_000) for shape, key in (("lists", "items"), ("not", "not"))},
    **{f"brackets {n}": "[" * n for n in (100, 100_000, 250_000)},
    **{f"properties {n}": optional(n).text for n in (257, 1_000, 10_000)},
    **{f"enum {n}": json.dumps({"enum": list(range(n))}) for n in (8_000, 100_000)},
    "const 1 MB": json.dumps({"const": "a" * (1 << 20)}),
    "100 enums of 10 KB": json.dumps({"anyOf": [{"enum": [f"{i}" * 5_000]} for i in range(10, 110)]}),
    "name 16 KB": json.dumps({"properties": {"a" * (16 << 10): {}}}),
    "parentheses 50,000": json.dumps({"pattern": groups(50_000)}),
    "repeats": json.dumps({"pattern": "(a{1000}){1000}"}),
    "repeats in each other": json.dumps({"pattern": "(" * 90 + "a" + "{99})" * 90}),
    "digits": json.dumps({"pattern": "a{" + "9" * 1_000 + "}"}),
    "a chain with no end": json.dumps(chain(4_000, {"$ref": "#/$defs/d0"})),
    "a ring": json.dumps(ring(4_000)),
    "an integer of 4,000 digits": '{"type": "integer", "maximum": 1' + "0" * 4_000 + "}",
    "types": json.dumps({"type": ["string"] * 20_000}),
    "names in the path": json.dumps({"properties": {"a" * 250: {"properties": {"\n" * 200: {"type": 5}}}}}),
}  # fmt: skip

HOSTILE_OF_OTHER_KINDS = [
    Spec("ebnf", rules(50_000).text),
    Spec("ebnf", rules(50_000).text[: limits.MAX_EBNF_BYTES]),
    Spec("ebnf", "root ::= " + "(" * 32_000 + '"a"' + ")" * 32_000),
    Spec("ebnf", "root ::= TagDispatch" + "(" * 60_000),
    Spec("ebnf", "root ::= " + "[" * 60_000),
    Spec("ebnf", "root" + '["]' * 20_000),
    Spec("ebnf", 'root ::= "' + "\\" * 60_000),
    Spec("ebnf", "root ::= r0\n" + "\n".join(f"r{i} ::= r{(i + 1) % 1_900}" for i in range(1_900))),
    Spec("regex", groups(50_000)),
    Spec("regex", "[" * 1_000),
    Spec("regex", "(?<" * 300),
    Spec("regex", "((a+)+)+" * 100 + "("),
    Spec("choices", json.dumps(["a" * (1 << 20)])),
    Spec("choices", json.dumps(list(map(str, range(100_000))))),
    Spec(
        "structural_tag", '{"type":"structural_tag","format":' + '{"type":"star","content":' * 5_000 + "1" + "}" * 5_001
    ),
    tag({**any_text, "excludes": ["ab c" * 1_000]}),
    tag({**any_text, "excludes": [f"word {i}" for i in range(10_000)]}),
]


@pytest.mark.parametrize(
    "spec",
    [*(Spec("json_schema", text) for text in HOSTILE.values()), *HOSTILE_OF_OTHER_KINDS],
    ids=[*HOSTILE, *(f"{spec.kind} {spec.text[:30]!r}" for spec in HOSTILE_OF_OTHER_KINDS)],
)
def test_hostile_specs_are_refused_within_seconds(spec):
    began = time.process_time()
    refused(spec)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "spec",
    [
        *(schema(laughs(keyword)) for keyword in ("anyOf", "oneOf", "allOf", "properties")),
        schema(chain(4_000, {})),
        schema({"anyOf": [{"properties": {f"p{i}": {}}} for i in range(7_000)]}),
        schema({"type": "array", "minItems": 10**9, "maxItems": 10**9}),
        schema({"pattern": "((a+)+)+b"}),
        schema({"pattern": "(a|b)*a(a|b){20}"}),
        schema({"prefixItems": [{}] * 9_000, "minItems": 2**31 - 1}),
        tag({"type": "repeat", "min": 1, "max": 10**9, "content": any_text}),
        Spec("ebnf", "root ::= " + "[a-z] " * 10_000),
        Spec("ebnf", 'root ::= root root | "a"'),
    ],
    ids=range(13),
)
def test_what_is_large_and_harmless_passes_within_seconds(spec):
    began = time.process_time()
    check(spec)
    may_be_slow(spec)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("spec", "slow"),
    [
        (schema({"type": "object"}), False),
        (schema({"type": "object", "properties": {"name": {"type": "string"}}, "additionalProperties": False}), False),
        (schema({"type": "string", "maxLength": 5}), False),
        (schema({"type": "string", "maxLength": 20}), True),
        (schema({"type": "string", "minLength": 20}), True),
        (schema({"type": "integer", "maxLength": 20}), False),
        (schema({"anyOf": [{"type": "string", "maxLength": n} for n in (4, 5, 6)]}), True),
        (schema({"enum": [f"value {i}" for i in range(100)]}), False),
        (schema({"enum": [f"a value with a long name {i}" for i in range(1_000)]}), True),
        (schema({"properties": {"a" * 30: {}}}), True),
        (schema({"properties": {"a" * 30: {}}, "additionalProperties": False}), False),
        (optional(200, additionalProperties=False), True),
        (optional(60, additionalProperties=False, minProperties=1), True),
        (schema({"pattern": "^[a-f0-9]{24}$"}), False),
        (schema({"pattern": "^.{1,100}$"}), True),
        (schema({"pattern": "^[a-z]{0,300}$"}), True),
        (schema({"type": "integer", "multipleOf": 1_000}), False),
        (Spec("regex", "yes|no"), False),
        (Spec("regex", ".{1,100}"), True),
        (Spec("choices", json.dumps(["yes", "no"])), False),
        (Spec("choices", json.dumps(["a" * 60_000])), True),
        (Spec("ebnf", 'root ::= [a-z]+ "," [0-9]+'), False),
        (rules(2_000), True),
        (Spec("ebnf", "root ::= [a-z]{1,200}"), True),
        (Spec("ebnf", 'root ::= [^"]{1,5} "a"'), False),
        (Spec("ebnf", 'root ::= [^"]{1,50} "a"'), True),
        (Spec("ebnf", 'root ::= Regex("[^a]{50}")'), True),
        (tag({"type": "json_schema", "json_schema": {"type": "string", "maxLength": 20}}), True),
        (tag({"type": "regex", "pattern": ".{1,100}"}), True),
        (tag({"type": "grammar", "grammar": rules(1_900).text}), True),
        (tag({"type": "repeat", "min": 0, "max": 100, "content": any_text}), True),
        (tag({"type": "repeat", "min": 5, "max": -1, "content": any_text}), False),
        (tag({**any_text, "excludes": ["stop"]}), False),
        (tag({**any_text, "excludes": ["a" * 200]}), True),
    ],
    ids=lambda value: value if isinstance(value, bool) else f"{value.kind} {value.text[:60]}",
)
def test_what_may_be_slow(spec, slow):
    check(spec)
    assert may_be_slow(spec) is slow


# Random specs ---------------------------------------------------------------------------------------------------------

KEYWORDS = [
    "type",
    "required",
    "enum",
    "const",
    "$ref",
    "$id",
    "$anchor",
    "$defs",
    "contains",
    "items",
    "not",
    "additionalProperties",
]
KEYWORDS += [
    "properties",
    "patternProperties",
    "dependencies",
    "allOf",
    "anyOf",
    "oneOf",
    "prefixItems",
    "pattern",
    "format",
]
KEYWORDS += [
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "multipleOf",
    "minLength",
    "maxLength",
    "minItems",
    "maxProperties",
    "a",
    "~",
]
VALUES = ["string", "object", "array", "integer", "#", "#/properties/a", "#/$defs/a", "#a", "(", "a{2}", "root"]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(VALUES)
)
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=5)
)

FORMATS = ["tag", "sequence", "repeat", "regex", "grammar", "json_schema", "dispatch", "any_text", "none"]
FIELDS = ["content", "elements", "tags", "rules", "min", "max", "pattern", "begin", "end", "excludes", "json_schema"]
tags = st.recursive(
    st.none() | st.text() | st.integers(-2, 2) | documents,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries({"type": st.sampled_from(FORMATS)}, optional=dict.fromkeys(FIELDS, inner))
    ),
)

PIECES = [
    '"a"',
    "[a]",
    "[]",
    "(",
    "(=",
    ")",
    "|",
    "*",
    "+",
    "?",
    "{2}",
    "{",
    "}",
    "root",
    "b",
    "::=",
    "Token",
    "Regex",
    "#",
    "1",
]
pieces = st.lists(st.sampled_from([*PIECES, "\n"])).map(" ".join)


def answered(spec: Spec) -> None:
    try:
        check(spec)
    except UserError as error:
        assert str(error).startswith(spec.kind)
    else:
        assert isinstance(may_be_slow(spec), bool)


@settings(max_examples=400)
@given(documents)
@example({"$ref": "#/properties/a", "properties": {"a": {"items": {"$ref": "#"}}}})
def test_any_document_is_answered(document):
    answered(Spec("json_schema", json.dumps(document)))
    answered(Spec("choices", json.dumps(document)))


@given(tags)
def test_any_tag_is_answered(form):
    answered(tag(form))


@given(st.text() | st.text(st.sampled_from("()[]{}|*+?\\^$.,-a1")))
def test_any_regex_is_answered(pattern):
    answered(Spec("regex", pattern))


@given(st.text() | pieces | pieces.map(lambda body: f"root ::= {body}"))
def test_any_grammar_is_answered(grammar):
    answered(Spec("ebnf", grammar))
