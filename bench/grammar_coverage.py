"""How much of JSON Schema each backend of structured output means as the standard does, and Folio's choice between them.

    python -m bench.grammar_coverage --data ../shared/data/jsonschema --tokenizer ../shared/data/tokenizers/qwen2.5
    python -m bench.grammar_coverage ... --limit 20 --suites maskbench      # the first 20 schemas of each file: a minute

--data is a folder with maskbench_sample.jsonl (a sample of guidance-ai/jsonschemabench: schemas as people write them) and
testsuite/<draft>/*.json (json-schema-org/JSON-Schema-Test-Suite: every corner of the standard). Each has schemas with instances
and whether those are valid. An instance is written by json.dumps, split by the tokenizer, and fed token by token; it is
accepted if every token is and the text may end there. A schema is right if that says of all its instances what it should.

xgrammar, llguidance   one backend for all, asked without `grammar/support.py`
auto                   what `support.choose` takes, or refuses by name

Both backends write an object's properties in the order of its schema. A valid instance in another order is therefore tried in
the schema's order too, and one that is refused as laid out by json.dumps is tried without spaces; the table counts those apart.
Compiling is done in a process of its own, and given up after --seconds.
"""

import argparse
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.common import emit, machine_facts, progress, table
from errors import UserError
from grammar import support
from grammar.llguidance_backend import LlguidanceBackend
from grammar.matcher import Grammar
from grammar.spec import Spec
from grammar.vocabulary import Vocabulary
from grammar.xgrammar_backend import XgrammarBackend
from tokenizer import Tokenizer

BACKENDS = ("xgrammar", "llguidance")
CONTENDERS = (*BACKENDS, "auto")
DRAFTS = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft4": "http://json-schema.org/draft-04/schema#",
}
SUITES = ("maskbench", *DRAFTS)


@dataclass(frozen=True)
class Case:
    suite: str
    name: str
    schema: Any
    tests: tuple[tuple[bool, Any], ...]  # (is it valid, the instance)


@dataclass
class Verdict:
    """What one contender makes of one case. status: ok | refused (says it cannot) | slow | error (anything else)."""

    status: str
    words: str = ""
    backend: str = ""
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def right(self) -> bool:
        return self.status == "ok" and not self.counts["valid refused"] and not self.counts["invalid accepted"]


# ---- the cases


