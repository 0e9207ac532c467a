"""A JSON schema in one form: that of draft 2020-12, without what constrains nothing, its references all to "#/$defs/...".

Schemas are written to several drafts, and with more words than they need. Backends know different ones of them, and what they do
not know they skip or refuse. Each step here says the same as before, to the letter of the standard, in words that more of
them know. What has no such form stays as it is: `support.py` judges it.

    python -m pytest tests/test_grammar_support.py
"""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from grammar.exclusion import Exclusion, possible_types
from grammar.references import References
from grammar.spec import Spec
from grammar.subschemas import TYPES, Node, check_shapes, follow, schemas_of_tag, subschemas, type_names, types_of

ANNOTATIONS = ("$comment", "$vocabulary", "contentEncoding", "contentMediaType", "contentSchema", "default", "deprecated",
               "description", "example", "examples", "readOnly", "title", "writeOnly")  # fmt: skip
FORMATS = ("date", "date-time", "duration", "email", "hostname", "idn-email", "idn-hostname", "ipv4", "ipv6", "iri",
           "iri-reference", "json-pointer", "regex", "relative-json-pointer", "time", "uri", "uri-reference", "uri-template",
           "uuid")  # fmt: skip
NO_CONSTRAINT = (("maxContains", None), ("minContains", None), ("minItems", 0), ("minLength", 0), ("minProperties", 0),
                 ("patternProperties", {}), ("required", []), ("uniqueItems", False), ("unevaluatedItems", True),
                 ("unevaluatedProperties", True))  # fmt: skip
APPLICATORS = {"$dynamicRef", "$ref", "allOf", "anyOf", "contains", "dependencies", "dependentSchemas", "if", "not",
               "oneOf"}  # fmt: skip
MOST_EXCLUSIVE = 64  # alternatives, each of which is held against each other


def normalized(spec: Spec) -> Spec:
    """The same, with its schema (or those in a structural tag) in the one form. Other kinds come back as they are."""
    if spec.kind == "json_schema":
        return replace(spec, text=_normalized_text(spec.text))
    if spec.kind == "structural_tag":
        return replace(spec, text=_normalized_tag(spec.text))
    return spec


@lru_cache(maxsize=64)  # whoever chooses a backend asks, then the backend
def _normalized_text(text: str) -> str:
    return json.dumps(normalize(json.loads(text)), ensure_ascii=False)


@lru_cache(maxsize=64)
def _normalized_tag(text: str) -> str:
    tag = json.loads(text)
    for _, part in schemas_of_tag(tag):
        part["json_schema"] = normalize(part["json_schema"])
        for _, node in subschemas(part["json_schema"]):
            _say_what_is_open(node)
    return json.dumps(tag, ensure_ascii=False)


def _say_what_is_open(node: Node) -> None:
    """xgrammar closes the objects and arrays of a structural tag that do not say otherwise; the standard leaves them open.

    An object that lists properties is left closed: what it then has is valid, and to open it costs xgrammar 0.15 s a property.
    """
    types = types_of(node) or ()
    if "object" in types and "type" in node and not node.keys() & {"properties", "unevaluatedProperties"}:
        node.setdefault("additionalProperties", True)
    if "array" in types and node.keys() & {"type", "prefixItems"} and "unevaluatedItems" not in node:
        node.setdefault("items", True)


def normalize(schema: Any) -> Any:
    """A schema in the one form. The argument may be changed. UserError if it is malformed."""
    if not isinstance(schema, dict):
        return schema
    for path, node in subschemas(schema):
        check_shapes(node, path)
    old = re.search(r"draft-0[3467]", str(schema.get("$schema"))) is not None
    schema.pop("x-guidance", None)  # llguidance would take orders from it
    if old:
        for _, node in subschemas(schema):
            _drop_beside_reference(node)
    References(schema, "id" if "draft-04" in str(schema.get("$schema")) else "$id").resolve()
    for _, node in subschemas(schema):  # what a step writes is visited in turn
        _property_names(node, schema)
        for step in STEPS:
            step(node)
    exclusion = Exclusion(schema)
    for _, node in subschemas(schema):
        _exclusive_to_any(node, exclusion)
    return schema


