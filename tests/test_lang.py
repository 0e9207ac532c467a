"""The language and its interpreter, with a backend that says what it is told to; then with the bundled model.

python -m pytest tests/test_lang.py
"""

import asyncio
import itertools
import signal
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from waiting import HANG, until

from engine import Engine, SamplingParams
from errors import UserError
from lang import (
    Backend,
    Cancelled,
    EngineBackend,
    ProgramError,
    Runtime,
    assistant,
    assistant_begin,
    assistant_end,
    flush_cache,
    function,
    gen,
    gen_int,
    gen_string,
    greedy_token_selection,
    select,
    separate_reasoning,
    set_default_backend,
    system,
    token_length_normalized,
    unconditional_likelihood_normalized,
    user,
)
from lang.backend import Piece
from lang.choices import Score

TINY = Path(__file__).parent.parent / "assets" / "folio-tiny"


class Scripted(Backend):
    """Says `<n>` to its n-th request, or what `say` makes of the prompt's text; in pieces, if they are wanted."""

    def __init__(self, say=None, scores=None):
        super().__init__()
        self.say, self.scores = say, scores
        self.asked, self.count = [], itertools.count(1)

    def render(self, messages, open_assistant):
        return "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]" * open_assistant

    def generate(self, prompt, params, stream, cancel):
        self.asked.append((prompt.text, params))
        said = self.say(prompt.text) if self.say else f"<{next(self.count)}>"
        for index in range(params.get("n", 1)):
            for piece in said if stream else [said]:
                cancel.check()
                yield Piece(piece, {"finish_reason": {"type": "stop"}}, index)

    def score(self, prompt, choices, unconditional):
        return [Score(self.scores[choice], [0.0] * len(self.scores[choice])) for choice in choices]


def run(program, backend, *args, **kwargs):
    return function(program).run(*args, backend=backend, **kwargs)


# ---- texts, turns, values


def test_text_and_values():
    def program(s, what):
        s += "A " + what + ":" + gen("x", max_tokens=5) + "!"
        s += gen("y", 7, stop=".")
        assert "y" in s and "z" not in s
        s["mine"] = s["x"] + "?"
        return 5

    backend = Scripted()
    state = run(program, backend, "dog", temperature=0, stop=["\n"])
    assert (state["x"], state["y"], state["mine"], state.ret_value) == ("<1>", "<2>", "<1>?", 5)
    assert state.text() == "A dog:<1>!<2>" and state.error() is None
    assert backend.asked == [
        ("A dog:", {"max_new_tokens": 5, "temperature": 0, "stop": ["\n"]}),
        ("A dog:<1>!", {"max_new_tokens": 7, "temperature": 0, "stop": ["."]}),
    ]
    assert state.get_meta_info("x") == {"finish_reason": {"type": "stop"}}
    with pytest.raises(KeyError, match="no variable 'z'"):
        state["z"]


def test_turns_as_functions_blocks_and_borders_are_the_same():
    def functions(s):
        s += system("Be brief.") + user("Hi") + assistant("I say " + gen("x"))

    def blocks(s):
        with s.system():
            s += "Be brief."
        with s.user():
            s += "Hi"
        with s.assistant():
            s += "I say "
            s += gen("x")

    def methods(s):
        s.system("Be brief.")
        s.user("Hi")
        s.assistant("I say " + gen("x"))

    def borders(s):
        s += system("Be brief.") + user("Hi") + assistant_begin() + "I say "
        s += gen("x")
        s += assistant_end()

    for program in (functions, blocks, methods, borders):
        backend = Scripted()
        state = run(program, backend)
        assert state.text() == "[system]Be brief.[user]Hi[assistant]I say <1>"
        assert backend.asked[0][0] == "[system]Be brief.[user]Hi[assistant]I say "
        assert [m["role"] for m in state.messages()] == ["system", "user", "assistant"]
        assert state.messages()[2]["content"] == "I say <1>"


