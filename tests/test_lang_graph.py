"""Traces of programs: what they look like, and that a run of the graph says what the program says.

python -m pytest tests/test_lang_graph.py
"""

import threading

import pytest
from test_lang import Scripted
from waiting import HANG

from errors import UserError
from lang import assistant, function, gen, select, set_default_backend, system, user
from lang.graph import constant_prefix


@function
def judge(s, essay, strict="very"):
    s += system(f"You are {strict} strict.")
    s += user("The essay: " + essay)
    s += assistant(gen("summary", stop="\n"))
    forks = s.fork(2)
    for i, fork in enumerate(forks):
        fork += user(f"Point {i} of '{s['summary']}'?")
        fork += assistant(gen("view", max_tokens=8))
    s += user("So " + forks[0]["view"] + f" and {forks[1]['view']}?") + assistant(select("verdict", ["good", "bad"]))


SCORES = {"good": [(-1.0, 1, "")], "bad": [(-2.0, 1, "")]}


def lengths(text: str) -> str:
    return f"<{len(text)}>"


def test_what_it_looks_like():
    lines = str(judge.trace()).splitlines()
    assert lines[:4] == [
        "%0 = system_begin",
        "%1 = %0 + 'You are very strict.'",
        "%2 = %1 + system_end",
        "%3 = %2 + user_begin",
    ]
    assert "%5 = %4 + the argument 'essay'" in lines
    fork = next(i for i, line in enumerate(lines) if "fork(2)" in line)
    first, second, _ = (i for i, line in enumerate(lines) if line.startswith(f"%{i} = %{fork} + user_begin"))
    gens = [i for i, line in enumerate(lines) if "gen('view')" in line]
    assert first < gens[0] < second < gens[1]
    last = lines.index(next(line for line in lines if "select(" in line))
    assert [f"needs %{gens[0]}" in line for line in lines].count(True) == 1
    assert sum("needs" in line for line in lines) == 4 and last == len(lines) - 2


def test_it_can_be_drawn():
    graph = judge.trace(essay='a "good" one')
    dot, mermaid = graph.dot(), graph.mermaid()
    assert dot.startswith("digraph program {") and dot.endswith("}") and mermaid.startswith("flowchart TD")
    assert dot.count("style=dashed") == mermaid.count("-.->") == 4
    assert dot.count(" -> ") == mermaid.count("-->") + mermaid.count("-.->") == len(graph.steps) - 1 + 4
    assert '\\"good\\"' in dot and "#quot;good#quot;" in mermaid


def test_a_run_of_the_graph_says_what_the_program_says():
    backend = Scripted(lengths, SCORES)
    plain = judge.run("Dogs are nice.", backend=backend)
    for graph, arguments in ((judge.trace(), {"essay": "Dogs are nice."}), (judge.trace(essay="Dogs are nice."), {})):
        state = graph.run(backend=backend, **arguments)
        assert state.text() == plain.text() and state.messages() == plain.messages() and state["verdict"] == "good"
    with pytest.raises(UserError, match="missing a required"):
        judge.trace().run(backend=backend)


def test_gathered_and_concatenated_branches():
    @function
    def program(s, a):
        s += f"{a}:"
        forks = s.fork(2)
        forks += gen("x")
        forks.join()
        s += s["x"][0] + " and " + s["x"][1]
        more = s.fork(2)
        more += ["!", "?"]
        more.join("concate_and_append")

    plain = program.run("go", backend=Scripted(lengths))
    state = program.trace().run(a="go", backend=Scripted(lengths))
    assert state.text() == plain.text() == "go:<3> and <3>!?" and state["x"] == ["<3>", "<3>"]


@function
def expand(s, tip):
    s += "More of" + tip + ":" + gen("more", stop=".")


@function
def tips(s, topic):
    s += "Tips for " + topic + gen("tip")
    one, two = expand(tip=s["tip"], temperature=0.5), expand(f"[{topic}]")
    s += one["more"] + " and " + two["more"]


