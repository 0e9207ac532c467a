"""What lists, ablates and draws: on next to nothing.

pytest tests/test_bench_ablate.py
"""

import ast
import json
from pathlib import Path

import pytest
import torch

from bench import __main__ as listing
from bench import ablate
from bench.ablate import TECHNIQUES, Answer

ROOT = Path(__file__).parent.parent


def last_line(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


# ---- python -m bench


def test_every_command_is_listed(capsys):
    listing.main()
    lines = capsys.readouterr().out.splitlines()
    runnable = {
        path.stem
        for path in (ROOT / "bench").glob("*.py")
        if path.stem != "__main__" and "__main__" in path.read_text(encoding="utf-8")
    }
    listed = [line.split()[2].removeprefix("bench.") for line in lines if line.startswith("python -m")]
    assert set(listed) == runnable and len(listed) == len(runnable) > 15
    assert listed[0] == "ceilings"


def test_a_command_says_what_it_is_and_needs():
    of = {command.name: command for command in listing.commands()}
    assert of["plot"].needs == of["trace_picture"].needs == "[bench]"
    assert (of["kernels"].needs, of["overlap"].needs, of["linear"].needs) == ("GPU", "GPU for --gpu", "")
    assert all(command.about.endswith((".", "?")) for command in of.values())


def test_nothing_is_imported_to_list(tmp_path):
    (tmp_path / "broken.py").write_text('"""Fails."""\nimport nothing\nif __name__ == "__main__":\n    nothing.go()\n')
    (tmp_path / "helper.py").write_text('"""Helps."""\n')
    assert [command.name for command in listing.commands(tmp_path)] == ["broken"]


# ---- ablate


def test_ablate_tiny(capsys, tmp_path):
    threads = torch.get_num_threads()
    out = tmp_path / "ablate.json"
    without = [t.name for t in TECHNIQUES if t.name != "compile"]
    try:
        ablate.main(["--shape", "tiny", "--repeats", "1", "--threads", "1", "--out", str(out), "--without", *without])
    finally:
        torch.set_num_threads(threads)
    record = last_line(capsys.readouterr().out)
    assert json.loads(out.read_text()) == record
    variants = record["variants"]
    assert list(variants) == ["all on", *(f"no {name}" for name in without)]
    for variant in variants.values():
        assert variant["same"] == 1
        assert 0 < variant["first_p50"]["median"] <= variant["first_p99"]["median"]
        assert 0 < variant["between_p50"]["median"] <= variant["between_p99"]["median"]
    assert set(variants["all on"]["ratio"].values()) == {1.0}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compiling takes longer than all the rest, and other tests know what it gives."""
    monkeypatch.setattr(ablate.Engine, "compile", lambda engine, greedy: ["one token"])


def test_an_answer_that_changes_is_noticed():
    right, wrong = [[1, 2], [3]], [[1, 2], [4]]
    assert ablate.same_share(right, right) == 1 and ablate.same_share(wrong, right) == 0.5
    with pytest.raises(RuntimeError, match="'no radix tree': '50.0%'"):
        ablate.check_same({"all on": {"same": 1.0}, "no radix tree": {"same": 0.5}})


def test_figures_by_hand():
    answers = [[Answer(10.0, [1, 2], [10.5, 10.7])], [Answer(11.0, [3], [12.0])]]
    figures = ablate.figures(answers)
    assert figures["tokens_per_s"] == pytest.approx(3 / 2)
    assert (figures["first_p50"], figures["first_p99"]) == pytest.approx((1000, 1000))
    assert figures["between_p50"] == pytest.approx(200)


def test_questions_share_prefixes_and_come_from_the_seed():
    work = ablate.SMALL
    questions = ablate.make_questions(work, 512, 0)
    assert questions == ablate.make_questions(work, 512, 0) != ablate.make_questions(work, 512, 1)
    flat = [question for of_user in questions for question in of_user]
    assert len(flat) == work.users * work.questions
    assert len({tuple(question.prompt[: work.shared]) for question in flat}) <= work.prefixes
    assert all(len(question.prompt) + question.new <= work.longest for question in flat)
    work = ablate.Workload()
    assert len(ablate.make_questions(work, 512, 0)[0][5].prompt) == work.shared + work.long


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda technique: technique.name)
def test_a_technique_is_a_switch_of_the_engine(technique):
    init = next(
        node
        for node in ast.walk(ast.parse((ROOT / "engine.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    assert set(technique.off) <= {argument.arg for argument in init.args.kwonlyargs}
    assert technique.off or not technique.compile  # else it is not switched off


# ---- plot


def stat(value: float) -> dict[str, float]:
    return {"median": value, "low": 0.9 * value, "high": 1.1 * value}


ABLATION = {
    "bench": "ablate", "shape": "tiny", "dtype": "float32", "device": "a CPU", "cpu": "a CPU", "threads": 2,
    "torch": "2", "repeats": 3,
    "variants": {
        name: {metric: stat(10 * ratio) for metric in ablate.METRICS} | {"ratio": dict.fromkeys(ablate.METRICS, ratio)}
        for name, ratio in {"all on": 1.0, "no overlap": 0.8, "no radix tree": 0.25}.items()
    },
}  # fmt: skip
PEERS = ABLATION | {
    "bench": "peers",
    "rows": {
        "b1": {
            "folio": {"tokens_per_s": stat(10), "folio": 1.0},
            "hf": {"tokens_per_s": stat(5), "folio": 2.0},
            "llama.cpp": {"failed": "no memory"},
        },
        "shared": {"folio": {"first_s": stat(1), "folio": 1.0}},
    },
}


@pytest.mark.parametrize(
    ("record", "texts"), [(ABLATION, ["0.25×", "no radix tree", "tiny"]), (PEERS, ["0.50×", "hf"])]
)
def test_a_picture_says_its_ratios(tmp_path, record, texts):
    pytest.importorskip("matplotlib")
    from bench import plot

    figure = plot.PICTURES[record["bench"]](record)
    said = " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))
    assert all(text in said for text in texts)
    (tmp_path / "in.json").write_text(json.dumps(record))
    plot.main([str(tmp_path / "in.json"), str(tmp_path / "out.svg")])
    assert (tmp_path / "out.svg").read_text().count("<svg") == 1


def test_no_picture_of_what_is_unknown(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from bench import plot

    (tmp_path / "in.json").write_text('{"bench": "start"}')
    for picture, reason in (("out.svg", "'start'"), ("out.gif", ".gif ends in neither")):
        with pytest.raises(SystemExit):
            plot.main([str(tmp_path / "in.json"), str(tmp_path / picture)])
        assert reason in capsys.readouterr().err