def test_the_assistant_may_begin(engine):
    def program(s):
        s += assistant("I need a " + gen("x", max_tokens=2) + select("y", ["spoon", "fork"]))

    state = run(program, engine, temperature=0)
    assert state.text() == engine.tokenizer.render_chat(state.messages(), add_generation_prompt=False)
    assert state.messages() == [{"role": "assistant", "content": "I need a " + state["x"] + state["y"]}]


def test_generation_inside_of_a_users_turn_and_text_between_chats():
    backend = Scripted()

    def program(s):
        s += "Log:\n"
        s += user("I am " + gen("who") + ".")
        s += "\n--\n"
        s += user("You?")

    assert run(program, backend).text() == "Log:\n[user]I am <1>.\n--\n[user]You?"
    assert backend.asked[0][0] == "Log:\n[user]I am "


def test_scopes_samples_and_types():
    def program(s):
        with s.var_scope("both"):
            s += "a" + gen("x")
        s += gen("many", n=2)

    said = iter(["b", "cc"])
    state = run(program, Scripted(lambda _: next(said)))
    assert state["both"] == "ab" and state["many"] == ["cc", "cc"]
    assert state.text() == "abcc" and str(state) == "ProgramState(abcc)"
    assert gen_int("n", stop="!").params["stop"] == ["!", " ", "\n"]
    assert gen_string("n").params == {"regex": r'"[^"\\\n]*"'}
    assert gen("n", logprobs=3).params == {"return_logprob": True, "top_logprobs_num": 3}


@pytest.mark.parametrize("wrapped", ["the generation", "its turn"])
def test_a_thought_is_no_part_of_the_text(wrapped):
    def program(s):
        s += user("Hi")
        if wrapped == "its turn":
            s += separate_reasoning(assistant("So: " + gen("x")), "qwen3")
        else:
            s += assistant("So: " + separate_reasoning(gen("x"), model_type="qwen3"))
        s += user("Bye")

    backend = Scripted(lambda _: "<think>hm, hm</think>\n\nyes")
    state = run(program, backend)
    assert (state["x"], state["x_reasoning_content"]) == ("yes", "hm, hm")
    assert state.text() == "[user]Hi[assistant]So: yes[user]Bye"
    assert state.messages()[1] == {"role": "assistant", "content": "So: yes"}
    for name, text in ((None, state.text()), ("x", "yes"), ("x_reasoning_content", "hm, hm")):
        assert "".join(run(program, backend, stream=True).text_iter(name)) == text
    assert separate_reasoning(gen("y"), "deepseek-r1") == separate_reasoning(gen("y"), "deepseek_r1")


def test_thoughts_of_many_samples_and_of_a_prompt_that_begins_one():
    def program(s):
        s += "<think>\n" + separate_reasoning(gen("x", n=2), "qwen3") + separate_reasoning(gen("y"), "qwen3")

    said = iter(["hm</think>yes", "no thought"])
    state = run(program, Scripted(lambda _: next(said)))
    assert state["x"] == ["yes", "yes"] and state["x_reasoning_content"] == ["hm", "hm"]
    assert (state["y"], state["y_reasoning_content"]) == ("no thought", "")


def test_a_program_within_a_program_and_bound_arguments():
    @function
    def inner(s, a, b):
        s += a + b + gen("x")

    @function
    def outer(s):
        inner(s, "1", b="2")
        s += s["x"]

    assert outer.run(backend=Scripted()).text() == "12<1><1>"
    assert inner.bind(b="9").run("8", backend=Scripted()).text() == "89<1>"
    assert inner("8", "9", backend=Scripted()).text() == "89<1>"