# ---- steps: each rewrites one schema in place


def _drop_beside_reference(node: Node) -> None:
    """Up to draft 7 a reference stands alone, and what is beside it is skipped."""
    if isinstance(node.get("$ref"), str):
        for key in [key for key in node if key not in ("$ref", "$defs", "definitions", "$schema")]:
            del node[key]


def _drop_what_says_nothing(node: Node) -> None:
    for key in ANNOTATIONS:
        node.pop(key, None)
    for key, value in NO_CONSTRAINT:
        if key in node and (node[key] == value or (value is None and "contains" not in node)):
            del node[key]
    if "if" not in node or not {"then", "else", "unevaluatedItems", "unevaluatedProperties"} & node.keys():
        for key in ("if", "then", "else"):
            node.pop(key, None)
    if isinstance(node.get("format"), str) and node["format"] not in FORMATS:
        del node["format"]  # the standard calls it an annotation


def _number_bounds(node: Node) -> None:
    """Draft 4: {"minimum": 3, "exclusiveMinimum": true}."""
    for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if node.get(exclusive) is True and inclusive in node:
            node[exclusive] = node.pop(inclusive)
        elif isinstance(node.get(exclusive), bool):
            del node[exclusive]


def _tuples(node: Node) -> None:
    """Up to 2019-09: {"items": [a, b], "additionalItems": c}."""
    rest = node.pop("additionalItems", None)
    if isinstance(node.get("items"), list):
        node["prefixItems"] = node.pop("items")
        if rest is not None:
            node["items"] = rest
    if isinstance(node.get("prefixItems"), list) and _is_count(node.get("maxItems")):
        node["prefixItems"] = node["prefixItems"][: node["maxItems"]]
    if "prefixItems" in node:
        node["prefixItems"] = [{} if item is True else item for item in node["prefixItems"]]
        if not node["prefixItems"]:
            del node["prefixItems"]


def _unevaluated(node: Node) -> None:
    """Where no other schema applies in place, what is unevaluated is what is additional."""
    if node.keys() & {
        "$ref",
        "$dynamicRef",
        "allOf",
        "anyOf",
        "contains",
        "dependencies",
        "dependentSchemas",
        "if",
        "not",
        "oneOf",
    }:
        return
    for unevaluated, additional in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if unevaluated in node:
            rest = node.pop(unevaluated)
            node.setdefault(additional, rest)


def _dependencies(node: Node) -> None:
    """If a property is there, then ...: it is not there, or ..."""
    both = {}
    for key in ("dependencies", "dependentRequired", "dependentSchemas"):
        if isinstance(node.get(key), dict):
            both |= {(key, name): value for name, value in node.pop(key).items()}
    for (_, name), value in both.items():
        then = (
            {"required": [value]}
            if isinstance(value, str)
            else {"required": value}
            if isinstance(value, list)
            else value
        )
        _also(node, {"anyOf": [{"properties": {name: False}}, then]})


def _negations(node: Node) -> None:
    """What is not there, or of no such type."""
    not_ = node.get("not")
    if isinstance(not_, dict) and not_.keys() == {"not"}:
        _also(node, node.pop("not")["not"])
    if not isinstance(not_, (dict, bool)) or (
        isinstance(not_, dict) and not_.keys() - {"type", "required", *ANNOTATIONS}
    ):
        return
    if isinstance(not_, bool) or not not_.keys() & {"type", "required"}:
        del node["not"]
        if not_ is not False:
            node["enum"] = []
        return
    types, required = types_of(not_), not_.get("required", [])
    if types is None or not isinstance(required, list) or ("integer" in types and "number" not in types):
        return  # a number that is no integer has no form
    del node["not"]
    options: list[Node] = [{"type": kind} for kind in TYPES if kind not in types and kind != "integer"]
    if "object" in types:
        options += [{"type": "object", "properties": {name: False}} for name in required]
    _also(node, {"anyOf": options} if options else {"enum": []})


