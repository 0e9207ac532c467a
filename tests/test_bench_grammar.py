"""What the benchmark of structured output prints and counts.

python -m pytest tests/test_bench_grammar.py
"""

import json
from pathlib import Path

import pytest
import torch

from bench import grammar, grammar_hostile
from bench.checkpoints import BUNDLED
from grammar.vocabulary import Vocabulary
from tokenizer import Tokenizer


def vocabulary() -> Vocabulary:
    return Vocabulary.of(Tokenizer.from_pretrained(BUNDLED["folio-tiny"]), 1024, [0, 2])


def test_tiny(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(grammar.Engine, "compile", lambda engine, greedy: ["one token"])
    threads, out = torch.get_num_threads(), tmp_path / "grammar.json"
    try:
        grammar.main(["--tiny", "--threads", "1", "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(out.read_text()) == record
    assert set(record["grammars"]) == {"xgrammar", "llguidance", "folio: auto"}
    for figures in record["grammars"].values():
        assert 0 < figures["compile_p50"] <= figures["compile_p99"] and 0 < figures["mask_p50"] <= figures["mask_p99"]
        assert figures["refused"] == 0
    assert list(record["throughput"]) == ["1 rows", "3 rows"] and record["plain_check_s"] > 0
    assert all(stat["median"] > 0 for row in record["throughput"].values() for stat in row.values())


def test_rows_that_end_early_are_an_error(monkeypatch):
    monkeypatch.setattr(grammar.Engine, "compile", lambda engine, greedy: [])
    tokenizer = Tokenizer.from_pretrained(BUNDLED["folio-tiny"])
    engine = grammar.open_engine(BUNDLED["folio-tiny"], tokenizer, [0, 2], 2, 64, overlap=True)
    assert grammar.throughput(engine, 2, 5, constrained=False) > 0
    short = grammar.SamplingParams(max_new_tokens=3, ignore_eos=True)
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda prompts, params: generate(prompts, short))
    with pytest.raises(RuntimeError, match="2 of 2 rows ended early: length"):
        grammar.throughput(engine, 2, 5, constrained=True)


def test_schemas_of_a_file(tmp_path: Path):
    rows = [
        {"schema": {"const": i}, "tests": [{"valid": True, "data": i}, {"valid": False, "data": -1}]} for i in range(10)
    ]
    file = tmp_path / "schemas.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert grammar.read_schemas(str(file), 5) == [({"const": i}, [i]) for i in range(0, 10, 2)]
    refused = [({"$ref": "http://elsewhere.org/schema"}, [1]), ({"type": "integer"}, [12])]
    assert [instances for _, _, instances in grammar.usable(refused)] == [[12]]


def test_a_plain_check_takes_as_long_as_its_vocabulary():
    assert 0 < grammar.plain_check(vocabulary()) < 1


def test_hostile_company(capsys):
    threads = torch.get_num_threads()
    try:
        grammar_hostile.main(["--rows", "2", "--new-tokens", "40", "--rate", "50", "--repeats", "1", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    company = json.loads(capsys.readouterr().out.splitlines()[-1])["company"]
    assert set(company) == {"alone", "harmless", "hostile"}
    assert all(each["tokens_per_s"]["median"] > 0 for each in company.values())
    assert "refused" not in company["harmless"] and company["hostile"]["refused"] > 0
