"""The benchmark of programs, on next to nothing.

python -m pytest tests/test_bench_programs.py
"""

import json

from bench import programs


def test_it_runs_and_the_calls_are_the_same(capsys, one_thread):
    names = ("few_shot", "tree_of_thought")
    options = ["--shape", "folio-tiny", "--small", "--repeats", "1", "--threads", "1"]
    programs.main([*options, "--programs", *names])
    said = capsys.readouterr().out
    result = json.loads(said.strip().splitlines()[-1])
    for name in names:
        row = result[name]
        assert row["no radix"]["same"] == row["one by one"]["same"] == 1 and name in said
        assert row["folio"]["computed"] < row["transformers"]["computed"]
        assert 0 < row["folio"]["hit_rate"] <= row["folio"]["optimum"] <= 1
        assert row["no radix"]["hit_rate"] == row["transformers"]["hit_rate"] == 0
        assert row["transformers"]["same"] == 1


def test_a_schema_is_kept_to_in_transformers_too(one_thread):
    folder = programs.checkpoint_of("folio-tiny")
    backend = programs.Transformers(folder, programs.Tokenizer.from_pretrained(folder))

    def program(s):
        schema = {
            "type": "object",
            "properties": {"a": {"const": 12}},
            "required": ["a"],
            "additionalProperties": False,
        }
        s += "x" + programs.gen("x", max_tokens=24, json_schema=schema)

    assert programs.function(program).run(backend=backend, temperature=0)["x"] == '{"a": 12}'


def test_the_optimum_is_what_was_there_before():
    ledger = programs.Ledger([([1, 2, 3], [1, 2, 3, 4]), ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]), ([7, 8], [7, 8])])
    assert ledger.optimum() == 4 and ledger.prompts == 10 and ledger.new == 1
