"""The bench of jump-forward decoding, on a few schemas of our own and the bundled tokenizer.

pytest tests/test_bench_grammar_jump.py
"""

import json
import sys

import pytest

from bench import grammar_jump

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "assistant": {"enum": ["system", "string"]}},
    "required": ["name", "assistant"],
}
RECORDS = [
    {
        "schema": PERSON,
        "tests": [{"valid": True, "data": {"name": "A", "assistant": "string"}}, {"valid": False, "data": 1}],
    },
    {"schema": PERSON, "tests": [{"valid": True, "data": {"assistant": "string", "name": "A"}}]},  # in another order
    {"schema": {"type": "string", "maxLength": 9}, "tests": [{"valid": True, "data": "A"}]},
    {"schema": {"type": "array"}, "tests": [{"valid": False, "data": 1}]},
]


@pytest.mark.parametrize("backend", grammar_jump.BACKENDS)
def test_the_bench_counts_what_is_jumped_to(backend: str, tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.json"
    data.write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["bench", "--data", str(data), "--backend", backend, "--out", str(out)])
    grammar_jump.main()
    record = json.loads(out.read_text())
    assert record["bench"] == "grammar_jump" and record["schemas"] == 2
    fixed, compact = record["formats"]["fixed"], record["formats"]["compact"]
    assert fixed["instances"] == fixed["canonical"] >= 1
    assert fixed["instances"] + fixed["refused"] == 2
    assert 0 < compact["jumped"] < fixed["jumped"] < fixed["tokens"]
    assert compact["naive"]["canonical"] < compact["naive"]["instances"]
    assert "0 of" in capsys.readouterr().out


def test_what_compiles_slowly_or_has_no_instance_is_left_out(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    assert [instances for _, instances in grammar_jump.cases(data, 6000, None)] == [
        [{"name": "A", "assistant": "string"}],
        [{"assistant": "string", "name": "A"}],
    ]
    assert grammar_jump.cases(data, 10, None) == [] and len(grammar_jump.cases(data, 6000, 1)) == 1
