"""What the README shows is true: its Python runs, its files exist, its commands are modules."""

import importlib.util
import linecache
import math
import re
from pathlib import Path

import torch

from kernels import variants

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


def test_the_variant_of_the_docs_runs(monkeypatch):
    page = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 13  # "ten lines", and the import
    monkeypatch.setitem(variants.SCORE_MODS, "clip", None)  # so that they are as before afterwards
    monkeypatch.setitem(variants.MASK_MODS, "document", None)
    namespace: dict = {}
    path = ROOT / "docs" / "attention.md"
    linecache.cache[str(path)] = (len(code), None, code.splitlines(keepends=True), str(path))  # jit reads the source
    exec(compile(code, str(path), "exec"), namespace)
    scores = torch.tensor([[[-50.0, 1.0, 50.0]]]).expand(2, 3, 3)
    at = torch.arange(511, 514)
    out = variants.apply_in_torch(namespace["variant"], scores, at[:, None], at, torch.arange(2)[:, None, None])
    assert out[0].tolist() == [[-30.0, -math.inf, -math.inf], [-math.inf, 1.0, -math.inf], [-math.inf, 1.0, 30.0]]
