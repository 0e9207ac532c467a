"""Remote APIs: what they cannot do, what becomes of keys, and calls that are spared by speculation. Against our own server.

python -m pytest tests/test_lang_remote.py
"""

import sys
import threading

import openai as openai_library
import pytest
from server_process import Server
from test_lang import Scripted

from errors import UserError
from examples.programs.speculative import SHEET, fields, plain, speculative
from lang import OpenAI, ProgramError, RuntimeEndpoint, VertexAI, assistant, function, gen, select, user
from lang.backend import Cancel, Piece
from lang.remote import without_keys

SECRET = "sk-abcdefghijklmnop0123456789"
FIELDS = ("name", "age", "city")


@pytest.fixture
def openai(server: Server) -> OpenAI:
    return OpenAI("folio-tiny", base_url=server.url + "/v1", extras=True)


def run(program, backend, **kwargs):
    return function(program).run(backend=backend, **kwargs)


# ---- speculation


def test_three_fields_in_one_call(openai):
    before = plain.run(temperature=0, backend=openai)
    values = [before[name] for name in FIELDS]
    assert openai.token_usage.calls == 3
    openai.token_usage.reset()
    state = speculative.run(temperature=0, backend=openai)
    assert [state[name] for name in FIELDS] == values and state.text() == before.text() and all(values)
    usage = openai.token_usage
    assert (usage.calls, usage.saved_calls) == (1, 2)
    assert usage.saved_prompt_tokens == 2 * usage.prompt_tokens > 0
    assert "calls=1" in repr(usage) and "saved_calls=2" in repr(usage)
    assert state.get_meta_info("age")["speculated"] and "speculated" not in state.get_meta_info("name")


def test_a_mismatch_falls_back_and_is_still_right(openai):
    def others(s):
        s += SHEET + 'Lea is 31 years old and lives in Paris.\nJSON: {"name": "' + gen("name", max_tokens=16, stop='"')
        s += '", "hair": "' + gen("hair", max_tokens=8, stop='"') + '", "age": ' + gen("age", max_tokens=8, stop=",")

    right = run(others, openai, temperature=0)
    right.sync()
    openai.token_usage.reset()
    state = function(others, num_api_spec_tokens=48).run(temperature=0, backend=openai)
    assert state.text() == right.text() and state["hair"] == right["hair"]
    assert openai.token_usage.calls >= 2 and openai.token_usage.saved_calls <= 1


class Counting(Scripted):
    """Says a text that it knows by heart, from where the prompt ends, as far as stops and tokens (letters) let it."""

    def __init__(self, text, continues_turns=True):
        super().__init__()
        self.known, self.continues_turns = text, continues_turns

    def generate(self, prompt, params, stream, cancel):
        self.asked.append((prompt.turn or prompt.before, params))
        rest = self.known[len(prompt.turn or prompt.before) :]
        said = rest[: params["max_new_tokens"]]
        reason = "stop" if len(said) == len(rest) else "length"
        for stop in params.get("stop", ()):
            if stop in said:
                said, reason = said[: said.index(stop)], "stop"
        yield Piece(said, {"finish_reason": {"type": reason}, "completion_tokens": len(said), "prompt_tokens": 3})


@pytest.mark.parametrize(
    ("program", "calls", "saved"),
    [
        (lambda s: s.__iadd__("a" + gen("x", stop=",") + "," + gen("y", stop=",") + "," + gen("z", stop=",")), 1, 2),
        (lambda s: s.__iadd__("a" + gen("x", stop=",") + "," + gen("y", 2, stop=",")), 3, 0),  # might be too long
        (lambda s: s.__iadd__("a" + gen("x", stop=",") + "," + gen("y")), 2, 0),  # the text goes on beyond what came
        (lambda s: s.__iadd__("a" + gen("x", 1) + gen("y", stop=",")), 2, 0),
        (lambda s: s.__iadd__("a" + gen("x", stop=",") + "," + gen("y", stop=",", regex=".*")), 2, 0),
        (lambda s: s.__iadd__("a" + gen("x", stop=",") + "," + gen("y", stop=",", temperature=0.5)), 2, 0),
        (lambda s: s.__iadd__("a" + gen("x", stop=";") + gen("y", stop=";")), 4, 0),  # the stop does not come
    ],
)
def test_what_is_taken_is_what_the_plain_call_would_have_given(program, calls, saved):
    text = "abcd,efgh,ijkl,mnopqrstuvw"
    right, guess = Counting(text), Counting(text)
    expected = function(program).run(backend=right, max_new_tokens=6)
    state = function(program, num_api_spec_tokens=20).run(backend=guess, max_new_tokens=6)
    assert state.text() == expected.text()
    assert (len(guess.asked), guess.token_usage.saved_calls) == (calls, saved)


def test_in_a_chat_the_whole_turn_is_asked_for():
    def program(s):
        s += user("Who?") + assistant("Name:" + gen("name", stop="\n") + "\nAge:" + gen("age", stop="\n"))

    backend = Counting("Name: Tom\nAge: 9\nThe end", continues_turns=False)
    state = function(program, num_api_spec_tokens=99).run(backend=backend)
    assert (state["name"], state["age"], len(backend.asked)) == (" Tom", " 9", 1)
    assert state.messages()[-1]["content"] == "Name: Tom\nAge: 9"
    state = function(program, num_api_spec_tokens=99).run(backend=Counting("I am Tom", continues_turns=False))
    with pytest.raises(ProgramError, match="name: the answer should begin with 'Name:'.* 'I am Tom'"):
        state["name"]


