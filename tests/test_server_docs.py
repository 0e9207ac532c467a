"""What docs/server.md shows is true: its examples run, and its table has the fields that there are.

python -m pytest tests/test_server_docs.py
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from openai_server import InProcess, app_of, served
from waiting import HANG

from engine import Engine
from serving.openai_protocol import ChatRequest, CompletionRequest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "server.md").read_text(encoding="utf-8").partition("## The OpenAI API")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def url():
    engine = Engine.from_pretrained(ROOT / "assets" / "folio-tiny", dtype="float32")
    with served(app_of(InProcess(engine), engine.tokenizer)) as address:
        yield address


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize("command", re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL))
def test_the_commands_run(url, command):
    done = subprocess.run(["bash", "-c", command], env={"URL": url}, capture_output=True, timeout=HANG, check=True)
    answer = json.loads(done.stdout)
    assert answer["choices"] and answer["usage"]["completion_tokens"] > 0


def test_the_python_runs(url, capsys):
    names = {"url": url}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(code, "server.md", "exec"), names)
    said = capsys.readouterr().out
    assert "tokens, " in said and "Person(name=" in said
    assert names["message"].tool_calls and len(names["messages"]) == 3


def test_the_table_has_every_field():
    rows = re.findall(r"^\| (`.*?) \| (chat|completions|both) \|", PAGE, re.MULTILINE)
    told = {"chat": set(), "completions": set()}
    for fields, where in rows:
        for field in re.findall("`([a-z_]+)", fields):
            for route in told if where == "both" else [where]:
                told[route].add(field)
    assert told == {"chat": set(ChatRequest.model_fields), "completions": set(CompletionRequest.model_fields)}
