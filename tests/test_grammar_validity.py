"""Whatever is asked for in JSON is valid when it is finished: sixty schemas, greedy and hot, on the bundled model.

python -m pytest tests/test_grammar_validity.py
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from grammar_schemas import EXAMPLES

from bench import grammar_validity
from bench.grammar_validity import exact, judge
from engine import Engine, SamplingParams

UNGUIDED = {"pattern in a part"}  # a mask says that any letter may come, and not which of them leads to an end
BUNDLED = Path(__file__).parent.parent / "assets" / "folio-tiny"


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("finish", [True, False])
def test_what_is_finished_is_valid(temperature: float, finish: bool):
    engine = Engine.from_pretrained(BUNDLED, dtype="float32")
    params = [
        SamplingParams(json_schema=e.schema, json_finish=finish, temperature=temperature, seed=7, max_new_tokens=200)
        for e in EXAMPLES
    ]
    outputs = [out.outputs[0] for out in engine.generate(["An example: "] * len(params), params)]
    reasons = Counter(out.finish_reason for out in outputs)
    assert set(reasons) <= {"stop", "length"}, [out.stop_reason for out in outputs if out.finish_reason == "error"]
    wrong = [
        (example.name, out.text)
        for example, out in zip(EXAMPLES, outputs, strict=True)
        if out.finish_reason == "stop" and not judge(example.schema).is_valid(exact(out.text))
    ]
    assert not wrong
    cut = {example.name for example, out in zip(EXAMPLES, outputs, strict=True) if out.finish_reason == "length"}
    assert cut <= UNGUIDED if finish else reasons["stop"] > len(EXAMPLES) // 2
    engine.check()


def test_the_benchmark_counts_them(tmp_path: Path, capsys):
    schemas = [{"type": "integer"}, {"enum": ["a", "b"]}, {"type": "array", "items": {"$ref": "http://elsewhere.org"}}]
    file = tmp_path / "schemas.jsonl"
    file.write_text("".join(json.dumps({"schema": schema}) + "\n" for schema in schemas))
    grammar_validity.main(["--schemas", str(file), "--n", "4", "--tokens", "64"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["schemas"]["greedy"] == record["schemas"]["temperature 1.5"] == {"valid": 2, "refused": 1}
    for temperature in (0, 1):
        free, ours = (
            record["extraction"][f"{name}, temperature {temperature}"] for name in ("free", "with its schema")
        )
        assert ours["valid"] == 1 and ours["exact"] <= 1 and free["exact"] <= free["valid"]


def test_outcomes():
    schema = {"type": "integer"}
    assert grammar_validity.outcome(schema, "12", "stop", None) == "valid"
    assert grammar_validity.outcome(schema, '"a"', "stop", None) == "invalid"
    assert grammar_validity.outcome(schema, "{", "stop", None) == "does not parse"
    assert grammar_validity.outcome(schema, "{", "length", None) == "cut off"
    with pytest.raises(RuntimeError, match="out of luck"):
        grammar_validity.outcome(schema, "", "error", "out of luck")
