"""Sixty JSON schemas with instances that are valid and instances that are not, for all tests of structured output.

Properties of an instance stand in the order of its schema, because that is the order in which they are written.
"""

from typing import Any, NamedTuple


class Example(NamedTuple):
    name: str
    schema: Any
    valid: list[Any]
    invalid: list[Any]


def an_object(required: list[str] | None = None, closed: bool = True, **properties: Any) -> dict[str, Any]:
    """All properties are required unless it is said which."""
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
    }
    return schema | {"additionalProperties": False} if closed else schema


STRING, INTEGER, NUMBER, BOOLEAN, NULL = ({"type": t} for t in ("string", "integer", "number", "boolean", "null"))
TREE = {
    "$defs": {
        "node": an_object(["value"], value=INTEGER, children={"type": "array", "items": {"$ref": "#/$defs/node"}})
    },
    "$ref": "#/$defs/node",
}
ORDER = an_object(
    ["id", "lines"],
    id={"type": "string", "format": "uuid"},
    placed={"type": "string", "format": "date-time"},
    lines={
        "type": "array",
        "minItems": 1,
        "items": an_object(sku=STRING, count={"type": "integer", "minimum": 1}, price=NUMBER),
    },
)
SHAPES = [
    an_object(kind={"const": "circle"}, radius=NUMBER),
    an_object(kind={"const": "box"}, width=NUMBER, height=NUMBER),
]
UUID = "f81d4fae-7dec-11d0-a765-00a0c91e6bf6"

