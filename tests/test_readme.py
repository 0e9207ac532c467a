"""What the README shows is true: its Python runs, its files exist, its commands are modules."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 40


def test_every_file_named_is_there():
    the_map = README.split("## The map")[1].split("```")[1]
    named = re.findall(r"[\w/-]+(?:\.py|\.md|/)", the_map)
    assert len(named) > 15
    assert [n for n in named if not (ROOT / n).exists()] == []


def test_every_command_is_a_module():
    modules = set(re.findall(r"python -m ([\w.]+)", README))
    assert modules and all(importlib.util.find_spec(m) for m in modules)