def test_an_argument_of_the_program_wins_over_a_parameter():
    backend = Scripted()
    run(lambda s, n: s.__iadd__("x" * n + gen("y")), backend, n=3, top_k=-1).sync()
    assert backend.asked == [("xxx", {"max_new_tokens": 128, "top_k": 0})]


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (lambda s: s.__iadd__(5), "5 is neither"),
        (lambda s: s.__iadd__(gen("x", max_toks=3)), "max_toks is not a parameter"),
        (lambda s: s.__iadd__(gen("x", regex="(")), "regex: "),
        (lambda s: s.__iadd__(gen("x", dtype=list)), "dtype is"),
        (lambda s: s.__iadd__(gen("x", dtype=int, regex="a")), "dtype and regex"),
        (lambda s: s.__iadd__(select("x", [])), "choices is"),
        (lambda s: s.__iadd__(select("x", ["a"], temperature=1)), "temperature is 1"),
        (lambda s: s.__iadd__(select("x", ["a"], choices_method="greedy")), "choices_method is 'greedy'"),
        (lambda s: s.__iadd__(gen("x", stop=5)), "stop is 5"),
        (lambda s: s.__iadd__(gen("x", choices=["a"], regex="a")), "regex and choices"),
        (lambda s: s.__iadd__(gen("x", choices=["a"], dtype=int)), "dtype and choices"),
        (lambda s: s.__iadd__(gen("x", choices=["a"], temperature=1)), "temperature is 1"),
        (lambda s: s.fork(0), "the size is 0"),
        (lambda s: s.fork(2).__iadd__(["a"]), "1 parts for 2 branches"),
        (lambda s: s.fork(2).join("both"), "mode is 'both'"),
        (lambda s: s.__iadd__(separate_reasoning(gen("x"), "gpt")), "model_type is 'gpt'"),
    ],
)
def test_what_is_wrong_is_named(program, says):
    with pytest.raises(UserError, match=says):
        run(program, Scripted())


def test_arguments_and_backends_that_are_wrong():
    program = function(lambda s, a: None)
    for kwargs, says in (({}, "missing a required"), ({"a": 1, "b": 2}, "b is not a parameter of run")):
        with pytest.raises(UserError, match=says):
            program.run(backend=Scripted(), **kwargs)
    with pytest.raises(UserError, match="no argument"):
        program.bind(c=1)
    with pytest.raises(UserError, match="there is no backend"):
        program.run(1)
    with pytest.raises(UserError, match="neither"):
        program.run_batch(["ab"], backend=Scripted())
    with pytest.raises(UserError, match="backend is 'gpt'"):
        program.run(1, backend="gpt")
    for tokens in (0, "many"):
        with pytest.raises(UserError, match=f"num_api_spec_tokens is {tokens!r}"):
            function(num_api_spec_tokens=tokens)(lambda s: None)
    set_default_backend(Scripted())
    try:
        assert program.run(1).text() == ""
    finally:
        set_default_backend(None)


# ---- in the background


def test_python_goes_on_until_a_value_is_needed():
    may_answer = threading.Event()

    def say(_):
        assert may_answer.wait(HANG)
        return "late"

    def program(s):
        s += gen("x") + "."
        may_answer.set()
        return s["x"]

    state = run(program, Scripted(say))
    assert state.ret_value == "late" and state.text() == "late."


def test_branches_run_at_the_same_time():
    together = threading.Barrier(3)

    def say(text):
        together.wait(HANG)  # breaks, unless all three are here
        return text[-1] * 2

    def program(s):
        s += "go "
        forks = s.fork(3)
        forks += ["a", "b", "c"]
        forks += gen("x")
        forks[1] += "!"
        assert forks[1].text() == "go bbb!"
        forks.join()
        assert s["x"] == ["aa", "bb", "cc"]
        s += "".join(s["x"])

    assert run(program, Scripted(say)).text() == "go aabbcc"


def test_a_fork_takes_its_place_behind_what_came_before():
    may_answer = threading.Event()

    def say(text):
        assert text or may_answer.wait(HANG)
        return f"({len(text)})"

    def program(s):
        s += gen("first")
        forks = s.fork(2)
        forks += lambda i: f"{i}" + gen("second")
        s += " end"
        forks.join("concate_and_append")
        may_answer.set()

    state = run(program, Scripted(say))
    assert state.text() == "(0) end0(4)1(4)" and state["first"] == "(0)"