EXAMPLES = [
    # ---- scalars
    Example("anything", True, [None, 1, "x", [1, {"a": [True]}], {}], []),
    Example("string", STRING, ["", "plain", 'a "quoted" word', "back\\slash", "zwölf 猫 🙂", "tab\tand\nline"], [1, None, ["x"]]),
    Example("integer", INTEGER, [0, 7, -12, 123456789], ["1", 1.5, None]),
    Example("number", NUMBER, [0, -3.25, 1e-3, 6.02e23], ["1", None, [1]]),
    Example("boolean", BOOLEAN, [True, False], ["true", 0, None]),
    Example("null", NULL, [None], [False, 0, "null"]),
    Example("nullable", {"type": ["string", "null"]}, [None, "x"], [1, []]),
    Example("scalar", {"type": ["integer", "boolean", "null"]}, [3, True, None], ["x", {}, 2.5]),
    Example("minimum", {"type": "integer", "minimum": 10}, [10, 11, 5000], [9, -10, 0]),
    Example("range", {"type": "integer", "minimum": -5, "maximum": 120}, [-5, 0, 99, 120], [-6, 121, 500]),
    Example("open range", {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10}, [1, 9], [0, 10, -1]),
    Example("probability", {"type": "number", "minimum": 0, "maximum": 1}, [0, 0.5, 1, 0.125], [1.5, -0.25, 2]),
    Example("multiple", {"type": "integer", "multipleOf": 5}, [0, 5, 35, -10], [1, 7, 12]),
    Example("cents", {"type": "number", "multipleOf": 0.01}, [0.25, 3, 0.5], [0.125, 1.001]),
    # ---- literals
    Example("enum", {"enum": ["red", "green", "blue"]}, ["red", "blue"], ["yellow", "", "re", None]),
    Example("typed enum", {"type": "string", "enum": ["low", "high"]}, ["low", "high"], ["medium", 1]),
    Example("mixed enum", {"enum": [1, "one", None, True]}, [1, "one", None, True], [2, "two", False]),
    Example("enum by type", {"type": "integer", "enum": [1, 2, "three"]}, [1, 2], ["three", 3]),
    Example("odd texts", {"enum": ["a/b", 'say "hi"', "tab\t", "é", "猫🙂", "\\"]}, ["a/b", 'say "hi"', "tab\t", "é", "猫🙂", "\\"],
            ["a", "say", "e"]),
    Example("const", {"const": "fixed"}, ["fixed"], ["fixe", "fixed!", None]),
    Example("const number", {"const": 42}, [42], [4, 420, "42"]),
    Example("const fraction", {"const": 1.1}, [1.1], [1.2, 1, 11]),
    Example("const object", {"const": {"a": 1, "b": [True, None]}}, [{"a": 1, "b": [True, None]}], [{"a": 1}, {"a": 1, "b": []}]),
    # ---- strings
    Example("pattern", {"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"}, ["AB1234"], ["AB123", "ab1234", "AB12345", ""]),
    Example("pattern in a part", {"type": "string", "pattern": "cat|dog"}, ["cat", "hotdogs", "my cat"], ["", "ca", "bird"]),
    Example("pattern at the start", {"type": "string", "pattern": "^x-"}, ["x-", "x-header"], ["y-", "ax-"]),
    Example("long pattern", {"type": "string", "pattern": "^[a-z]{1,200}$"}, ["a", "abc" * 60], ["", "A", "a" * 201]),
    Example("alternatives", {"type": "string", "pattern": "^(v[0-9]+|latest)$"}, ["v12", "latest"], ["v", "late", "latest1"]),
    Example("length", {"type": "string", "minLength": 2, "maxLength": 5}, ["ab", "abcde", "猫猫"], ["a", "abcdef", ""]),
    Example("length and pattern", {"type": "string", "pattern": "^a*$", "maxLength": 3}, ["", "aaa"], ["aaaa", "b"]),
    Example("date", {"type": "string", "format": "date"}, ["2024-02-29", "1999-12-31"], ["2024-13-01", "24-01-01", "today"]),
    Example("date-time", {"type": "string", "format": "date-time"}, ["2024-02-29T12:30:00Z"], ["2024-02-29", "12:30"]),
    Example("email", {"type": "string", "format": "email"}, ["ada@example.org"], ["ada", "ada.example.org"]),
    Example("uuid", {"type": "string", "format": "uuid"}, [UUID], [UUID[:-1], "x" + UUID[1:]]),
    Example("ipv4", {"type": "string", "format": "ipv4"}, ["192.168.0.1"], ["192.168.0", "1.2.3.456"]),
    Example("a format of one's own", {"type": "string", "format": "colour"}, ["red", ""], [1]),
    # ---- arrays
    Example("array", {"type": "array", "items": INTEGER}, [[], [1], [1, 2, 3]], [["1"], {}, [1, None]]),
    Example("bounded array", {"type": "array", "items": STRING, "minItems": 1, "maxItems": 3}, [["a"], ["a", "b", "c"]],
            [[], ["a", "b", "c", "d"], [1]]),
    Example("pair", {"type": "array", "prefixItems": [STRING, INTEGER], "items": False, "minItems": 2}, [["a", 1]],
            [["a"], [1, "a"], ["a", 1, 2]]),
    Example("tuple of an old draft", {"type": "array", "items": [BOOLEAN, NULL], "additionalItems": INTEGER, "minItems": 2},
            [[True, None], [False, None, 1, 2]], [[None, True], [True, None, "x"], [True]]),
    Example("matrix", {"type": "array", "items": {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2}},
            [[], [[1, 2], [3.5, -4]]], [[1, 2], [[1]], [[1, 2, 3]]]),
    # ---- objects
    Example("any object", {"type": "object"}, [{}, {"a": 1, "b": {"c": []}}], [[], 1, "{}"]),
    Example("person", an_object(name=STRING, age=INTEGER), [{"name": "Ada", "age": 36}], [{"name": "Ada"}, {"name": 1, "age": 2}]),
    Example("optional", an_object(["a"], a=INTEGER, b=INTEGER, c=INTEGER), [{"a": 1}, {"a": 1, "c": 3}, {"a": 1, "b": 2, "c": 3}],
            [{}, {"b": 2}, {"a": 1, "d": 4}]),
    Example("all optional", an_object([], a=STRING, b=STRING), [{}, {"a": "x"}, {"b": "y"}, {"a": "x", "b": "y"}],
            [{"c": "z"}, {"a": 1}]),
    Example("open object", an_object(["id"], closed=False, id=INTEGER, note=STRING),
            [{"id": 1}, {"id": 1, "note": "x", "more": [1]}], [{}, {"id": "1"}, {"id": 1, "note": 2}]),
    Example("map", {"type": "object", "additionalProperties": INTEGER}, [{}, {"a": 1, "b": 2}], [{"a": "1"}, {"a": 1, "b": None}]),
    Example("names of a pattern", {"type": "object", "patternProperties": {"^x_[a-z]+$": INTEGER}, "additionalProperties": False},
            [{}, {"x_a": 1, "x_bc": 2}], [{"y_a": 1}, {"x_a": "1"}, {"x_": 1}]),
    Example("number of properties", {"type": "object", "additionalProperties": BOOLEAN, "minProperties": 1, "maxProperties": 2},
            [{"a": True}, {"a": True, "b": False}], [{}, {"a": True, "b": True, "c": True}]),
    Example("required alone", {"type": "object", "required": ["id"]}, [{"id": None}, {"id": 1, "x": 2}], [{}, {"x": 2}]),
    Example("order", ORDER, [{"id": UUID, "lines": [{"sku": "a", "count": 2, "price": 9.5}]}],
            [{"id": UUID, "lines": []}, {"id": "1", "lines": [{"sku": "a", "count": 2, "price": 9.5}]}]),
    Example("if one then both", an_object([], a=INTEGER, b=INTEGER) | {"dependentRequired": {"a": ["b"]}},
            [{}, {"b": 2}, {"a": 1, "b": 2}], [{"a": 1}]),
    # ---- composition
    Example("any of", {"anyOf": [INTEGER, {"type": "array", "items": INTEGER}]}, [1, [1, 2]], ["1", ["1"], None]),
    Example("shapes", {"oneOf": SHAPES}, [{"kind": "circle", "radius": 2}, {"kind": "box", "width": 1, "height": 2.5}],
            [{"kind": "box", "radius": 2}, {"kind": "ball", "radius": 2}, {}]),
    Example("shapes by name", {"$defs": dict(zip("ab", SHAPES, strict=True)), "type": "array",
                               "items": {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}},
            [[], [{"kind": "circle", "radius": 2}, {"kind": "box", "width": 1, "height": 2}]], [[{"kind": "box"}], [1]]),
    Example("all of", {"allOf": [an_object(["a"], closed=False, a=INTEGER), an_object(["b"], closed=False, b=STRING)]},
            [{"a": 1, "b": "x"}], [{"a": 1}, {"a": 1, "b": 2}, {"b": "x"}]),
    Example("tree", TREE, [{"value": 1}, {"value": 1, "children": [{"value": 2, "children": []}, {"value": 3}]}],
            [{"value": 1, "children": [1]}, {"children": []}]),
    Example("a list of itself", {"type": "array", "items": {"$ref": "#"}}, [[], [[]], [[], [[], [[]]]]], [[1], {}, [[[1]]]]),
    Example("a tree without a name",
            an_object(["tag"], tag={"enum": ["p", "div"]}, inner={"type": "array", "items": {"$ref": "#"}}),
            [{"tag": "p"}, {"tag": "div", "inner": [{"tag": "p", "inner": []}, {"tag": "p"}]}],
            [{"tag": "x"}, {"tag": "div", "inner": [{}]}]),
    Example("linked list", {"$defs": {"list": {"anyOf": [NULL, an_object(head=INTEGER, tail={"$ref": "#/$defs/list"})]}},
                            "$ref": "#/$defs/list"},
            [None, {"head": 1, "tail": {"head": 2, "tail": None}}], [{}, {"head": 1}, {"head": 1, "tail": 2}]),
]  # fmt: skip
