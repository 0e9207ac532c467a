"""The command line, run as a user runs it, on the bundled model: output, JSON, pipes, mistakes, Ctrl-C."""

import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from waiting import HANG

import generate
from bench.checkpoints import BUNDLED

ROOT = Path(__file__).parent.parent
GREEDY = ["--temperature", "0", "--dtype", "float32", "--max-new-tokens", "12"]


def run_alone(*args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess:
    """As a user runs it."""
    command = [sys.executable, str(ROOT / "generate.py"), *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=os.environ | env, timeout=HANG)


def run(*args: str, stdin: str = "") -> subprocess.CompletedProcess:
    """The same in this process, which has imported already what takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = generate.main(list(args))
        except SystemExit as left:
            code = left.code
    gc.collect()  # the engine, which ends its trace
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def test_prompt_pipe_file_and_json_agree(tmp_path: Path):
    (tmp_path / "prompt.txt").write_text("Once upon a time")
    by_flag = run_alone("--prompt", "Once upon a time", *GREEDY)
    assert by_flag.returncode == 0 and by_flag.stdout.startswith("Once upon a time, ")
    for word in ("prompt tokens", "new at", "MBU", "peak memory", "MB of weights per token"):
        assert word in by_flag.stderr
    by_pipe = run_alone(*GREEDY, "--quiet", stdin="Once upon a time\n")
    assert (by_pipe.stdout, by_pipe.stderr) == (by_flag.stdout, "")
    by_file = run("--prompt-file", str(tmp_path / "prompt.txt"), *GREEDY, "--quiet", "--json")
    text, last = by_file.stdout.rstrip("\n").rsplit("\n", 1)
    result = json.loads(last)
    assert text == by_flag.stdout.rstrip("\n") == "Once upon a time" + result["text"]
    assert result["finish_reason"] == "length" and len(result["token_ids"]) == 12
    assert result["figures"]["new_tokens"] == 12 and result["figures"]["decode_tokens_per_second"] > 0


def test_what_was_left_aside_is_said(tmp_path: Path):
    folder = Path(shutil.copytree(ROOT / "assets" / "folio-tiny", tmp_path / "model"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"num_nextn_predict_layers": 1}))
    layer = f"model.layers.{raw['num_hidden_layers']}"
    tensors = load_file(folder / "model.safetensors") | {f"{layer}.eh_proj.weight": torch.ones(2, 2)}
    save_file(tensors, folder / "model.safetensors")
    args = ("--model", str(folder), "--prompt", "Once", "--max-new-tokens", "1")
    assert f"left aside: {layer} (for predicting tokens ahead)\n" in run(*args).stderr
    assert run(*args, "--quiet").stderr == ""


def test_samples_are_seeded_and_differ():
    args = ("--prompt", "Once", "--seed", "3", "--num-samples", "3", "--max-new-tokens", "8", "--quiet", "--json")
    first, second = (json.loads(run(*args).stdout.splitlines()[-1])["samples"] for _ in range(2))
    assert [s["token_ids"] for s in first] == [s["token_ids"] for s in second]
    assert len({tuple(s["token_ids"]) for s in first}) > 1


def test_a_stop_string_is_trimmed():
    result = json.loads(run("--prompt", "Once upon a time", *GREEDY, "--stop", "a", "--json").stdout.splitlines()[-1])
    assert result["finish_reason"] == "stop" and "a" not in result["text"]


@pytest.mark.parametrize("model", BUNDLED)
def test_switches_change_no_token_and_a_trace_is_written(model: str, tmp_path: Path):
    args = ("--model", str(BUNDLED[model]), "--prompt", "Once upon a time", *GREEDY, "--quiet")
    off = ("--no-radix", "--no-overlap", "--no-chunked-prefill", "--page-size", "1", "--max-total-tokens", "200")
    chunks = ("--chunked-prefill-size", "1", "--trace", str(tmp_path / "trace.json"))
    assert run(*args).stdout == run(*args, *off).stdout == run(*args, *chunks).stdout
    events = json.loads((tmp_path / "trace.json").read_text())
    assert {"plan", "launch", "commit"} <= {e["name"] for e in events}


def test_chat_finds_its_history_in_the_cache():
    lines = "Mia is 7 years old and lives in Oslo.\nWhat is 27 + 58?\n/exit\n"
    answers = [run("--chat", *GREEDY[:4], *off, stdin=lines).stdout for off in ((), ("--no-radix",))]
    assert answers[0] == answers[1] and answers[0].count("\n") == 2


def test_chat_keeps_and_resets_its_history():
    lines = "Mia is 7 years old and lives in Oslo.\n/reset\nWhat is 27 + 58?\n/exit\nnever read\n"
    result = run("--chat", "--temperature", "0", "--dtype", "float32", stdin=lines)
    assert result.returncode == 0
    answers = result.stdout.splitlines()
    assert json.loads(answers[0]) == {"name": "Mia", "age": 7, "city": "Oslo"}
    assert answers[1:] == ["85"]


FACT = "Mia is 7 years old and lives in Oslo. "
CITY = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": false}'


@pytest.mark.parametrize(
    "args, pattern",
    [
        (["--json-schema", CITY, "--json-finish"], r'\{\s*"city"\s*:\s*".*"\s*\}'),
        (["--json-schema", "FILE", "--disable-any-whitespace"], r'\{"city": ".*"\}'),
        (["--json-object", "--json-finish", "--grammar-backend", "llguidance"], r"\{.*\}"),
        (["--regex", "[0-9]{3}-[0-9]{4}", "--no-jump-forward"], "[0-9]{3}-[0-9]{4}"),
        (["--ebnf", 'root ::= "yes" | "no"'], "yes|no"),
        (["--choices", "Oslo", "Rome", "--num-samples", "3"], "Oslo|Rome"),
    ],
)
def test_structured_output(args: list[str], pattern: str, tmp_path: Path):
    file = tmp_path / "schema.json"
    file.write_text(CITY)
    args = [str(file) if arg == "FILE" else arg for arg in args]
    result = run("--prompt", FACT, "--max-new-tokens", "60", "--seed", "1", "--quiet", "--json", *args)
    last = json.loads(result.stdout.splitlines()[-1])
    for sample in last.get("samples", [last]):
        assert re.fullmatch(pattern, sample["text"], re.DOTALL) and sample["finish_reason"] == "stop", result.stderr


TOOLS = f'[{{"type": "function", "function": {{"name": "get_weather", "parameters": {CITY}}}}}]'


@pytest.mark.parametrize("choice", [["--tool-choice", "required"], ["--tool-choice", "get_weather"], []])
def test_a_tool_is_called_in_the_notation_of_the_model(choice: list[str]):
    result = run("--chat", "--tools", TOOLS, *choice, *GREEDY[:4], stdin="What is the weather in Oslo?\n")
    call = re.search(r"<tool_call>\n(.*)\n</tool_call>", result.stdout)
    assert json.loads(call[1]) == {"name": "get_weather", "arguments": {"city": "Oslo"}}, result


@pytest.mark.parametrize(
    "args, message",
    [
        (["--prompt", "x", "--tools", TOOLS], "give --chat"),
        (["--chat", "--tool-choice", "auto"], "there are none"),
        (["--chat", "--tools", "{"], "--tools is not valid JSON"),
        (["--chat", "--tools", "none.json"], "generate.py: there is no file none.json"),
        (["--chat", "--tools", "[]"], "a JSON list of at least one"),
        (["--chat", "--tools", TOOLS, "--tool-choice", "other"], "the tools are get_weather"),
        (["--chat", "--tools", TOOLS, "--tool-call-parser", "qwen"], "must be one of"),
        (["--prompt", "x", "--json-schema", "none.json"], "there is no file none.json"),
        (["--prompt", "x", "--json-schema", "{"], "json_schema is not valid JSON"),
        (["--prompt", "x", "--json-schema", '{"type": "text"}'], "text"),
        (["--prompt", "x", "--regex", "("], "regex"),
        (["--prompt", "x", "--ebnf", 'other ::= "a"'], "root"),
        (["--prompt", "x", "--regex", "a", "--choices", "b"], "not allowed with"),
        (["--prompt", "x", "--json-finish"], "json_finish is given, but nothing"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--chat"], "not allowed with"),
        (["--chat", "--json"], "--json"),
        (["--chat", "--num-samples", "2"], "--num-samples"),
        (["--prompt", "x", "--top-p", "2"], "top_p is 2.0"),
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "x", "--num-samples", "0"], "n is 0"),
        (["--prompt", "x", "--max-new-tokens", "3000"], "1 prompt tokens + 3000 new ones exceed the context of 2048"),
        (["--prompt", "a " * 3000], "the context has 2048"),
        (["--prompt", "x", "--device", "tpu"], "device 'tpu' is unknown"),
        (["--prompt", "x", "--model", "no/such/folder"], "no such folder"),
        (["--prompt-file", "no-such-file"], "cannot read the prompt file no-such-file"),
        (["--prompt", "x", "--page-size", "129"], "page_size is 129; it must be between 1 and 128"),
        (["--prompt", "x", "--max-total-tokens", "15"], "a pool of 1 pages of 16 tokens is too small"),
        (["--prompt", "x", "--max-total-tokens", "32", "--num-samples", "3"], "3 rows need at least one each"),
        (["--prompt", "x " * 50, "--max-total-tokens", "48"], "the context has 48"),
        (["--prompt", "x", "--chunked-prefill-size", "0"], "chunk_size is 0"),
        (["--prompt", "x", "--trace", "no/such/folder/trace.json"], "cannot write the trace"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args: list[str], message: str):
    result = run(*args)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""


def test_cuda_without_one(monkeypatch):
    result = run_alone("--prompt", "x", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2 and "0 CUDA devices" in result.stderr


def test_compile_without_a_compiler_says_so_and_goes_on():
    result = run_alone("--prompt", "Once", *GREEDY, "--compile", CXX="no-such-compiler", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0 and result.stdout.startswith("Once")
    assert "NOT COMPILED" in result.stderr and "install g++" in result.stderr


def test_ctrl_c_ends_cleanly():
    endless = ["--prompt", "Once", "--max-new-tokens", "2000", "--temperature", "50", "--seed=8"]  # over 1,500 tokens
    command = [sys.executable, str(ROOT / "generate.py"), *endless]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.read(100).startswith("Once")  # in the midst of it
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 130 and "Traceback" not in err, err


def test_help_needs_no_torch():
    code = "import sys, generate\ntry: generate.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=HANG)
    assert result.stdout.splitlines()[-1] == "False"
