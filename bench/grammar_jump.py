"""How much of real JSON the grammar forces, whether jumping over it leaves the tokenizer's own tokens, and what it costs.

    python -m bench.grammar_jump --data ../shared/data/jsonschema/maskbench_sample.jsonl \\
        --tokenizer ../shared/data/tokenizers/qwen2.5
    python -m bench.grammar_jump --data maskbench_sample.jsonl --backend llguidance --limit 50

No model runs: a stand-in writes each valid instance of each schema in its canonical tokens, and at every position the
grammar is asked what it forces.

jumped      tokens that were jumped to / tokens of all instances: the forward passes that are saved
canonical   instances in which every token that was jumped to is the one that the tokenizer writes there
naive       the same for `encode(forced text)`, which saves more, and leaves the model behind tokens that it would not write
forced us   a call where something is forced; `free us`, where nothing is

The formats: `fixed`, where only ", " and ": " are allowed; `spaced` and `compact` where any whitespace is, and the instance is
written with those or without spaces. Left out are schemas over --bytes, those that do not compile within the limits of the
backend, and those with length bounds on strings, which xgrammar compiles for seconds; instances that a backend refuses
(it wants properties in the schema's order) are counted.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import emit, machine_facts, progress, significant, table
from grammar.jump import forced_tokens
from grammar.llguidance_backend import LlguidanceBackend
from grammar.matcher import Grammar
from grammar.spec import Spec
from grammar.vocabulary import Vocabulary
from grammar.xgrammar_backend import XgrammarBackend
from tokenizer import Tokenizer

BACKENDS = {"xgrammar": XgrammarBackend, "llguidance": LlguidanceBackend}
FORMATS: dict[str, tuple[bool, tuple[str, str]]] = {  # any whitespace?, separators of the instance
    "fixed": (False, (", ", ": ")),
    "spaced": (True, (", ", ": ")),
    "compact": (True, (",", ":")),
}
SLOW = ('"maxLength"', '"minLength"', '"pattern"', '"format"')
CONTEXT = 16  # tokens of the sequence that are handed over


def cases(data: Path, most_bytes: int, limit: int | None) -> list[tuple[Any, list[Any]]]:
    """(schema, valid instances) of the file, one JSON object a line; those that compile in no time."""
    found = []
    for line in data.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        text = json.dumps(record["schema"])
        instances = [test["data"] for test in record["tests"] if test["valid"]]
        if instances and len(text) <= most_bytes and not any(word in text for word in SLOW):
            found.append((record["schema"], instances))
    return found[:limit]


def naive_tokens(matcher, vocabulary: Vocabulary, recent: list[int], bitmask: torch.Tensor) -> list[int]:
    return vocabulary.encode(matcher.forced().decode())


class Replay:
    """Counts over many instances, one way to jump."""

    def __init__(self, vocabulary: Vocabulary, jump: Callable):
        self.vocabulary, self._jump = vocabulary, jump
        self._bitmask = torch.zeros(1, (len(vocabulary) + 31) // 32, dtype=torch.int32)
        self.tokens = self.jumped = self.instances = self.canonical = self.refused = 0
        self.seconds: dict[bool, list[float]] = {True: [], False: []}  # something was forced?

    def write(self, grammar: Grammar, text: str) -> None:
        """One instance. Behind a jump to tokens that are not canonical it is given up."""
        ids, matcher = self.vocabulary.encode(text), grammar.matcher()
        if not (all(map(matcher.accept, ids)) and matcher.complete):
            self.refused += 1
            return
        self.instances += 1
        if (jumped := self._jumped(grammar, ids)) is not None:
            self.canonical += 1
            self.jumped += jumped
            self.tokens += len(ids)

    def _jumped(self, grammar: Grammar, ids: list[int]) -> int | None:
        """How many of the canonical ids are jumped to; None if others are."""
        matcher, at, jumped = grammar.matcher(), 0, 0
        while at < len(ids):
            forced = bool(matcher.forced())
            start = time.perf_counter()
            tokens = self._jump(matcher, self.vocabulary, ids[max(0, at - CONTEXT) : at], self._bitmask)
            self.seconds[forced].append(time.perf_counter() - start)
            if tokens != ids[at : at + len(tokens)]:
                return None
            jumped += len(tokens)
            tokens = tokens or ids[at : at + 1]
            all(map(matcher.accept, tokens))
            at += len(tokens)
        return jumped

    def record(self) -> dict[str, Any]:
        microseconds = {
            name: {f"p{p}": significant(1e6 * np.percentile(self.seconds[forced], p), 3) for p in (50, 99)}
            for name, forced in (("forced_us", True), ("free_us", False))
            if self.seconds[forced]
        }
        counts = {name: getattr(self, name) for name in ("instances", "canonical", "refused", "tokens", "jumped")}
        return counts | microseconds


def measure(backend: Any, vocabulary: Vocabulary, found: list[tuple[Any, list[Any]]]) -> dict[str, dict[str, Any]]:
    """format -> the record of our way, with that of the naive one as "naive"."""
    records = {}
    for name, (any_whitespace, separators) in FORMATS.items():
        ours, naive = Replay(vocabulary, forced_tokens), Replay(vocabulary, naive_tokens)
        for i, (schema, instances) in enumerate(found):
            if i % 50 == 0:
                progress(f"{name}: schema {i} of {len(found)}")
            try:
                grammar = backend.compile(Spec.json_schema(schema, any_whitespace))
            except RuntimeError:
                continue
            for instance in instances:
                text = json.dumps(instance, ensure_ascii=False, separators=separators)
                ours.write(grammar, text)
                naive.write(grammar, text)
        records[name] = ours.record() | {"naive": naive.record()}
    return records


def rows(records: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    def share(part: int, whole: int) -> str:
        return f"{100 * part / max(1, whole):.1f} %"

    for name, r in records.items():
        us = [" / ".join(f"{value:g}" for value in r.get(key, {}).values()) for key in ("forced_us", "free_us")]
        canonical = [f"{x['canonical']} of {x['instances']}" for x in (r, r["naive"])]
        yield [name, share(r["jumped"], r["tokens"]), *canonical, *us, str(r["refused"])]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure jump-forward decoding on real schemas and instances.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/jsonschema/maskbench_sample.jsonl"))
    parser.add_argument("--tokenizer", type=Path, default=Path("assets/folio-tiny"), help="a folder with a tokenizer")
    parser.add_argument("--backend", choices=BACKENDS, default="xgrammar")
    parser.add_argument("--bytes", type=int, default=6000, help="of the largest schema")
    parser.add_argument("--limit", type=int, help="of schemas")
    parser.add_argument("--out", help="also write the JSON line to this file")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    vocabulary = Vocabulary.of(tokenizer, tokenizer.vocab_size, sorted(tokenizer.eos_token_ids))
    found = cases(args.data, args.bytes, args.limit)
    records = measure(BACKENDS[args.backend](vocabulary), vocabulary, found)
    headers = ["format", "jumped", "canonical", "naive", "forced us p50 / p99", "free us p50 / p99", "refused"]
    print(f"{args.backend}, {len(found)} schemas, {len(vocabulary):,} tokens\n\n" + table(headers, rows(records)))
    facts = {"backend": args.backend, "schemas": len(found), "vocabulary": len(vocabulary)}
    emit({"bench": "grammar_jump", **machine_facts(), **facts, "formats": records}, args.out)


if __name__ == "__main__":
    main()
