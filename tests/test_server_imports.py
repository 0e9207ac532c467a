"""The HTTP process has neither torch nor xgrammar, not even when it is asked for tools: memory, and seconds of a first request.

python -m pytest tests/test_server_imports.py
"""

import subprocess
import sys

from server_process import ROOT

CODE = """
import sys
from types import SimpleNamespace
from serving.app import make_app
from serving.chat import Chats
from serving.client import EngineClient
from serving.openai_protocol import ChatRequest
from serving.settings import Settings
from tokenizer import Tokenizer
import server

tokenizer = Tokenizer.from_pretrained("assets/folio-tiny")
app = make_app(EngineClient({}), tokenizer, Settings())
app.openapi()
weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
asked = {"messages": [{"role": "user", "content": "Hi"}], "tools": [weather]}
for parser in ("hermes", "gpt-oss"):
    for form in ({"type": "text"}, schema):
        prompt = Chats(tokenizer, parser).prompt(ChatRequest.model_validate(asked | {"response_format": form}))
        assert '"weather"' in prompt.params["structural_tag"]
print(sorted({"torch", "triton", "xgrammar", "llguidance", "transformers", "numpy"} & sys.modules.keys()))
"""


def test_it_has_nothing_that_computes():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