def test_a_program_that_calls_another_one():
    backend, graph = Scripted(lengths), tips.trace()
    set_default_backend(backend)  # which is where a program runs that is called without one
    try:
        plain, asked = tips.run("dogs"), sorted(backend.asked)
        backend.asked.clear()
        state = graph.run(topic="dogs")
        assert state.text() == plain.text() == "Tips for dogs<13><12> and <14>" and sorted(backend.asked) == asked
        assert [s.text() for s in graph.run_batch([{"topic": "dogs"}] * 2)] == [plain.text()] * 2
    finally:
        set_default_backend(None)
    lines = str(graph).splitlines()
    call = lines.index(next(line for line in lines if line.endswith("= expand()")))
    assert lines[call + 1] == f"%{call + 1} = %{call} + 'More of'" and lines[call + 2].endswith("s['tip']  needs %2")


def test_a_batch_does_not_run_what_its_program_calls_to_see_how_it_begins():
    @function
    def program(s, topic):
        s += "Once upon a time" + expand(topic, backend=backend)["more"]

    backend = Scripted(lengths)
    states = program.run_batch([{"topic": "dogs"}, {"topic": "cats"}], backend=backend)
    assert [state.text() for state in states] == ["Once upon a time<12>"] * 2
    assert sorted(text for text, _ in backend.asked) == ["More ofcats:", "More ofdogs:"]


@pytest.mark.parametrize(
    "call", [lambda: expand("x", stream=True), lambda: expand.run_batch([["x"]], backend=Scripted())]
)
def test_a_stream_or_a_batch_inside_has_no_graph(call):
    with pytest.raises(UserError, match="no one graph"):
        function(lambda s: call()).trace()


def test_what_is_ready_does_not_wait_for_what_stands_before_it():
    second = threading.Event()

    def say(text):
        if text == "b":
            second.set()
        else:
            assert second.wait(HANG)  # the interpreter would ask for "b" only when this has been said
        return text * 2

    @function
    def program(s):
        a, b = s.fork(2)
        a += "a" + gen("x")
        s += a["x"]
        b += "b" + gen("y")
        s += b["y"]

    assert program.trace().run(backend=Scripted(say)).text() == "aabb"


def test_a_failure_in_the_graph_has_its_name():
    def say(text):
        if text.startswith("b"):
            raise RuntimeError("bad")
        return "x"

    @function
    def program(s):
        a, b = s.fork(2)
        a += "a" + gen("x")
        b += "b" + gen("y")
        s += a["x"] + b["y"]

    with pytest.raises(Exception, match="y: bad"):
        program.trace().run(backend=Scripted(say)).text()


@pytest.mark.parametrize(
    "program",
    [
        lambda s, a: s.__iadd__("x" if a else "y"),
        lambda s, a: s.__iadd__("x" + gen("y")) and s["y"] == "z",
        lambda s, a: a + 1,
        lambda s, a: [s.__iadd__(c) for c in a],
        lambda s, a: s.__iadd__(a.strip()),
        lambda s, a: s.__iadd__(f"{a:>5}"),
        lambda s, a: s.text(),
    ],
)
def test_a_program_that_looks_at_values_has_no_graph(program):
    with pytest.raises(UserError, match="one graph|is neither"):
        function(program).trace()


def test_the_constant_beginning():
    called = []

    def program(s, name):
        s += "Once upon a time there was "
        s += "a " + name
        called.append(name)
        s += gen("x")
        called.append("never")

    backend = Scripted()
    assert constant_prefix(function(program), backend).text == "Once upon a time there was a "
    assert constant_prefix(function(program).bind(name="dog"), backend).text == "Once upon a time there was a dog"
    assert "never" not in called
    assert constant_prefix(judge.bind(strict="not"), backend).text == "[system]You are not strict.[user]The essay: "
    assert constant_prefix(function(lambda s, a: a.lower()), backend) is None


def test_a_batch_of_graphs():
    backend = Scripted(lengths, SCORES)
    essays = [{"essay": "x" * i} for i in range(5)]
    plain = judge.run_batch(essays, backend=backend)
    states = judge.trace().run_batch(essays, backend=backend, num_threads=2)
    assert [state.text() for state in states] == [state.text() for state in plain]