def test_what_fails_in_a_branch_reaches_the_caller_with_its_name():
    def say(text):
        if text.endswith("1"):
            raise RuntimeError("no such luck")
        return "fine"

    def branches(s):
        forks = s.fork(3)
        forks += lambda i: f"{i}" + gen("tip")
        return forks

    def asked(s):
        assert branches(s)[0]["tip"] == "fine"
        with pytest.raises(ProgramError, match="tip: no such luck") as caught:
            branches(s)[1]["tip"]
        assert caught.value.name == "tip" and isinstance(caught.value.__cause__, RuntimeError)

    assert run(asked, Scripted(say)).error().name == "tip"  # nobody has asked for it on behalf of the whole
    for mode in ("gather_variable", "concate_and_append"):
        state = run(lambda s, mode=mode: branches(s).join(mode), Scripted(say))
        with pytest.raises(ProgramError, match="tip: no such luck"):
            state.text()


def test_what_waits_for_something_that_has_failed_is_told():
    may_fail = threading.Event()

    def say(_):
        assert may_fail.wait(HANG)
        raise RuntimeError("broken")

    def program(s):
        s += "bad" + gen("a") + gen("b")
        forks = s.fork(2)
        forks += gen("c")
        forks.join()
        may_fail.set()

    state = run(program, Scripted(say))
    for name in "abc":
        with pytest.raises(ProgramError, match="a: broken"):
            state[name]
    with pytest.raises(ProgramError, match="a: broken"):
        state += "more"
    assert list(run(lambda s: None, Scripted()).text_iter()) == []
    with pytest.raises(ProgramError, match="the program: a turn of the user begins"):
        run(lambda s: s.__iadd__(user(user("x"))), Scripted()).text()


def test_an_error_of_the_program_itself_is_raised():
    def program(s):
        s += gen("x")
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError):
        run(program, Scripted())
    with pytest.raises(ProgramError, match="mine"):
        list(run(program, Scripted(), stream=True).text_iter())


# ---- streams, asyncio


def two(s):
    s += user("?")
    s += assistant("So: " + gen("x"))
    s += assistant(gen("y"))


def test_streams_of_text_and_of_a_variable():
    say = lambda text: "again" if "So" in text[:-5] else "hello"  # noqa: E731
    pieces = list(run(two, Scripted(say), stream=True).text_iter())
    assert "".join(pieces) == run(two, Scripted(say)).text() == "[user]?[assistant]So: hello[assistant]again"
    assert "".join(run(two, Scripted(say), stream=True).text_iter("y")) == "again"
    assert list(run(two, Scripted(say)).text_iter("y")) == ["again"]
    with pytest.raises(KeyError):
        list(run(two, Scripted(say), stream=True).text_iter("z"))


def test_a_stream_comes_before_its_end():
    read = threading.Event()

    class Slow(Scripted):
        def generate(self, prompt, params, stream, cancel):
            yield Piece("a", {"n": 1})
            assert read.wait(HANG)
            yield Piece("b", {"n": 2})

    async def all_of_it():
        state = run(two, Slow(), stream=True)
        got = []
        async for piece, meta in state.text_async_iter("x", return_meta_data=True):
            got.append((piece, meta["n"]))
            read.set()
        return got

    assert asyncio.run(all_of_it()) == [("a", 1), ("b", 2)]


def test_the_asynchronous_twins():
    program = function(two)

    async def both():
        one = await program.run_async(backend=Scripted())
        many = await program.run_batch_async([{}, []], backend=Scripted())
        return one, many

    one, many = asyncio.run(both())
    assert one["x"] == "<1>" and len(many) == 2 and all(state.error() is None for state in many)


