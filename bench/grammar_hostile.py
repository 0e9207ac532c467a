"""Do the others get slower when somebody sends grammars that are made to harm? Ordinary requests, with and without such company.

    python -m bench.grammar_hostile                       # the bundled model
    python -m bench.grammar_hostile --shape smollm2-135m --new-tokens 32

Some prompts are decoded together, and every token is timed. In turn: alone; beside some requests a second with a harmless
schema; beside as many with hostile grammars, each a new one: nested 10,000 deep, 1,000 properties, a constant of 1 MB, 50,000
parentheses or rules, references that double 30 times, an empty language, and one that passes the gate and keeps the worker busy.

A table, then one JSON line.
"""

import argparse
import itertools
import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from bench.checkpoints import NAMES, make_checkpoint
from bench.common import Stat, alternate, emit, machine_facts, summarize, table, use_threads
from engine import Engine, SamplingParams
from errors import UserError


def harmless(i: int) -> dict[str, Any]:
    return {"json_schema": {"type": "object", "properties": {f"p{i}": {"type": "integer"}}, "required": [f"p{i}"]}}


def deep(i: int) -> dict[str, Any]:
    return {"json_schema": '{"type": "array", "items": ' * 10_000 + f'{{"const": {i}}}' + "}" * 10_000}


def many_properties(i: int) -> dict[str, Any]:
    return {"json_schema": {"type": "object", "properties": {f"p{i}_{n}": {"type": "string"} for n in range(1000)}}}


def long_constant(i: int) -> dict[str, Any]:
    return {"json_schema": {"const": f"{i}" + "x" * 1_000_000}}


def parentheses(i: int) -> dict[str, Any]:
    return {"regex": "(" * 50_000 + f"{i}" + ")" * 50_000}


def many_rules(i: int) -> dict[str, Any]:
    return {"ebnf": "\n".join(["root ::= r0", *(f'r{n} ::= "{i}"' for n in range(50_000))])}


def billion_laughs(i: int) -> dict[str, Any]:
    twice = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(30)}
    return {"json_schema": {"$defs": {**twice, "d30": {"const": i}}, "$ref": "#/$defs/d0"}}


def empty(i: int) -> dict[str, Any]:
    return {"json_schema": {"$defs": {"a": {"$ref": "#/$defs/a", "title": str(i)}}, "$ref": "#/$defs/a"}}


def slow(i: int) -> dict[str, Any]:
    """What the gate lets pass and the worker is busy with, for want of another backend: bounded strings in a tag."""
    schema: dict[str, Any] = {"type": "string", "maxLength": 200 + i}
    for _ in range(4):
        schema = {"type": "array", "items": schema}
    content = {"type": "json_schema", "json_schema": schema}
    return {"structural_tag": {"type": "structural_tag", "format": content}}


HOSTILE = (deep, many_properties, long_constant, parentheses, many_rules, billion_laughs, empty, slow)


class Company(threading.Thread):
    """Sends `rate` requests a second, until it is told to stop."""

    def __init__(self, engine: Engine, requests: Iterator[dict[str, Any]], rate: float):
        super().__init__(daemon=True)
        self.outcomes: Counter[str] = Counter()
        self._engine, self._requests, self._rate, self._stop_now = engine, requests, rate, threading.Event()

    def run(self) -> None:
        streams = []
        while not self._stop_now.wait(1 / self._rate):
            try:
                params = SamplingParams(temperature=0, max_new_tokens=4, **next(self._requests))
                streams.append(self._engine.stream([1, 2, 3], params))
            except UserError:
                self.outcomes["refused"] += 1
        for stream in streams:
            with stream:
                ends = [delta.finish_reason for delta in stream]
            self.outcomes["error" if ends[-1] == "error" else "done"] += 1

    def stop(self) -> None:
        self._stop_now.set()
        self.join()


def decode(engine: Engine, prompts: list[list[int]], tokens: int, company: Company | None) -> tuple[float, float]:
    """-> tokens a second, and the 99th percentile of the time between two tokens of one request."""
    if company is not None:
        company.start()
        time.sleep(0.5)
    times: list[list[float]] = [[] for _ in prompts]

    def read(i: int, stream: Any) -> None:
        times[i] = [time.perf_counter() for _ in stream]

    start = time.perf_counter()
    params = SamplingParams(temperature=0, max_new_tokens=tokens, ignore_eos=True)
    readers = [threading.Thread(target=read, args=(i, engine.stream(p, params))) for i, p in enumerate(prompts)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    end = time.perf_counter()
    if company is not None:
        company.stop()
    gaps = sorted(b - a for each in times for a, b in itertools.pairwise(each))
    return len(prompts) * tokens / (end - start), gaps[int(len(gaps) * 0.99)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ordinary requests beside hostile grammars.")
    parser.add_argument("--shape", default="folio-tiny", choices=NAMES)
    parser.add_argument("--rows", type=int, default=8, help="ordinary requests (default: 8)")
    parser.add_argument("--new-tokens", type=int, default=512, help="of each (default: 512)")
    parser.add_argument("--rate", type=float, default=10, help="of the others, a second (default: 10)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", help="also write the JSON line to this file")
    args = parser.parse_args(argv)
    use_threads(args.threads)
    engine = Engine.from_pretrained(make_checkpoint(args.shape), dtype="float32")
    prompts = [[5 + i, 6, 7, 8] for i in range(args.rows)]
    most = int(args.rate * 60 * (args.repeats + 1))  # made beforehand: that is the work of a client
    bad = [HOSTILE[i % len(HOSTILE)](i) for i in range(most)]
    kinds = {"alone": None, "harmless": map(harmless, itertools.count()), "hostile": itertools.cycle(bad)}
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in kinds}

    def measure(name: str) -> tuple[float, float]:
        company = None if kinds[name] is None else Company(engine, kinds[name], args.rate)
        figures = decode(engine, prompts, args.new_tokens, company)
        outcomes[name] += company.outcomes if company else Counter()
        return figures

    measure("hostile")  # imports the backends, and starts the worker
    samples = alternate({name: (lambda name=name: measure(name)) for name in kinds}, args.repeats)
    engine.check()
    stats: dict[str, tuple[Stat, Stat]] = {
        name: tuple(map(summarize, zip(*each, strict=True))) for name, each in samples.items()
    }
    ratio = {
        name: statistics.median(a / b for (a, _), (b, _) in zip(each, samples["alone"], strict=True))
        for name, each in samples.items()
    }
    rows = [
        [name, speed.show(0), f"{ratio[name]:.3f}", late.show(1, 1e3), json.dumps(outcomes[name])]
        for name, (speed, late) in stats.items()
    ]
    print(table(["beside", "tokens/s", "to alone", "p99 between tokens, ms", "what became of them"], rows))
    record = {
        name: {"tokens_per_s": speed.json(), "between_p99_s": late.json(), "to_alone": ratio[name], **outcomes[name]}
        for name, (speed, late) in stats.items()
    }
    facts = {"bench": "grammar_hostile", **machine_facts(), "shape": args.shape, "rows": args.rows, "rate": args.rate}
    emit(facts | {"new_tokens": args.new_tokens, "repeats": args.repeats, "company": record}, args.out)


if __name__ == "__main__":
    main()
