"""TextStream: stop strings wherever they fall, and text that is shown once and for good.

pytest tests/test_output.py
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from output import TextStream


class Pieces:
    """A detokenizer that emits given strings: token i is pieces[i]; `rest` comes with finish()."""

    def __init__(self, pieces: list[str], rest: str = ""):
        self.pieces, self.rest, self.vocab_size = pieces, rest, len(pieces)

    def add(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)

    def finish(self) -> str:
        return self.rest


def run(pieces: list[str], stops: list[str], rest: str = "", early: int = 0) -> tuple[TextStream, list[str]]:
    """Feed pieces until a stop string is found, as the engine does -> the stream and what was shown after each.

    The first `early` pieces may not stop.
    """
    stream, shown = TextStream(Pieces(pieces, rest), stops), []
    for i in range(len(pieces)):
        stream.add(i, may_stop=i >= early)
        shown.append(stream.take())
        if stream.stopped_by is not None:
            return stream, shown
    stream.finish()
    return stream, [*shown, stream.take()]


@pytest.mark.parametrize(
    "pieces, stops, text, stopped_by",
    [
        (["ab", "cd", "ef"], [], "abcdef", None),
        (["ab", "cd", "ef"], ["xy"], "abcdef", None),
        (["ab", "cd", "ef"], ["cd"], "ab", "cd"),
        (["ab", "cd", "ef"], ["ab"], "", "ab"),
        (["ab", "cd", "ef"], ["f"], "abcde", "f"),
        (["ab", "cd", "ef"], ["bc"], "a", "bc"),
        (["ab", "cd", "ef"], ["bcde"], "a", "bcde"),
        (["ab", "cd", "ef"], ["abcdef"], "", "abcdef"),
        (["a", "", "b", "", "c"], ["abc"], "", "abc"),
        (["abcdef"], ["cd"], "ab", "cd"),
        (["abcdef"], ["e", "b", "d"], "a", "b"),  # the earliest in the text, not in the list
        (["a", "b", "c"], ["abcd", "bc", "c"], "a", "bc"),  # the earliest of two that end together
        (["ab", "ab", "ac"], ["abac"], "ab", "abac"),  # a false start overlaps the true one
        (["aa", "aa", "ab"], ["aab"], "aaa", "aab"),
        (["日", "本", "語。"], ["本語"], "日", "本語"),
        (["x\n", "\ny"], ["\n\n"], "x", "\n\n"),
    ],
)
def test_stop_strings(pieces: list[str], stops: list[str], text: str, stopped_by: str | None):
    stream, shown = run(pieces, stops)
    assert (stream.text, stream.stopped_by) == (text, stopped_by)
    assert "".join(shown) == text


@pytest.mark.parametrize(
    "pieces, stops, shown",
    [
        (["ab", "cd", "ef"], [], ["ab", "cd", "ef", ""]),
        (["ab", "cd", "ef"], ["bx"], ["a", "bcd", "ef", ""]),
        (["ab", "cd", "ef"], ["fx", "efyy"], ["ab", "cd", "", "ef"]),  # looked like a stop until the end
        (["ab", "cd", "e"], ["bcdz", "de"], ["a", "", "bc"]),
        (["\n", "\n", "x"], ["\n\n\n"], ["", "", "\n\nx", ""]),
    ],
)
def test_only_what_may_become_a_stop_string_is_held_back(pieces: list[str], stops: list[str], shown: list[str]):
    assert run(pieces, stops)[1] == shown


def test_the_rest_of_the_detokenizer_is_text_and_may_hold_a_stop():
    stream, shown = run(["ab"], ["bc"], rest="d")
    assert (stream.text, shown, stream.stopped_by) == ("abd", ["a", "bd"], None)
    stream, shown = run(["ab"], ["bc"], rest="cd")
    assert (stream.text, shown, stream.stopped_by) == ("a", ["a", ""], "bc")


def test_nothing_comes_after_a_stop():
    stream, _ = run(["ab", "cd"], ["b"], rest="zzz")
    stream.finish()
    assert stream.take() == "" and stream.text == "a"


def test_tokens_without_text():
    silent = TextStream(None, ["a"])
    silent.add(3)
    silent.finish()
    assert (silent.text, silent.take()) == ("", "")
    stream = TextStream(Pieces(["a"]), [])
    stream.add(1)  # in the model's vocabulary, but not in the tokenizer's
    stream.add(0)
    assert stream.take() == "a"


@pytest.mark.parametrize(
    "pieces, early, text, stopped_by",
    [
        (["a", "b", "c", "b"], 2, "abc", "b"),  # the early one is text, the later one stops
        (["xbx", "b"], 1, "xbx", "b"),
        (["b"], 1, "b", None),
        (["a", "c", "b"], 2, "ac", "b"),
    ],
)
def test_an_early_stop_string_is_plain_text(pieces: list[str], early: int, text: str, stopped_by: str | None):
    stream, shown = run(pieces, ["b"], early=early)
    assert (stream.text, stream.stopped_by) == (text, stopped_by)
    assert "".join(shown) == text


def test_a_stop_string_may_not_begin_in_early_text():
    stream, shown = run(["ab", "cd", "bc"], ["bc"], early=1)
    assert (stream.text, stream.stopped_by) == ("abcd", "bc")
    assert "".join(shown) == "abcd"


def split(text: str, seed: int) -> list[str]:
    rng, pieces = random.Random(seed), []
    while text:
        size = rng.randint(0, 4)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


letters = st.text(alphabet="ab\n", max_size=30)


@settings(max_examples=300, derandomize=True)
@given(letters, st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4), st.integers(0, 10**6))
def test_deltas_add_up_for_any_split(text: str, stops: list[str], seed: int):
    """Against a search of the whole text after every piece; what is shown is never retracted."""
    pieces = split(text, seed)
    expected, so_far = text, ""
    for piece in pieces:
        so_far += piece
        found = [at for stop in stops if (at := so_far.find(stop)) >= 0]
        if found:
            expected = so_far[: min(found)]
            break
    stream, shown = run(pieces, stops)
    assert "".join(shown) == stream.text == expected
    assert (stream.stopped_by is None) == (expected == text)
    assert stream.stopped_by is None or text.startswith(expected + stream.stopped_by)