def test_a_task_that_is_cancelled_ends_what_runs():
    began, ended = threading.Event(), threading.Event()

    class Endless(Scripted):
        def generate(self, prompt, params, stream, cancel):
            with cancel.ends(ended.set):
                began.set()
                assert ended.wait(HANG)
            yield Piece("never", {})

    async def leave(start):
        began.clear(), ended.clear()
        task = asyncio.create_task(start())
        await asyncio.to_thread(began.wait, HANG)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(ended.wait, HANG)

    program = function(two)
    asyncio.run(leave(lambda: program.run_async(backend=Endless())))
    asyncio.run(leave(lambda: program.run_batch_async([{}], backend=Endless())))
    for inside in (lambda s: program(backend=Endless())["x"], lambda s: program.run_batch([{}], backend=Endless())):
        asyncio.run(leave(lambda: function(inside).run_async(backend=Scripted())))  # noqa: B023
        asyncio.run(leave(lambda: function(inside).run_batch_async([{}], backend=Scripted())))  # noqa: B023


# ---- many


def test_a_thousand_programs_with_failing_and_slow_ones(capsys):
    slow = threading.Event()

    def say(text):
        number = int(text)
        if number % 100 == 7:
            raise RuntimeError(f"{number} is bad")
        if number == 500:
            slow.set()
        if number == 3:
            assert slow.wait(HANG)
        return str(-number)

    def program(s, number):
        if number % 100 == 13:
            raise ZeroDivisionError(number)
        s += f"{number}" + gen("x")

    states = function(program).run_batch(
        [{"number": i} for i in range(1000)], backend=Scripted(say), num_threads=8, progress_bar=True
    )
    for i, state in enumerate(states):
        if i % 100 in (7, 13):
            cause = state.error().__cause__
            assert str(cause) == (f"{i} is bad" if i % 100 == 7 else f"{i}")
        else:
            assert state["x"] == str(-i)
    assert "1000/1000" in capsys.readouterr().err
    assert function(program).run_batch([], backend=Scripted()) == []


def test_generator_style_gives_each_as_it_comes():
    first_read = threading.Event()

    def say(text):
        assert text != "1" or first_read.wait(HANG)
        return "x"

    program = function(lambda s, n: s.__iadd__(f"{n}" + gen("x")))
    states = program.run_batch([(i,) for i in range(3)], backend=Scripted(say), generator_style=True)
    assert next(states).text() == "0x"
    first_read.set()
    assert [state.text() for state in states] == ["1x", "2x"]


@pytest.mark.parametrize("slowly", [False, True], ids=["quick", "a program that cannot be stopped"])
def test_ctrl_c_ends_a_batch_and_gives_all_pages_back(slowly):
    engine = Engine.from_pretrained(TINY, dtype="float32", max_batch_size=4)
    running, never, waited = threading.Event(), threading.Event(), []

    def program(s):
        s += "Once upon a time" + gen("x", max_tokens=1500, ignore_eos=True)
        running.set()
        if slowly:
            waited.append(never.wait(HANG))
        s["x"]

    def interrupt():
        assert running.wait(HANG)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        function(program).run_batch([{}] * 30, backend=engine)
    never.set()
    assert all(waited)  # the batch has not waited until they gave up
    until(lambda: not engine.has_work)
    engine.check()
    assert engine.stats().pages_locked == 0 and engine.steps < 1500


# ---- choices


