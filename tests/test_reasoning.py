"""Thoughts apart from answers, at any cut of the text.

python -m pytest tests/test_reasoning.py
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasoning import Reasoning, thought_begun


def split(parser: str, begun: bool | None, *pieces: str) -> tuple[str, str]:
    reasoning = Reasoning(parser, begun)
    parts = [reasoning.add(piece) for piece in pieces] + [reasoning.finish()]
    return "".join(thought for thought, _ in parts), "".join(answer for _, answer in parts)


@pytest.mark.parametrize(
    ("parser", "begun", "text", "thought", "answer"),
    [
        ("qwen3", None, "<think>\n2 + 2\nis 4\n</think>\n\nIt is 4.\n", "2 + 2\nis 4", "It is 4.\n"),
        ("qwen3", None, " It is 4. <think>No.</think>", "", " It is 4. <think>No.</think>"),
        ("qwen3", None, "<thin ice", "", "<thin ice"),
        ("qwen3", True, "\nso </thin\n</think>It.", "so </thin", "It."),
        ("qwen3", False, "It is <think>4</think>.", "", "It is <think>4</think>."),
        ("deepseek_r1", None, "so\n</think>\nIt.", "so", "It."),
        ("deepseek_r1", None, "<think>so</think>It.", "so", "It."),
        ("deepseek_r1", False, "It is 4.", "", "It is 4."),
        ("qwen3", None, "<think>never ends </thi", "never ends </thi", ""),
        ("qwen3", None, "<think></think>It.", "", "It."),
        ("qwen3", None, "<think>so</think>\n\n", "so", ""),
        ("qwen3", None, " <thi", "", " <thi"),
        ("qwen3", None, "", "", ""),
    ],
)
def test_it_is_split(parser, begun, text, thought, answer):
    assert split(parser, begun, text) == (thought, answer)
    assert split(parser, begun, *text) == (thought, answer)


def test_a_prompt_says_where_the_text_begins():
    assert thought_begun("<|assistant|><think>\n") is True
    assert thought_begun("<|assistant|><think>\n\n</think>\n\n") is False
    assert thought_begun("<|assistant|>\n") is None


def test_a_thought_is_passed_on_as_it_comes():
    reasoning = Reasoning("qwen3")
    assert reasoning.add("<think>\nso") == ("so", "")
    assert reasoning.add(" far ") == (" far", "")
    assert reasoning.add("x</think>\n") == (" x", "")
    assert reasoning.add("\nIt.") == ("", "It.")


@given(
    parser=st.sampled_from(["qwen3", "deepseek_r1"]),
    begun=st.sampled_from([None, True, False]),
    parts=st.lists(
        st.sampled_from(["<think>", "</think>", "<thi", "nk>", "</", " ", "\n", "so", "It.", "<"]), max_size=8
    ),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)
def test_any_cut_gives_the_same(parser, begun, parts, cuts):
    text = "".join(parts)
    cuts = sorted(min(cut, len(text)) for cut in cuts)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(parser, begun, *pieces) == split(parser, begun, text) == split(parser, begun, *text)
