"""The coverage benchmark on made-up data: it counts what it should, and survives what does not end.

pytest tests/test_bench_grammar_coverage.py
"""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from waiting import HANG

from bench import grammar_coverage as bench
from bench.grammar_coverage import Case, Judge, Verdict, Worker, in_order, read, total

ROOT = Path(__file__).parent.parent
TINY = ROOT / "assets" / "folio-tiny"
NOT_ONE = {"not": {"const": 1}}
UNIQUE = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
PAIR = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"],
        "additionalProperties": False}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two schemas of people, and three of a draft."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [{"valid": True, "data": {"b": 1, "a": 2}}, {"valid": False, "data": {"a": 1}}]
    lists = [{"valid": True, "data": [1, 2]}, {"valid": False, "data": [1, 1]}]
    rows = [{"id": "pair", "schema": PAIR, "tests": pairs}, {"id": "unique", "schema": UNIQUE, "tests": lists}]
    (folder / "maskbench_sample.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    (folder / "testsuite" / "draft7").mkdir(parents=True)
    groups = [
        {"description": "not", "schema": NOT_ONE, "tests": [{"valid": True, "data": 2}, {"valid": False, "data": 1}]},
        {"description": "all", "schema": True, "tests": [{"valid": True, "data": None}]},
        {"description": "date", "schema": {"type": "string"}, "tests": [{"valid": True, "data": "x"}]},
    ]
    (folder / "testsuite" / "draft7" / "some.json").write_text(json.dumps(groups), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(TINY)


def test_cases_are_read(data):
    cases = read(data, ["maskbench", "draft7"], None)
    assert [case.suite for case in cases] == ["maskbench"] * 2 + ["draft7"] * 3
    assert [case.name for case in cases] == ["pair", "unique", "some: not", "some: all", "some: date"]
    assert cases[2].schema == {"$schema": bench.DRAFTS["draft7"], **NOT_ONE}
    assert cases[3].schema is True
    assert [case.name for case in read(data, ["maskbench", "draft7"], 1)] == ["pair", "some: not"]


def test_another_order_is_counted_apart(judge):
    case = Case(
        "s",
        "n",
        PAIR,
        ((True, {"a": 1, "b": 2}), (True, {"b": 1, "a": 2}), (False, {"a": 1}), (True, {"a": 1.5, "b": 2})),
    )
    for backend in bench.BACKENDS:
        verdict = judge.judge(case, backend)
        assert verdict.counts == {"valid accepted": 1, "only in order": 1, "invalid refused": 1, "valid refused": 1}
        assert verdict.status == "ok" and not verdict.right


def test_what_is_ignored_is_an_invalid_one_accepted(judge):
    case = Case("s", "n", UNIQUE, ((True, [1, 2]), (False, [1, 1])))
    wrong, refused = judge.judge(case, "xgrammar"), judge.judge(case, "llguidance")
    assert wrong.counts["invalid accepted"] == 1 and not wrong.right
    assert refused.status == "refused" and "uniqueItems" in refused.words
    choice = judge.choose(case)
    assert choice.status == "refused" and "'uniqueItems' at #" in choice.words


def test_in_order():
    schema = {"$defs": {"x": {"properties": {"c": {}, "b": {}}}}, "properties": {"b": {}, "a": {}}}
    assert list(in_order({"z": 1, "a": 2, "b": 3}, schema)) == ["b", "a", "z"]
    assert json.dumps(in_order([{"z": 1, "c": {"a": 1, "b": 2}}], schema)) == '[{"c": {"b": 2, "a": 1}, "z": 1}]'


def test_totals():
    verdicts = [
        Verdict("ok", counts=Counter({"valid accepted": 2, "only in order": 1})),
        Verdict("ok", counts=Counter({"invalid accepted": 1})),
        Verdict("ok", counts=Counter({"valid refused": 3, "invalid refused": 1})),
        Verdict("refused"),
        Verdict("slow"),
        Verdict("error"),
    ]
    sums = total(verdicts)
    assert sums.pop("instances") == {"valid accepted": 2, "only in order": 1, "only compact": 0, "valid refused": 3,
                                     "invalid refused": 1, "invalid accepted": 1}  # fmt: skip
    assert sums == {
        "schemas": 6,
        "right": 1,
        "accepts invalid": 1,
        "refuses valid": 1,
        "refused": 1,
        "slow": 1,
        "error": 1,
    }


def endless(tokenizer, pipe):
    """A worker that answers the second question never, and dies of the third."""
    pipe.send("ready")
    while True:
        case, backend = pipe.recv()
        if case.name == "never":
            time.sleep(HANG)
        if case.name == "death":
            raise SystemExit(1)
        pipe.send(Verdict("ok", backend=backend))


def test_what_does_not_end_is_killed_and_the_next_is_answered(monkeypatch):
    monkeypatch.setattr(bench, "serve", endless)
    worker = Worker(TINY, HANG)
    ask = [worker.ask(Case("s", name, True, ()), "xgrammar").status for name in ("one", "death", "two")]
    worker._seconds = 0.2
    ask += [worker.ask(Case("s", "never", True, ()), "xgrammar").status]
    worker._seconds = HANG
    ask += [worker.ask(Case("s", "three", True, ()), "xgrammar").status]
    worker.close()
    assert ask == ["ok", "error", "ok", "slow", "ok"]


def test_the_command(data, tmp_path):
    command = [sys.executable, "-m", "bench.grammar_coverage", "--data", str(data), "--tokenizer", str(TINY)]
    command += ["--suites", "maskbench", "draft7", "--details", str(tmp_path / "details")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["bench"] == "grammar_coverage" and record["llguidance"] and record["xgrammar"]
    maskbench, draft7 = record["suites"]["maskbench"], record["suites"]["draft7"]
    assert {name: t["right"] for name, t in maskbench.items()} == {"xgrammar": 1, "llguidance": 1, "auto": 1}
    assert {name: t["accepts invalid"] for name, t in maskbench.items()} == {"xgrammar": 1, "llguidance": 0, "auto": 0}
    assert maskbench["auto"]["instances"]["only in order"] == 1 and maskbench["auto"]["refused"] == 1
    assert {name: t["right"] for name, t in draft7.items()} == {"xgrammar": 2, "llguidance": 2, "auto": 2}
    details = [json.loads(line) for line in (tmp_path / "details").read_text().splitlines()]
    assert [line["auto"]["backend"] for line in details] == ["xgrammar", "", "", "xgrammar", "xgrammar"]