def test_three_ways_to_choose():
    a, b, c = (
        Score([(-1.0, 1, "a")], [-3.0]),
        Score([(-0.5, 2, "b"), (-2.5, 3, "b")], [0.0, -9.0]),
        Score([(-0.5, 4, "c")], [0.0]),
    )
    assert token_length_normalized([a, b, c]) == [[-1.0], [-1.5], [-0.5]]
    assert greedy_token_selection([a, b, c]) == [[-1.0, -1.0], [-0.5, -2.5], [-0.5, -0.5]]
    assert unconditional_likelihood_normalized([a, b, c]) == [[2.0], [3.0], [-0.5]]
    scores = {"a": a.tokens, "b": b.tokens, "c": c.tokens}
    state = run(lambda s: s.__iadd__("I say " + gen("x", choices=["a", "b", "c"])), Scripted(scores=scores))
    assert state["x"] == "c" and state.text() == "I say c"
    info = state.get_meta_info("x")
    assert info["input_token_logprobs"][1] == b.tokens and info["normalized_prompt_logprobs"] == [-1.0, -1.5, -0.5]


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(TINY, dtype="float32", page_size=4)


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def logprobs_of(reference, ids):
    with torch.inference_mode():
        rows = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(rows[i, id]) for i, id in enumerate(ids[1:])]


@pytest.mark.parametrize("prompt", ["Once upon a time there was a", "The little dog was very", "In the house of my"])
def test_scores_are_those_of_transformers(engine, reference, prompt):
    choices = [" dog", " happy little girl named Mia", "nother", "!"]

    def program(s, method):
        s += prompt + select("x", choices, choices_method=method)

    encode = engine.tokenizer.encode
    for method in (token_length_normalized, greedy_token_selection, unconditional_likelihood_normalized):
        info = run(program, engine, method).get_meta_info("x")
        for choice, tokens, alone in zip(
            choices, info["input_token_logprobs"], info["unconditional_token_logprobs"], strict=True
        ):
            ids = encode(prompt + choice)
            assert [id for _, id, _ in tokens] == ids[-len(tokens) :]
            assert "".join(text for *_, text in tokens).endswith(choice)
            assert [p for p, *_ in tokens] == pytest.approx(logprobs_of(reference, ids)[-len(tokens) :], abs=1e-4)
            if method is unconditional_likelihood_normalized:
                assert alone == pytest.approx([0.0, *logprobs_of(reference, ids[-len(tokens) :])], abs=1e-4)
    engine.check()


def test_a_choice_computes_the_prompt_once(engine):
    engine.flush_cache()
    before = engine.stats()
    prompt = "Once upon a time there was a little dog who lived in a house near the forest. " * 3
    run(lambda s: s.__iadd__(prompt + select("x", [" He", " She", " It", " They"])), engine).text()
    after = engine.stats()
    computed = (after.prompt_tokens - before.prompt_tokens) - (after.cached_tokens - before.cached_tokens)
    assert computed < 2 * len(engine.tokenizer.encode(prompt))


# ---- the engine as a backend


def test_the_engine_says_what_it_says_to_anybody(engine):
    greedy = SamplingParams(temperature=0, max_new_tokens=12)
    plain = engine.generate("Once upon a time", greedy)[0].outputs[0]
    asked = gen("x", 12, logprobs=2, return_text_in_logprobs=True)
    state = run(lambda s: s.__iadd__("Once upon a time" + asked), engine, temperature=0)
    assert state["x"] == plain.text
    info = state.get_meta_info("x")
    assert [id for _, id, _ in info["output_token_logprobs"]] == info["output_ids"] == plain.token_ids
    assert "".join(text for *_, text in info["output_token_logprobs"]) == plain.text
    assert len(info["output_top_logprobs"]) == 12 and len(info["output_top_logprobs"][0]) == 2
    assert (info["finish_reason"]["type"], info["completion_tokens"]) == ("length", 12)
    prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": "My name is Mia."}])
    chat = engine.generate([prompt], greedy)[0].outputs[0].text
    for stream in (False, True):
        state = run(
            lambda s: s.__iadd__(user("My name is Mia.") + assistant(gen("x", 12))),
            engine,
            temperature=0,
            stream=stream,
        )
        assert "".join(state.text_iter("x")) == chat
        assert state.messages()[-1] == {"role": "assistant", "content": chat}


