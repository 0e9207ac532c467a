"""The programs in examples/programs say the same through an engine, a server's native API, and the OpenAI client.

python -m pytest tests/test_lang_examples.py
"""

import asyncio
import re
from importlib import import_module
from pathlib import Path

import httpx
import pytest
from server_process import MODEL, Server
from waiting import until

from engine import Engine
from errors import UserError
from examples.programs import chat, extraction, few_shot, self_consistency, streaming
from lang import (
    BackendError,
    OpenAI,
    ProgramError,
    RuntimeEndpoint,
    assistant,
    function,
    gen,
    select,
    set_default_backend,
    user,
)
from lang import unconditional_likelihood_normalized as unconditional

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(path.stem for path in (ROOT / "examples" / "programs").glob("[a-z]*.py"))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(MODEL, dtype="float32")


@pytest.fixture(scope="module")
def endpoint(server: Server) -> RuntimeEndpoint:
    return RuntimeEndpoint(server.url)


@pytest.fixture(scope="module")
def openai(server: Server) -> OpenAI:
    return OpenAI("folio-tiny", base_url=server.url + "/v1", extras=True)


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "speculative"])
def test_the_same_result_on_every_backend(name, engine, endpoint, openai):
    program = import_module(f"examples.programs.{name}")
    result = program.main(engine)
    assert result and program.main(endpoint) == result and program.main(openai) == result
    engine.check()


def test_what_the_examples_say(engine):
    assert set(few_shot.main(engine)) <= {" happy", " sad"}
    assert extraction.main(engine)[0] == {"name": "Mia", "age": 7, "city": "Oslo"}
    assert chat.main(engine)[-1] == {"role": "assistant", "content": "Your name is Mia."}
    answer, answers = self_consistency.main(engine)
    assert answer == "85" and len(answers) == 8


def test_a_stream_comes_in_pieces(engine, endpoint, openai):
    for backend in (engine, endpoint, openai):
        assert len(list(streaming.pieces(backend))) > 5

    async def text(backend):
        state = streaming.talk.run(stream=True, backend=backend)
        return "".join([piece async for piece in state.text_async_iter("story")])

    assert asyncio.run(text(endpoint)) == asyncio.run(text(openai)) == streaming.main(engine)


def test_scores_are_the_same(engine, endpoint, openai):
    @function
    def program(s, method):
        s += "Once upon a time there was a" + select("x", [" dog", " little girl", "nother"], choices_method=method)

    default = program.bind(method=lambda scores: [[sum(score.logprobs)] for score in scores])
    scores = [default.run(backend=backend).get_meta_info("x")["scores"] for backend in (engine, endpoint, openai)]
    here, *others = [[score for [score] in each] for each in scores]
    assert all(there == pytest.approx(here, abs=1e-4) for there in others)
    here, there = (program.run(unconditional, backend=b).get_meta_info("x")["scores"] for b in (engine, endpoint))
    assert [x for [x] in there] == pytest.approx([x for [x] in here], abs=1e-4)


def test_logprobs_and_samples_over_http(engine, endpoint):
    @function
    def program(s):
        s += "Once upon a time" + gen("x", max_tokens=4, logprobs=2, return_text_in_logprobs=True)
        s += gen("y", max_tokens=4, n=3, temperature=0.9, seed=5)

    here, there = (program.run(temperature=0, backend=backend) for backend in (engine, endpoint))
    assert here["y"] == there["y"] and len(set(here["y"])) > 1
    mine, theirs = (state.get_meta_info("x") for state in (here, there))
    for name in ("output_token_logprobs", "output_top_logprobs"):
        assert len(mine[name]) == len(theirs[name]) == 4
    assert [list(x)[1:] for x in mine["output_token_logprobs"]] == [x[1:] for x in theirs["output_token_logprobs"]]


def test_what_a_server_refuses_is_told(endpoint, openai, server):
    endpoint.flush_cache()
    assert endpoint.get_server_info()["page_size"] and endpoint.model_info["served_model_name"] == "folio-tiny"
    for backend in (endpoint, openai):
        state = function(lambda s: s.__iadd__("x" + gen("y", max_tokens=9999))).run(backend=backend)
        with pytest.raises(ProgramError, match="y: .*exceed"):
            state["y"]
        state = function(lambda s: s.__iadd__("x" + gen("y", max_tokens=9999))).run(backend=backend, stream=True)
        with pytest.raises(ProgramError, match="y: .*exceed"):
            list(state.text_iter())
    with pytest.raises(BackendError, match="http://127.0.0.1:9/get_model_info: ConnectError"):
        RuntimeEndpoint("http://127.0.0.1:9")
    with pytest.raises(BackendError, match="404"):
        RuntimeEndpoint(server.url + "/nowhere")


def test_a_batch_that_is_left_ends_on_the_server(endpoint, server):
    @function
    def program(s, i):
        s += "Once upon a time" + gen("x", max_tokens=[4, 1500][i], ignore_eos=True)

    def aborted() -> float:
        said = httpx.get(server.url + "/metrics").text
        return float(re.search(r"^folio:num_aborted_requests_total(?:\{.*?\})? ([\d.e+]+)", said, re.MULTILINE)[1])

    before = aborted()
    states = program.run_batch([(0,), (1,)], backend=endpoint, generator_style=True)
    assert next(states)["x"]
    states.close()
    until(lambda: aborted() == before + 1)


def test_what_needs_a_template(server, tmp_path):
    endpoint = RuntimeEndpoint(server.url)
    endpoint._tokenizer = None
    with pytest.raises(ProgramError, match="tokenizer=FOLDER"):
        function(lambda s: s.__iadd__(user("x") + assistant(gen("y")))).run(backend=endpoint)["y"]
    with pytest.raises(UserError, match="is not a folder"):
        RuntimeEndpoint(server.url, tokenizer=tmp_path / "none")


def test_each_example_is_short_and_says_how_it_is_run():
    assert len(PROGRAMS) == 9
    for name in PROGRAMS:
        text = (ROOT / "examples" / "programs" / f"{name}.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) < 50 and re.search(rf"python -m examples.programs.{name}\b", text)


@pytest.mark.parametrize("page", ["docs/lang.md", "README.md"])
def test_what_the_pages_show_runs(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text(encoding="utf-8").partition("## Programs\n")
    blocks = re.findall(r"```python\n(.*?)```", text[2] or text[0], flags=re.DOTALL)
    names: dict = {}
    try:
        for block in blocks if page == "docs/lang.md" else blocks[:1]:
            exec(compile(block, page, "exec"), names)
    finally:
        set_default_backend(None)
    said = capsys.readouterr().out
    assert ("85" in said and "In short: " in said and "%0 = user_begin" in said) or len(names["state"]["answer"]) == 4