def test_it_does_not_stream(openai):
    with pytest.raises(UserError, match="stream and num_api_spec_tokens"):
        speculative.run(backend=openai, stream=True)


# ---- what a remote API cannot do


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (lambda s: s.__iadd__("x" + gen("y", regex="a")), "regex is not to be had from OpenAI\\('gpt'\\)"),
        (lambda s: s.__iadd__("x" + gen("y", dtype=int)), "regex is not to be had"),
        (lambda s: s.__iadd__("x" + gen("y", ebnf="root ::= 'a'")), "ebnf is not"),
        (lambda s: s.__iadd__("x" + gen("y", top_k=4)), "top_k is not"),
        (lambda s: s.__iadd__("x" + select("y", ["a", "b"])), "select is not"),
    ],
)
def test_is_refused_before_anything_is_sent(program, says, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    backend = OpenAI("gpt", base_url="http://127.0.0.1:9")
    with pytest.raises(UserError, match=says):
        run(program, backend)
    assert backend.token_usage.calls == 0


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (lambda s: s.__iadd__("x" + gen("y", json_schema={})), "json_schema is not to be had in a completion"),
        (lambda s: s.__iadd__(user("x") + assistant("So" + gen("y"))), "gen must be the first thing"),
        (lambda s: s.__iadd__(user("x" + gen("y"))), "gen must be the first thing"),
    ],
)
def test_is_refused_before_the_call(program, says):
    backend = OpenAI("gpt", base_url="http://127.0.0.1:9")
    with pytest.raises(ProgramError, match=f"y: .*{says}"):
        run(program, backend)["y"]
    assert backend.token_usage.calls == 0


def test_choices_in_a_chat_are_refused(openai):
    with pytest.raises(ProgramError, match="y: select in a chat"):
        run(lambda s: s.__iadd__(user("x") + assistant(select("y", ["a", "b"]))), openai)["y"]


# ---- keys


def test_keys_come_from_the_environment_and_go_nowhere_else(monkeypatch, server):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="set OPENAI_API_KEY"):
        OpenAI("gpt")
    with pytest.raises(UserError, match="a key is given to no object"):
        OpenAI("gpt", api_key=SECRET)
    with pytest.raises(UserError, match="unexpected keyword argument 'is_chat_model'"):
        OpenAI("gpt", base_url="http://127.0.0.1:9", is_chat_model=False)
    monkeypatch.setenv("MY_KEY", SECRET)
    backend = OpenAI("gpt", base_url=server.url + "/v1", api_key_env="MY_KEY")
    endpoint = RuntimeEndpoint(server.url, api_key_env="MY_KEY")
    seen = []
    endpoint._http.event_hooks["request"] = [lambda request: seen.append(request.headers["Authorization"])]
    endpoint.get_server_info()
    assert seen == [f"Bearer {SECRET}"]
    said = repr(backend) + repr(endpoint) + repr(vars(endpoint)) + repr(vars(endpoint._http))
    assert SECRET not in said


def test_a_key_in_an_error_is_taken_out(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", SECRET)

    def refuse(**_):
        raise openai_library.OpenAIError(f"Incorrect API key provided: {SECRET}")

    backend = OpenAI("gpt", base_url="http://127.0.0.1:9", api_key_env="MY_API_KEY")
    backend._complete = refuse
    state = run(lambda s: s.__iadd__("x" + gen("y")), backend)
    with pytest.raises(ProgramError, match=r"y: OpenAIError: Incorrect API key provided: \*\*\*") as caught:
        state["y"]
    assert SECRET not in repr(caught.value.__cause__) and caught.value.__cause__.__cause__ is None
    assert without_keys("nothing") == "nothing"


def test_a_cancelled_call_is_not_made():
    cancel, ended = Cancel(), threading.Event()
    cancel()
    with pytest.raises(Exception), cancel.ends(ended.set):  # noqa: B017
        raise AssertionError("not reached")
    assert not ended.is_set()


# ---- litellm


@pytest.fixture
def litellm(server, monkeypatch):
    pytest.importorskip("litellm", reason="the extra `remote` is not installed")
    from lang import LiteLLM

    monkeypatch.setenv("OPENAI_API_KEY", "none-at-all")
    return LiteLLM("openai/folio-tiny", api_base=server.url + "/v1")


def test_litellm_says_what_the_openai_client_says(litellm, openai):
    def chat(s):
        s += user("My name is Mia.") + assistant(gen("x", max_tokens=20))

    def completion(s):
        s += "Once upon a time" + gen("x", max_tokens=12, stop=".")

    for program in (chat, completion):
        expected = run(program, openai, temperature=0)["x"]
        assert run(program, litellm, temperature=0)["x"] == expected != ""
        assert "".join(run(program, litellm, temperature=0, stream=True).text_iter("x")) == expected
    assert litellm.token_usage.calls == 4 and litellm.token_usage.completion_tokens > 0


def test_litellm_refuses_what_a_model_does_not_have(litellm, monkeypatch):
    with pytest.raises(UserError, match="regex is not to be had"):
        run(lambda s: s.__iadd__("x" + gen("y", regex="a")), litellm)
    from lang import Anthropic

    with pytest.raises(UserError, match="seed is not to be had"):
        run(lambda s: s.__iadd__(user("x") + assistant(gen("y", seed=1))), Anthropic("claude-3-haiku-20240307"))


def test_without_litellm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "litellm", None)  # an import of it fails
    with pytest.raises(UserError, match="pip install"):
        VertexAI("gemini-pro")


def test_fields_of_the_example_are_those_of_the_plain_program():
    assert plain.func is speculative.func is fields
