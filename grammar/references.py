"""The references of a JSON schema, all made to lead to "#" or "#/$defs/name".

python -m pytest tests/test_grammar_support.py
"""

import copy
import re
from itertools import count
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from grammar.subschemas import Node, children, subschemas


class References:
    """Makes every reference one to "#" or "#/$defs/name". One to another document, or to nothing, stays as it is."""

    def __init__(self, root: Node, id_keyword: str):
        self._root, self._id = root, id_keyword
        self._places: dict[str, Any] = {"": root}  # by URI, with "#anchor" for a named place
        self._definitions = root["$defs"] if isinstance(root.get("$defs"), dict) else {}
        self._copies: dict[str, Any] = {}  # definitions to be
        self._known = {id(root): "#"}  # references by what they mean
        for key in ("definitions", "$defs"):
            if isinstance(root.get(key), dict):
                self._known |= {id(place): f"#/{key}/{name}" for name, place in root[key].items()
                                if isinstance(place, dict) and not re.search("[/~%]", name)}  # fmt: skip

    def resolve(self) -> None:
        nodes = self._register(self._root, "")
        for node, base in nodes:  # grows, as references lead to schemas that are in no place for schemas
            if isinstance(node.get("$ref"), str):
                self._rewrite(node, base, nodes)
        if self._copies:
            self._root["$defs"] = self._definitions | copy.deepcopy(self._copies)
        for _, node in subschemas(self._root):
            for key in ("$schema", "$id", "id", "$anchor"):
                node.pop(key, None)

    def _register(self, root: Any, base: str) -> list[tuple[Node, str]]:
        """Every schema below one, with the URI that its references start from; the places that have a name are noted."""
        nodes: list[tuple[Node, str]] = []
        stack = [(root, base)]
        while stack:
            node, base = stack.pop()
            if not isinstance(node, dict):
                continue
            name = node.get(self._id)
            if isinstance(name, str):
                if not name.startswith("#"):
                    base = urljoin(base, urldefrag(name).url)
                self._places.setdefault(urljoin(base, name).removesuffix("#"), node)
            if isinstance(node.get("$anchor"), str):
                self._places.setdefault(f"{base}#{node['$anchor']}", node)
            nodes.append((node, base))
            stack += [(child, base) for _, child in children(node)]
        return nodes

    def _rewrite(self, node: Node, base: str, nodes: list[tuple[Node, str]]) -> None:
        uri, place = self._find(base, node["$ref"])
        if isinstance(place, (dict, bool)):
            if id(place) not in self._known:
                self._known[id(place)] = self._copy(place)
                if all(known is not place for known, _ in nodes):
                    nodes += self._register(place, uri)
            node["$ref"] = self._known[id(place)]

    def _find(self, base: str, reference: str) -> tuple[str, Any]:
        """The URI of the document that a reference leads to, and the schema there; None if there is none."""
        uri, fragment = urldefrag(base + reference if reference.startswith("#") else urljoin(base, reference))
        if not fragment.startswith("/"):
            return uri, self._places.get(f"{uri}#{unquote(fragment)}" if fragment else uri)
        place = self._places.get(uri)
        for part in unquote(fragment[1:]).split("/"):
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(place, dict):
                place = place.get(part)
            elif isinstance(place, list) and part.isdecimal() and int(part) < len(place):
                place = place[int(part)]
            else:
                place = None
        return uri, place

    def _copy(self, place: Any) -> str:
        """Give a schema that is no definition of the root a place among those."""
        taken = self._definitions.keys() | self._copies.keys()
        name = next(name for i in count() if (name := f"ref{i}") not in taken)
        self._copies[name] = place
        return f"#/$defs/{name}"
