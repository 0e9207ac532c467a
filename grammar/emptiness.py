"""Which schemas and rules no finite text follows from.

One of those leaves a request with no token to choose, or lets it write for ever. Schemas and EBNF alike are read as clauses: a
symbol follows once all the symbols of one of its bodies do. What follows is found from the bottom up, and each clause is looked
at once for each symbol in it, so this takes linear time (Dowling and Gallier 1984, on Horn formulae).

    python -m pytest tests/test_grammar_limits.py
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from errors import UserError
from grammar.schema import TYPES, Schema, Subschema

Clause = tuple[Hashable, Sequence[Hashable]]  # a symbol, and what it needs: nothing, if it is text by itself

NOTHING = ("nothing",)  # the symbol of what no text is; no name of a rule
_IN_PLACE = (
    "allOf",
    "anyOf",
    "else",
    "if",
    "not",
    "oneOf",
    "then",
)  # about the very value that the schema itself is about
_ORDERED = (  # the first must be below the second, or the same
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minContains", "maxContains"),
    ("minProperties", "maxProperties"),
    ("minimum", "maximum"),
)
_APART = (  # the first must be below the second
    ("exclusiveMinimum", "maximum"),
    ("minimum", "exclusiveMaximum"),
    ("exclusiveMinimum", "exclusiveMaximum"),
)
_BOUNDS = frozenset(keyword for pair in (*_ORDERED, *_APART) for keyword in pair)
_DEMANDING = frozenset(
    ("$ref", "allOf", "anyOf", "contains", "minItems", "not", "oneOf", "required")
)  # the others ask for no value
_OF_OBJECTS = ("properties", "additionalProperties", "unevaluatedProperties")
_OF_ARRAYS = ("items", "prefixItems", "unevaluatedItems")
_DECIDE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")  # beside one of these a missing type is not made up for


def productive(clauses: Sequence[Clause]) -> set[Hashable]:
    """The symbols from which a finite text follows."""
    waiting: defaultdict[Hashable, list[int]] = defaultdict(list)  # symbol -> the clauses that need it
    missing = []
    for i, (_, body) in enumerate(clauses):
        needed = set(body)
        missing.append(len(needed))
        for symbol in needed:
            waiting[symbol].append(i)
    found: set[Hashable] = set()
    ready = [head for (head, _), count in zip(clauses, missing, strict=True) if count == 0]
    while ready:
        symbol = ready.pop()
        if symbol in found:
            continue
        found.add(symbol)
        for i in waiting[symbol]:
            missing[i] -= 1
            if missing[i] == 0:
                ready.append(clauses[i][0])
    return found


def refuse_empty(subschemas: Sequence[Subschema]) -> None:
    """`subschemas`: as `schema.read` gives them. UserError for a schema that no value fits, as far as that is cheap to see, and
    for one that has no end, wherever it stands: a text that has come so far could not be ended.

    `false` in a place that can be left out is no fault.
    """
    for subschema in subschemas:
        _refuse_contradiction(subschema)
    _refuse_loop(subschemas)
    clauses = [clause for subschema in subschemas for clause in _clauses(subschema)]
    with_an_end = productive([*clauses, (NOTHING, ())])
    for subschema in subschemas:
        if id(subschema.keywords) not in with_an_end:
            raise UserError(f"{subschema.path} has no end: every value that fits it holds another one that fits it")
    if subschemas and id(subschemas[0].keywords) not in productive(clauses):
        raise UserError(f"{subschemas[0].path} fits no value: something that it requires is false")


def _refuse_contradiction(subschema: Subschema) -> None:
    keywords, path = subschema.keywords, subschema.path
    if _BOUNDS.isdisjoint(keywords):
        return
    for low, high in (*_ORDERED, *_APART):
        if low not in keywords or high not in keywords:
            continue
        least, most = keywords[low], keywords[high]
        if isinstance(least, bool) or isinstance(most, bool):  # draft 4's exclusiveMinimum
            continue
        if least > most or (least == most and (low, high) in _APART):
            raise UserError(f"{path / low} is {least} and {high} is {most}: nothing is between")
    required, most = len(set(keywords.get("required", ()))), keywords.get("maxProperties")
    if most is not None and required > most:
        raise UserError(f"{path / 'maxProperties'} is {most}, and {required} properties are required")


def _refuse_loop(subschemas: Sequence[Subschema]) -> None:
    """Of a schema that says of a value only that it fits the schema: `{"$ref": "#"}`, and all the ways round."""
    edges = {}
    for subschema in subschemas:
        in_place = [child for keyword, child in subschema.children if keyword in _IN_PLACE]
        edges[id(subschema.keywords)] = [
            id(schema) for schema in (*in_place, subschema.target) if isinstance(schema, dict)
        ]
    node = _on_a_cycle(edges)
    if node is not None:
        path = next(subschema.path for subschema in subschemas if id(subschema.keywords) == node)
        raise UserError(f"{path} leads back to itself by $ref, anyOf, oneOf and allOf alone")


def _on_a_cycle(edges: Mapping[Hashable, Iterable[Hashable]]) -> Hashable | None:
    """A node of a directed graph that leads back to itself; None if there is none."""
    entered: set[Hashable] = set()
    for start in edges:
        on_path: dict[Hashable, None] = {}
        stack = [iter((start,))]
        while stack:
            node = next(stack[-1], None)
            if node is None:
                stack.pop()
                if stack:
                    on_path.popitem()
            elif node in on_path:
                return node
            elif node not in entered:
                entered.add(node)
                on_path[node] = None
                stack.append(iter(edges[node]))
    return None


def _clauses(subschema: Subschema) -> Iterator[Clause]:
    """All that a finite value must fulfil. What is not looked at here counts as fulfilled."""
    keywords, me = subschema.keywords, id(subschema.keywords)
    if _DEMANDING.isdisjoint(keywords):
        yield me, ()
        return
    body = _symbols(keywords.get("allOf", ()))
    if "$ref" in keywords:
        body += _symbols([subschema.target])
    if "not" in keywords and keywords["not"] in (True, {}):
        body.append(NOTHING)
    choices = {keyword: [_symbols([option]) for option in keywords.get(keyword, ())] for keyword in ("anyOf", "oneOf")}
    choices["type"] = [_needs(keywords, name) for name in _types(keywords)]
    for keyword, alternatives in choices.items():
        if all(alternatives) and alternatives:  # else one of them needs nothing
            body.append((me, keyword))
            yield from (((me, keyword), needed) for needed in alternatives)
    yield me, body


def _symbols(schemas: Iterable[Schema]) -> list[Hashable]:
    return [NOTHING if schema is False else id(schema) for schema in schemas if schema is not True]


def _types(keywords: dict[str, Any]) -> Sequence[str]:
    """What it allows. One that does not say and has properties is of objects: so xgrammar reads it, and so it is meant."""
    if "type" in keywords:
        return [keywords["type"]] if isinstance(keywords["type"], str) else keywords["type"]
    if not keywords.keys() & set(_DECIDE):
        if keywords.keys() & set(_OF_OBJECTS):
            return ["object"]
        if keywords.keys() & set(_OF_ARRAYS):
            return ["array"]
    return TYPES


def _needs(keywords: dict[str, Any], name: str) -> list[Hashable]:
    """What a value of one type must hold."""
    match name:
        case "object":
            return _symbols(_required(keywords))
        case "array":
            return _symbols(_first_items(keywords))
        case _:
            return []


def _required(keywords: dict[str, Any]) -> Iterator[Schema]:
    properties = keywords.get("properties", {})
    for name in keywords.get("required", ()):
        if name in properties:
            yield properties[name]
        elif "patternProperties" not in keywords:
            yield keywords.get("additionalProperties", True)


def _first_items(keywords: dict[str, Any]) -> Iterator[Schema]:
    items = keywords.get("items", True)
    if isinstance(items, list):
        first, rest = items, keywords.get("additionalItems", True)
    else:
        first, rest = keywords.get("prefixItems", []), items
    least = keywords.get("minItems", 0)
    yield from first[:least]
    if least > len(first):
        yield rest
    if "contains" in keywords and keywords.get("minContains", 1) > 0:
        yield keywords["contains"]