def read_maskbench(data: Path) -> Iterator[Case]:
    for line in (data / "maskbench_sample.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        tests = tuple((test["valid"], test["data"]) for test in row["tests"])
        yield Case("maskbench", row["id"], row["schema"], tests)


def read_draft(data: Path, draft: str) -> Iterator[Case]:
    for path in sorted((data / "testsuite" / draft).glob("*.json")):
        for group in json.loads(path.read_text(encoding="utf-8")):
            schema = group["schema"]
            if isinstance(schema, dict):
                schema = {"$schema": DRAFTS[draft]} | schema
            tests = tuple((test["valid"], test["data"]) for test in group["tests"])
            yield Case(draft, f"{path.stem}: {group['description']}", schema, tests)


def read(data: Path, suites: Iterable[str], limit: int | None) -> list[Case]:
    """The cases of these suites; of each suite the first `limit`."""
    cases = []
    for suite in suites:
        cases += list(read_maskbench(data) if suite == "maskbench" else read_draft(data, suite))[:limit]
    return cases


# ---- one case


class Judge:
    def __init__(self, tokenizer: Path):
        tokens = Tokenizer.from_pretrained(tokenizer)
        vocabulary = Vocabulary.of(tokens, tokens.vocab_size, sorted(tokens.eos_token_ids))
        self.encode = vocabulary.encode
        self.backends = {"xgrammar": XgrammarBackend(vocabulary), "llguidance": LlguidanceBackend(vocabulary)}

    def choose(self, case: Case) -> Verdict:
        """Which backend would be asked: status "ok" and its name, or "refused"."""
        try:
            return Verdict("ok", backend=support.choose(_spec(case), "auto"))
        except UserError as error:
            return Verdict("refused", str(error))

    def judge(self, case: Case, backend: str) -> Verdict:
        start = time.perf_counter()
        try:
            grammar = self.backends[backend].compile(_spec(case))
        except (RuntimeError, UserError) as error:
            return Verdict("refused", str(error), backend)
        verdict = Verdict("ok", backend=backend, seconds=time.perf_counter() - start)
        for valid, instance in case.tests:
            verdict.counts[self._outcome(grammar, case.schema, valid, instance)] += 1
        return verdict

    def _outcome(self, grammar: Grammar, schema: Any, valid: bool, instance: Any) -> str:
        if not valid:
            return "invalid accepted" if self._accepts(grammar, instance) else "invalid refused"
        if self._accepts(grammar, instance):
            return "valid accepted"
        instance = in_order(instance, schema)
        if self._accepts(grammar, instance):
            return "only in order"
        return "only compact" if self._accepts(grammar, instance, (",", ":")) else "valid refused"

    def _accepts(self, grammar: Grammar, instance: Any, separators: tuple[str, str] = (", ", ": ")) -> bool:
        matcher = grammar.matcher()
        text = json.dumps(instance, ensure_ascii=False, separators=separators)
        return all(matcher.accept(token) for token in self.encode(text)) and matcher.complete


def _spec(case: Case) -> Spec:
    return Spec.json_schema(json.dumps(case.schema))


def in_order(instance: Any, schema: Any) -> Any:
    """An instance with its objects' properties in the order in which a schema first names them anywhere; the others last."""
    names: dict[str, int] = {}
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            for name in node.get("properties") or ():
                names.setdefault(name, len(names))
            stack += reversed(node.values())
        elif isinstance(node, list):
            stack += reversed(node)
    return _sorted(instance, names)


def _sorted(instance: Any, names: dict[str, int]) -> Any:
    if isinstance(instance, list):
        return [_sorted(item, names) for item in instance]
    if isinstance(instance, dict):
        keys = sorted(instance, key=lambda name: names.get(name, len(names)))
        return {name: _sorted(instance[name], names) for name in keys}
    return instance


# ---- all cases, in a process that may be killed


def serve(tokenizer: Path, pipe: Connection) -> None:
    judge = Judge(tokenizer)
    pipe.send("ready")
    while True:
        case, backend = pipe.recv()
        try:
            pipe.send(judge.choose(case) if backend == "auto" else judge.judge(case, backend))
        except Exception as error:
            pipe.send(Verdict("error", f"{type(error).__name__}: {error}", backend))


class Worker:
    """A Judge in a process of its own. A question that takes too long ends the process; the next one starts another."""

    def __init__(self, tokenizer: Path, seconds: float):
        self._tokenizer, self._seconds, self._process = tokenizer, seconds, None

    def ask(self, case: Case, backend: str) -> Verdict:
        if self._process is None:
            self._start()
        self._pipe.send((case, backend))
        try:
            if self._pipe.poll(self._seconds):
                return self._pipe.recv()
            verdict = Verdict("slow", f"more than {self._seconds:g} s", backend)
        except EOFError:
            verdict = Verdict("error", "the process has died", backend)
        self.close()
        return verdict

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(self._tokenizer, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def measure(cases: list[Case], tokenizer: Path, seconds: float) -> list[dict[str, Verdict]]:
    """For each case the verdict of each contender; `auto` has that of the backend it chose."""
    worker, results = Worker(tokenizer, seconds), []
    for i, case in enumerate(cases):
        verdicts = {backend: worker.ask(case, backend) for backend in BACKENDS}
        choice = worker.ask(case, "auto")
        results.append(verdicts | {"auto": verdicts[choice.backend] if choice.status == "ok" else choice})
        if i % 50 == 49:
            progress(f"{i + 1} of {len(cases)}")
    worker.close()
    return results


# ---- what it comes to


COLUMNS = ("valid accepted", "only in order", "only compact", "valid refused", "invalid refused", "invalid accepted")


def total(verdicts: list[Verdict]) -> dict[str, Any]:
    """Schemas by what became of them; instances, of the schemas that were taken, by outcome."""
    counts = sum((verdict.counts for verdict in verdicts), Counter())
    by_status = Counter(verdict.status for verdict in verdicts)
    return {
        "schemas": len(verdicts),
        "right": sum(verdict.right for verdict in verdicts),
        "accepts invalid": sum(verdict.counts["invalid accepted"] > 0 for verdict in verdicts),
        "refuses valid": sum(verdict.counts["valid refused"] > 0 for verdict in verdicts),
        **{status: by_status[status] for status in ("refused", "slow", "error")},
        "instances": {column: counts[column] for column in COLUMNS},
    }


def report(cases: list[Case], results: list[dict[str, Verdict]]) -> dict[str, dict[str, Any]]:
    """Print the tables; return {suite: {contender: its totals}}."""
    totals = {}
    for suite in dict.fromkeys(case.suite for case in cases):
        of_suite = [result for case, result in zip(cases, results, strict=True) if case.suite == suite]
        totals[suite] = {name: total([result[name] for result in of_suite]) for name in CONTENDERS}
        by_name = totals[suite].items()
        heads = [head for head in totals[suite]["auto"] if head != "instances"]
        print(f"\n{suite}: schemas")
        print(table(["", *heads], [[name, *(f"{t[head]:,}" for head in heads)] for name, t in by_name]))
        print(f"\n{suite}: instances of the schemas that were taken")
        print(table(["", *COLUMNS], [[name, *(f"{t['instances'][c]:,}" for c in COLUMNS)] for name, t in by_name]))
    return totals


def details(cases: list[Case], results: list[dict[str, Verdict]]) -> Iterator[str]:
    """A line of JSON for each case."""
    for case, result in zip(cases, results, strict=True):
        of_each = {
            name: {"status": v.status, "words": v.words, "backend": v.backend, "right": v.right, **v.counts}
            for name, v in result.items()
        }
        yield json.dumps({"suite": case.suite, "name": case.name, **of_each})


def main() -> None:
    parser = argparse.ArgumentParser(description="Which JSON schemas mean what they should, by backend.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/jsonschema"))
    parser.add_argument(
        "--tokenizer", type=Path, default=Path("../shared/data/tokenizers/qwen2.5"), help="a checkpoint"
    )
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--limit", type=int, help="so many schemas of each suite (default: all)")
    parser.add_argument("--seconds", type=float, default=20.0, help="for one schema and its instances, in one backend")
    parser.add_argument("--details", type=Path, help="a file for a line about each schema")
    parser.add_argument("--out", help="a file for the record")
    args = parser.parse_args()
    cases = read(args.data, args.suites, args.limit)
    results = measure(cases, args.tokenizer, args.seconds)
    if args.details:
        args.details.write_text("".join(f"{line}\n" for line in details(cases, results)), encoding="utf-8")
    versions = {backend: metadata.version(backend) for backend in BACKENDS}
    record = {"bench": "grammar_coverage", **machine_facts(), **versions, "seconds": args.seconds}
    emit(record | {"limit": args.limit, "suites": report(cases, results)}, args.out)


if __name__ == "__main__":
    main()