def test_no_token_tells_what_might_come_and_says_nothing(engine):
    """As CoT decoding (Wang and Zhou, 2024) begins: a branch for each of the likeliest first tokens."""

    def program(s, spec=None):
        s += "Once upon a" + gen("x", max_tokens=0, logprobs=3, return_text_in_logprobs=True)
        s += gen("y", max_tokens=4)

    plain = run(lambda s: s.__iadd__("Once upon a" + gen("y", max_tokens=4)), engine, temperature=0)
    for how in ({}, {"num_api_spec_tokens": 8}):
        state = function(program, **how).run(backend=engine, temperature=0)
        assert (state["x"], state.text()) == ("", plain.text())
        [top] = state.get_meta_info("x")["output_top_logprobs"]
        assert len(top) == 3 and top[0][2] == " time" and top[0][0] > top[1][0] > top[2][0]
    branch = run(lambda s: s.__iadd__("Once upon a" + top[1][2] + gen("y", max_tokens=4)), engine, temperature=0)
    assert branch.text() != plain.text()


def test_an_engine_under_the_name_that_sglang_has_for_it():
    runtime = Runtime(model_path=TINY, dtype="float32", max_batch_size=2)
    begin = "Once upon a time, there was a little girl named Lily. She loved to play with her"
    story = function(lambda s: s.__iadd__(begin + gen("x", max_tokens=4)))

    def cached() -> int:
        return story.run(temperature=0).get_meta_info("x")["cached_tokens"]

    set_default_backend(runtime)
    try:
        assert (cached(), cached()) == (0, 16)
        flush_cache()
        assert cached() == 0
    finally:
        set_default_backend(None)
    runtime.shutdown()
    assert runtime.engine.stats().pages_held == 0
    with pytest.raises(UserError, match="has no cache"):
        flush_cache(Scripted())


def test_the_engine_refuses_by_name(engine):
    with pytest.raises(UserError, match="temperature is -1"):
        run(lambda s: s.__iadd__("x" + gen("y", temperature=-1)), engine)
    state = run(lambda s: s.__iadd__("x" + gen("y", max_tokens=5000)), engine)
    with pytest.raises(ProgramError, match="y: .* exceed the context"):
        state["y"]
    state = run(lambda s: s.__iadd__(gen("y")), engine)
    with pytest.raises(ProgramError, match="y: the text is empty"):
        state.text()


def test_what_a_batch_begins_with_is_held_while_it_runs(engine):
    engine.flush_cache()
    held = []

    @function
    def story(s, hero):
        s += "This is a story about somebody who lives in a little house near the forest. The hero is a "
        s += hero
        s += gen("x", max_tokens=2)
        s["x"]
        held.append(engine.stats().pages_locked)

    states = story.run_batch([{"hero": hero} for hero in ("dog", "fox", "cat")], backend=engine, num_threads=1)
    assert min(held) >= 4 and engine.stats().pages_locked == 0
    assert states[0].get_meta_info("x")["cached_tokens"] >= 16
    engine.check()


def test_a_batch_whose_beginning_cannot_be_held_keeps_all_in_their_places(engine):
    def too_long(s, x):
        s += "a" * 3000 + x + gen("z", max_tokens=3)

    def turn_in_a_turn(s, x):
        s += user("a" + assistant(x))

    for program, says in ((too_long, "z: the prompt has 3001 tokens"), (turn_in_a_turn, "inside of one of the user")):
        states = function(program).run_batch([{"x": "1"}, {"x": "2"}], backend=engine)
        assert [says in str(state.error()) for state in states] == [True, True]
    engine.check()


def test_cancelled_before_it_begins():
    backend = EngineBackend(Engine.from_pretrained(TINY, dtype="float32"))
    state = function(lambda s: None).run(backend=backend)
    state.run.cancel()
    state += "x" + gen("y")
    with pytest.raises(ProgramError) as caught:
        state["y"]
    assert isinstance(caught.value.__cause__, Cancelled)
