"""Which backend means what a request asks for. Pure Python: no native code sees anything yet.

A schema means what the JSON Schema standard says. xgrammar compiles nearly every schema, and skips what it does not know: a keyword
beside `anyOf`, `not`, `uniqueItems`, a lookahead. Then the output is not what was asked for, and nobody is told. llguidance
refuses most of what it does not know. So each keyword that a schema uses is looked at here, for four kinds of faults:

ignores  takes what the schema forbids: never used
refuses  has an error: never used
narrows  refuses some of what the schema allows (a number with an exponent, an untyped object): used if the other is no better
slow     works, at a price: used if asked for. xgrammar, and a vocabulary of 152k: 0.15 s to compile for each property of an object
         that may have others (5 ms if it may not), 10 s for a string with a length, and milliseconds for a mask in it

    python -m pytest tests/test_grammar_support.py
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from errors import UserError
from grammar import dialects
from grammar.normal import normalized
from grammar.spec import Spec
from grammar.subschemas import Node, schemas_of_tag, subschemas, target

Effect = Literal["ignores", "refuses", "narrows", "slow"]
Found = tuple[Effect, str]  # what a backend does with which keyword

BACKENDS = ("xgrammar", "llguidance")  # the first one is preferred

# Keywords that constrain, by the type of value that they speak of.
OF_TYPE = {
    "object": {"additionalProperties", "dependencies", "dependentRequired", "dependentSchemas", "maxProperties", "minProperties",
               "patternProperties", "properties", "propertyNames", "required", "unevaluatedProperties"},
    "array": {"contains", "items", "maxContains", "maxItems", "minContains", "minItems", "prefixItems", "unevaluatedItems",
              "uniqueItems"},
    "string": {"format", "maxLength", "minLength", "pattern"},
    "number": {"exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"},
}  # fmt: skip
IN_PLACE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")  # xgrammar heeds the first of these alone
UNKNOWN_TO_BOTH = {"$dynamicRef", "$recursiveRef", "if", "not", "then", "else"}
CONSTRAINTS = {"type", *IN_PLACE, *UNKNOWN_TO_BOTH}.union(*OF_TYPE.values())

LLGUIDANCE_LACKS = UNKNOWN_TO_BOTH | {"contains", "dependencies", "dependentRequired", "dependentSchemas", "maxContains",
                    "minContains", "propertyNames", "unevaluatedItems", "unevaluatedProperties", "uniqueItems"}  # fmt: skip
LLGUIDANCE_FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
# Its dates have a 30th of February, its ipv4 addresses leading zeros.
XGRAMMAR_FORMATS = ("duration", "email", "hostname", "ipv6", "time", "uri", "uri-reference", "uri-template", "uuid")
MAX_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class Fault:
    backend: str
    effect: Effect
    keyword: str
    path: str

    def __str__(self) -> str:
        return f"{self.backend} {self.effect} {self.keyword!r} at {self.path}"


def choose(spec: Spec, wanted: str = "auto") -> str:
    """The name of the backend for a spec. wanted: "auto", "xgrammar" or "llguidance".

    UserError if it would ignore or refuse something: the message has the keyword, its path, and what which backend does.
    """
    if wanted not in ("auto", *BACKENDS):
        raise UserError(f"the grammar backend is {wanted!r}; there are auto, {' and '.join(BACKENDS)}")
    candidates = BACKENDS if wanted == "auto" else (wanted,)
    found = {backend: list(faults(spec, backend)) for backend in candidates}
    able = [backend for backend in candidates if not any(_is_fatal(fault) for fault in found[backend])]
    if not able:
        reasons = (str(next(filter(_is_fatal, found[backend]))) for backend in candidates)
        raise UserError(f"{spec.kind} cannot be met: {'; '.join(reasons)}")
    return min(able, key=lambda backend: len({fault.effect for fault in found[backend]}))


def _is_fatal(fault: Fault) -> bool:
    return fault.effect in ("ignores", "refuses")


def faults(spec: Spec, backend: str) -> Iterator[Fault]:
    """What a backend does otherwise than a spec says."""
    if spec.kind == "regex":
        found = dialects.FAULTS[backend](spec.text, search=False)
        yield from (Fault(backend, effect, what, "#") for effect, what in found)
    elif spec.kind in ("ebnf", "structural_tag") and backend == "llguidance":
        yield Fault(backend, "refuses", spec.kind, "#")
    elif spec.kind == "structural_tag":
        for path, part in schemas_of_tag(json.loads(normalized(spec).text)):
            yield from _schema_faults(part["json_schema"], backend, f"{path}/json_schema")
    elif spec.kind == "json_schema":
        yield from _schema_faults(json.loads(normalized(spec).text), backend, "#")


def _schema_faults(root: Any, backend: str, path: str) -> Iterator[Fault]:
    """Of all schemas that the root has or refers to; a definition that nothing refers to says nothing."""
    judge = {"xgrammar": _xgrammar, "llguidance": _llguidance}[backend]
    todo, seen = [(path, root)], set()
    for start, schema in todo:
        for place, node in subschemas(schema, start, definitions=False):
            yield from (Fault(backend, effect, keyword, place) for effect, keyword in judge(node, root))
            reference = node.get("$ref")
            if reference is not None and reference not in seen:
                seen.add(reference)
                todo.append((reference, target(reference, root)))


# ---- xgrammar


def _xgrammar(node: Node, root: Any) -> Iterator[Found]:
    """What xgrammar does otherwise than one schema says, the schemas inside of it aside."""
    constraints = node.keys() & CONSTRAINTS
    yield from (("ignores", keyword) for keyword in sorted(constraints & UNKNOWN_TO_BOTH))
    head = next((keyword for keyword in IN_PLACE if keyword in node), None)
    if head is not None:
        yield from (("ignores", keyword) for keyword in sorted(constraints - {head} - UNKNOWN_TO_BOTH))
        yield from _xgrammar_in_place(node, head, root)
        return
    types = node.get("type", [])
    if "type" not in node and constraints:
        types = [kind for kind, taken in XGRAMMAR_TAKES_FOR.items() if node.keys() & taken][:1]
        if types:
            yield "narrows", "type"
        else:
            yield from (("ignores", keyword) for keyword in sorted(constraints - UNKNOWN_TO_BOTH))
    for kind in [types] if isinstance(types, str) else types:
        if kind in XGRAMMAR_BY_TYPE:
            yield from XGRAMMAR_BY_TYPE[kind](node)


def _xgrammar_in_place(node: Node, head: str, root: Any) -> Iterator[Found]:
    value = node[head]
    if head == "oneOf" or (head == "allOf" and len(value) > 1) or (head == "$ref" and target(value, root) is None):
        yield "ignores", head
    elif head in ("const", "enum"):
        values = [value] if head == "const" else value
        if not values:
            yield "refuses", head
        elif any(isinstance(literal, (float, list, dict)) for literal in values):
            yield "narrows", head
    elif isinstance(value, list) and False in value:
        yield "refuses", head


def _xgrammar_number(node: Node) -> Iterator[Found]:
    if "multipleOf" in node:
        yield "ignores", "multipleOf"
    for keyword in node.keys() & OF_TYPE["number"] - {"multipleOf"}:
        yield "narrows", keyword


def _xgrammar_integer(node: Node) -> Iterator[Found]:
    bounds = node.keys() & (OF_TYPE["number"] - {"multipleOf"})
    multiple = node.get("multipleOf", 1)
    if (bounds and multiple != 1) or not isinstance(multiple, int) or multiple > 1024:
        yield "ignores", "multipleOf"
    elif multiple > 100:
        yield "slow", "multipleOf"
    for keyword in sorted(bounds):
        if not isinstance(node[keyword], int) or abs(node[keyword]) > MAX_INTEGER:
            yield "refuses", keyword


def _xgrammar_string(node: Node) -> Iterator[Found]:
    format, text = node.get("format"), node.get("pattern")
    lengths = sorted(node.keys() & {"minLength", "maxLength"})
    if format is not None:
        yield ("narrows" if format in XGRAMMAR_FORMATS else "ignores"), "format"
        if text is not None:
            yield "ignores", "pattern"
    elif text is not None:
        yield from ((effect, "pattern") for effect, _ in dialects.xgrammar(text, search=True))
    for keyword in lengths:
        yield ("slow" if format is None and text is None else "ignores"), keyword


def _xgrammar_array(node: Node) -> Iterator[Found]:
    for keyword in sorted(node.keys() & {"contains", "maxContains", "minContains", "unevaluatedItems", "uniqueItems"}):
        yield "ignores", keyword
    if any(isinstance(item, bool) for item in node.get("prefixItems", ())):
        yield "refuses", "prefixItems"


def _xgrammar_object(node: Node) -> Iterator[Found]:
    unknown = {"dependencies", "dependentRequired", "dependentSchemas", "propertyNames", "unevaluatedProperties"}
    yield from (("ignores", keyword) for keyword in sorted(node.keys() & unknown))
    patterns, properties = node.get("patternProperties", {}), node.get("properties", {})
    if patterns:
        if len(patterns) > 1 or properties or "required" in node or node.get("additionalProperties") is not False:
            yield "ignores", "patternProperties"
        for text in patterns:
            yield from ((effect, "patternProperties") for effect, _ in dialects.xgrammar(text, search=True))
    elif set(node.get("required", ())) - properties.keys():
        yield "ignores", "required"
    if properties and node.get("additionalProperties") is not False:
        yield "slow", "additionalProperties"
    if any(schema is False for schema in properties.values()):
        yield "refuses", "properties"


XGRAMMAR_TAKES_FOR = {
    "object": {"additionalProperties", "properties", "unevaluatedProperties"},
    "array": {"items", "prefixItems", "unevaluatedItems"},
}
XGRAMMAR_BY_TYPE = {
    "array": _xgrammar_array,
    "integer": _xgrammar_integer,
    "number": _xgrammar_number,
    "object": _xgrammar_object,
    "string": _xgrammar_string,
}


# ---- llguidance


def _llguidance(node: Node, root: Any) -> Iterator[Found]:
    """The same of llguidance. What it finds out by itself, and refuses, need not be known here."""
    yield from (("refuses", keyword) for keyword in sorted(node.keys() & LLGUIDANCE_LACKS))
    if "$ref" in node and target(node["$ref"], root) is None:
        yield "refuses", "$ref"
    if node.get("format", LLGUIDANCE_FORMATS[0]) not in LLGUIDANCE_FORMATS:
        yield "refuses", "format"
    if "pattern" in node:
        yield from ((effect, "pattern") for effect, _ in dialects.llguidance(node["pattern"], search=True))
    for text in node.get("patternProperties", ()):
        yield from ((effect, "patternProperties") for effect, _ in dialects.llguidance(text, search=True))
    required = node.get("required", [])
    if node.keys() & {"minProperties", "maxProperties"} and not node.get("properties", {}).keys() <= set(required):
        yield "refuses", "minProperties" if "minProperties" in node else "maxProperties"
