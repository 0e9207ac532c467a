"""Of which JSON schemas it can be shown that no value is of both: then exactly one of them holds if any does.

python -m pytest tests/test_grammar_support.py
"""

import json
from typing import Any

from grammar.subschemas import TYPES, Node, follow, type_names, types_of


class Exclusion:
    """Shows of two schemas that no value is of both: by their types, their literals, or a property that one requires.

    Many pairs of nested alternatives would take forever, so there is a number of looks after which nothing is shown any more.
    """

    def __init__(self, root: Any, looks: int = 50_000):
        self._root, self._looks = root, looks

    def shown(self, one: Any, other: Any, types: frozenset[str] = frozenset(TYPES), depth: int = 4) -> bool:
        """`types`: of which values are at all."""
        self._looks -= 1
        one, other = follow(one, self._root), follow(other, self._root)
        if one is False or other is False:
            return True
        if not isinstance(one, dict) or not isinstance(other, dict) or self._looks < 0:
            return False
        if depth and (self._of_a_part(one, other, types, depth - 1) or self._of_a_part(other, one, types, depth - 1)):
            return True
        shared = possible_types(one) & possible_types(other) & types
        literals = _literal_texts(one), _literal_texts(other)
        if not shared or (None not in literals and not literals[0] & literals[1]):
            return True
        return shared == {"object"} and depth > 0 and self._of_a_property(one, other, depth - 1)

    def _of_a_part(self, node: Node, other: Node, types: frozenset[str], depth: int) -> bool:
        """Of each alternative, or of one of the parts that must all hold."""
        for key, enough in (("anyOf", all), ("oneOf", all), ("allOf", any)):
            if key in node and enough(self.shown(part, other, types, depth) for part in node[key]):
                return True
        return False

    def _of_a_property(self, one: Node, other: Node, depth: int) -> bool:
        required = {name for node in (one, other) for name in node.get("required", ())}
        return any(self.shown(_property(one, name), _property(other, name), depth=depth) for name in sorted(required))


def possible_types(node: Node) -> set[str]:
    """With "number" for both numbers and integers."""
    literals = [node["const"]] if "const" in node else node.get("enum")
    types = types_of(node) if literals is None else set().union(*map(type_names, literals))
    return {"number" if kind == "integer" else kind for kind in types or ()}


def _literal_texts(node: Node) -> set[str] | None:
    """The values of an enumeration, so that equal ones are equal; None if it is none, or has numbers that could be."""
    literals = [node["const"]] if "const" in node else node.get("enum")
    if literals is None or any(isinstance(value, (float, list, dict)) for value in literals):
        return None
    return {json.dumps(value) for value in literals}


def _property(node: Node, name: str) -> Any:
    """The schema of one property of an object, as far as it is said in one place."""
    if name in node.get("properties", {}):
        return node["properties"][name]
    return True if "patternProperties" in node else node.get("additionalProperties", True)
