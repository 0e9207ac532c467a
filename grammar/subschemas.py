"""Where a JSON schema has schemas, what its references mean, and what its keywords must look like.

python -m pytest tests/test_grammar_support.py
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from errors import UserError

Node = dict[str, Any]  # a schema that is no boolean

TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")

# Where a schema has schemas.
ONE = ("additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
       "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
MAPS = ("$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties")

SHAPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(ONE, (dict, bool)),
    **dict.fromkeys(LISTS, (list,)),
    **dict.fromkeys(MAPS, (dict,)),
    **dict.fromkeys(("enum", "required"), (list,)),
    **dict.fromkeys(("$ref", "format", "pattern"), (str,)),
    **dict.fromkeys(("maximum", "minimum", "multipleOf"), (int, float)),
    **dict.fromkeys(("exclusiveMaximum", "exclusiveMinimum"), (int, float, bool)),
    "items": (dict, bool, list),
    "type": (str, list),
}
COUNTS = ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties")


def subschemas(schema: Any, path: str = "#", definitions: bool = True) -> Iterator[tuple[str, Node]]:
    """Every schema in a schema that is no boolean, itself first, with its path. `definitions`: those of $defs as well."""
    stack = [(path, schema)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict):
            yield path, node
            inner = [(key, child) for key, child in children(node) if definitions or not is_definition(key)]
            stack += [(f"{path}/{key}", child) for key, child in reversed(inner)]


def children(node: Node) -> Iterator[tuple[str, Any]]:
    """The schemas in a schema, booleans too, each with its path from there."""
    for key, value in node.items():
        if key in ONE and isinstance(value, (dict, bool)):
            yield key, value
        elif key in LISTS and isinstance(value, list):
            yield from ((f"{key}/{i}", child) for i, child in enumerate(value))
        elif key in MAPS and isinstance(value, dict):
            yield from ((f"{key}/{name}", child) for name, child in value.items() if isinstance(child, (dict, bool)))


def is_definition(key: str) -> bool:
    return key.startswith(("$defs/", "definitions/"))


def schemas_of_tag(tag: Any) -> Iterator[tuple[str, Node]]:
    """The parts of a structural tag that have a "json_schema", each with its path."""
    stack = [("#", tag)]
    while stack:
        path, part = stack.pop()
        if isinstance(part, dict):
            if "json_schema" in part:
                yield path, part
            stack += [(f"{path}/{key}", value) for key, value in part.items() if key != "json_schema"]
        elif isinstance(part, list):
            stack += [(f"{path}/{i}", value) for i, value in enumerate(part)]


def target(reference: Any, root: Any) -> Any:
    """What a reference of the one form means; None if it is none of those."""
    if reference == "#":
        return root
    match = re.fullmatch(r"#/(\$defs|definitions)/([^/~%]+)", reference) if isinstance(reference, str) else None
    definitions = root.get(match[1]) if match else None
    return definitions.get(match[2]) if isinstance(definitions, dict) else None


def follow(schema: Any, root: Any) -> Any:
    """What a schema that is only a reference refers to."""
    for _ in range(8):
        if not isinstance(schema, dict) or schema.keys() != {"$ref"}:
            break
        schema = target(schema["$ref"], root)
    return schema


def types_of(node: Node) -> set[str] | None:
    """The types that a schema allows by `type`; all if it has none, and None if that is malformed."""
    types = node.get("type", list(TYPES))
    types = [types] if isinstance(types, str) else types
    return set(types) if isinstance(types, list) and all(kind in TYPES for kind in types) else None


def type_names(value: Any) -> set[str]:
    """The types of a value: of 3 and of 3.0 "integer" and "number"."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"number", "integer"} if value == int(value) else {"number"}
    names = {type(None): "null", bool: "boolean", str: "string", list: "array", dict: "object"}
    return {names[type(value)]}


def check_shapes(node: Node, path: str) -> None:
    for key, value in node.items():
        kinds = (int, float) if key in COUNTS else SHAPES.get(key)
        wrong_bool = isinstance(value, bool) and kinds is not None and bool not in kinds
        if kinds is not None and (wrong_bool or not isinstance(value, kinds)):
            raise UserError(f"json_schema: {key!r} at {path} is {json.dumps(value)[:40]}")
        if key in COUNTS:
            if value < 0 or value != int(value):
                raise UserError(f"json_schema: {key!r} at {path} is {value}; it must be a whole number, 0 or more")
            node[key] = int(value)
        elif key == "required" and not all(isinstance(name, str) for name in value):
            raise UserError(f"json_schema: {key!r} at {path} must be a list of names")
        elif key == "type" and types_of(node) is None:
            raise UserError(f"json_schema: {key!r} at {path} is {json.dumps(value)[:40]}; there are {', '.join(TYPES)}")
        inner = value if key in LISTS and isinstance(value, list) else value.values() if key in MAPS else ()
        kinds = (dict, bool, list) if key == "dependencies" else (dict, bool)
        if not all(isinstance(child, kinds) for child in inner):
            raise UserError(f"json_schema: {key!r} at {path} has something that is no schema")