def _literals(node: Node) -> None:
    """Of an enumeration what is of the type; the type then says no more."""
    types = types_of(node)
    if types is None or "type" not in node:
        return
    if isinstance(node.get("enum"), list):
        node["enum"] = [value for value in node["enum"] if type_names(value) & types]
        del node["type"]
    elif "const" in node:
        if not type_names(node["const"]) & types:
            node["enum"] = []
            del node["const"]
        del node["type"]


def _branches(node: Node) -> None:
    """Of alternatives those that may hold; one alone holds."""
    if isinstance(node.get("anyOf"), list):
        options = [option for option in node["anyOf"] if option is not False]
        node["anyOf"] = options
        if any(option is True or option == {} for option in options):
            del node["anyOf"]
    if isinstance(node.get("allOf"), list):
        node["allOf"] = [part for part in node["allOf"] if part is not True and part != {}]
    for key in ("allOf", "anyOf", "oneOf"):
        only = node.get(key)
        if isinstance(only, list) and len(only) == 1 and isinstance(only[0], dict) and len(node) == 1:
            del node[key]
            node |= only[0]
        elif only == [] and key == "allOf":
            del node[key]


def _required(node: Node) -> None:
    """Name what is required among the properties."""
    names = node.get("required")
    properties = node.get("properties", {})
    if (
        not isinstance(names, list)
        or not isinstance(properties, dict)
        or node.keys() & {"patternProperties", "propertyNames"}
    ):
        return
    missing = [name for name in names if isinstance(name, str) and name not in properties]
    if missing and "unevaluatedProperties" not in node:
        rest = node.get("additionalProperties", True)
        if isinstance(rest, bool) or not any(
            isinstance(value, (dict, list)) for value in rest.values()
        ):  # a copy is cheap
            node["properties"] = properties | {name: copy.copy(rest) for name in missing}


def _property_names(node: Node, root: Node) -> None:
    """Names of a pattern: a pattern for properties, and no others."""
    names = follow(node.get("propertyNames"), root)
    if names is True or names == {}:
        del node["propertyNames"]
    elif (
        isinstance(names, dict)
        and "pattern" in names
        and not names.keys() - {"pattern", "type", *ANNOTATIONS}
        and "string" in (types_of(names) or ())
        and not node.keys() & {"properties", "patternProperties", "required", "unevaluatedProperties"}
    ):
        del node["propertyNames"]
        node["patternProperties"] = {names["pattern"]: node.get("additionalProperties", True)}
        node["additionalProperties"] = False


def _exactly_one_property(node: Node) -> None:
    """One of some properties is required, and the others are not there."""
    options = node.get("oneOf")
    if not isinstance(options, list) or node.get("type") != "object" or not 2 <= len(options) <= MOST_EXCLUSIVE:
        return
    if not all(isinstance(option, dict) and option.keys() - {*ANNOTATIONS} == {"required"} for option in options):
        return
    names = [name for option in options for name in option["required"]]
    if len(set(names)) == len(names) == len(options) and all(option["required"] for option in options):
        del node["oneOf"]
        others = [{other: False for other in names if other != name} for name in names]
        _also(node, {"anyOf": [{"required": [name], "properties": no} for name, no in zip(names, others, strict=True)]})


def _exclusive_to_any(node: Node, exclusion: Exclusion) -> None:
    """Of alternatives no two of which can hold, exactly one holds if any does."""
    options = node.get("oneOf", [])
    if not 1 <= len(options) <= MOST_EXCLUSIVE:
        return
    types = frozenset(possible_types(node) if node.get("type") else TYPES)
    if all(exclusion.shown(a, b, types) for i, a in enumerate(options) for b in options[:i]):
        _also(node, {"anyOf": node.pop("oneOf")}) if "anyOf" in node else node.update(anyOf=node.pop("oneOf"))


STEPS: tuple[Callable[[Node], None], ...] = (
    _drop_what_says_nothing,
    _number_bounds,
    _tuples,
    _unevaluated,
    _dependencies,
    _negations,
    _literals,
    _branches,
    _exactly_one_property,
    _required,
)


def _also(node: Node, other: Node | bool) -> None:
    """Let a schema say what another one says as well."""
    node["allOf"] = [*node.get("allOf", []), other]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
