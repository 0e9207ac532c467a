"""SamplingParams that are refused, and a request's life from token to token.

pytest tests/test_request.py
"""

import pytest

from errors import UserError
from scheduler.request import MAX_STOP_STRINGS, Request, SamplingParams, resolve_stop_ids

NAN, INF = float("nan"), float("inf")
BAD = {
    "n": [0, -1, 129],
    "temperature": [-0.1, 101.0, NAN, INF],
    "top_k": [-1],
    "top_p": [0, -0.5, 1.01, NAN],
    "min_p": [-0.01, 1.01, NAN],
    "repetition_penalty": [0, -1.0, 101, NAN, INF],
    "presence_penalty": [-2.1, 2.1, NAN],
    "frequency_penalty": [-2.1, 2.1, NAN],
    "max_new_tokens": [-1, -5],
    "min_new_tokens": [-1],
    "seed": [2**63, -(2**63) - 1],
    "logprobs": [-1, 21],
    "logit_bias": [{3: 100.5}, {3: -101}, {3: NAN}, dict.fromkeys(range(301), 1.0)],
    "stop": [[""], ["a", ""], "", ["x"] * (MAX_STOP_STRINGS + 1)],
}
GOOD = {
    "n": [1, 128],
    "temperature": [0, 100],
    "top_k": [0, 1, 10**9],
    "top_p": [1, 1e-9],
    "min_p": [0, 1],
    "repetition_penalty": [0.01, 100],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "max_new_tokens": [None, 0, 1],
    "min_new_tokens": [0, 1000],
    "seed": [None, 0, -(2**63), 2**63 - 1],
    "logprobs": [None, 0, 20],
    "logit_bias": [{}, dict.fromkeys(range(300), 100.0)],
    "stop": [(), "x", ["x"] * MAX_STOP_STRINGS],
}


@pytest.mark.parametrize(
    "field, value", [(f, v) for f, values in BAD.items() for v in values], ids=lambda v: str(v)[:20]
)
def test_a_bad_value_is_refused_by_name(field: str, value):
    with pytest.raises(UserError, match=field) as refused:
        SamplingParams(**{field: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("field, value", [(f, v) for f, vs in GOOD.items() for v in vs], ids=lambda v: str(v)[:20])
def test_the_limits_themselves_are_allowed(field: str, value):
    SamplingParams(**{field: value})


@pytest.mark.parametrize("field", ["top_k", "min_new_tokens"])
def test_a_number_that_no_tensor_holds_is_refused(field: str):
    """The device's tensors are int64: what does not fit must be refused here, not fail in a step with others."""
    with pytest.raises(UserError, match=field):
        SamplingParams(**{field: 2**63})


def test_more_new_tokens_at_least_than_at_most():
    with pytest.raises(UserError, match="min_new_tokens is 6; it must be between 0 and 5"):
        SamplingParams(min_new_tokens=6, max_new_tokens=5)
    SamplingParams(min_new_tokens=5, max_new_tokens=5)


def test_stops_are_made_lists():
    assert SamplingParams(stop="END").stop == ["END"]
    assert SamplingParams(stop=("a", "b"), stop_token_ids=(3, 4)).stop == ["a", "b"]
    assert SamplingParams(stop_token_ids=(3, 4)).stop_token_ids == [3, 4]
    mine = ["a"]
    params = SamplingParams(stop=mine)
    mine.append("b")
    assert params.stop == ["a"]


@pytest.mark.parametrize("field, value", [
    ("temperature", 0.5), ("repetition_penalty", 1.1), ("presence_penalty", 0.1), ("frequency_penalty", -0.1),
    ("logit_bias", {1: 2.0}), ("min_new_tokens", 1), ("logprobs", 0),
])  # fmt: skip
def test_greedy_means_that_argmax_is_all(field: str, value):
    assert SamplingParams(temperature=0, top_k=5, top_p=0.5, stop="x", stop_token_ids=[1]).greedy
    assert not SamplingParams(**{"temperature": 0, field: value}).greedy


def request(max_new_tokens: int = 4, stop_ids: tuple[int, ...] = (7,), **params) -> Request:
    return Request([1, 2, 3], SamplingParams(**params), frozenset(stop_ids), max_new_tokens, seed=0)


def append_until_end(r: Request, tokens: list[int]) -> None:
    for token in tokens:
        assert r.finish_reason is None
        r.append(token)


@pytest.mark.parametrize(
    "tokens, min_new_tokens, reason, detail",
    [
        ([5, 7], 0, "stop", 7),
        ([7], 0, "stop", 7),
        ([5, 5, 5, 5], 0, "length", None),
        ([5, 5, 5, 7], 0, "stop", 7),  # both at once: the stop id is the better reason
        ([7, 7, 7], 2, "stop", 7),  # the first two are too early
        ([7, 5, 5, 5], 1, "length", None),
        ([7, 7, 7, 7], 4, "length", None),
        ([5, 5, 5], 0, None, None),
    ],
)
def test_append(tokens: list[int], min_new_tokens: int, reason: str | None, detail: int | None):
    r = request(min_new_tokens=min_new_tokens)
    append_until_end(r, tokens)
    assert (r.finish_reason, r.stop_reason, r.output_ids) == (reason, detail, tokens)
    assert len(r.tokens) == 3 + len(tokens)


@pytest.mark.parametrize("second", ["stop", "length", "abort", "error"])
def test_a_request_ends_once(second: str):
    r = request()
    r.finish("stop", 7)
    with pytest.raises(RuntimeError, match=f"twice: stop, then {second}"):
        r.finish(second, "late")
    assert (r.finish_reason, r.stop_reason) == ("stop", 7)


def test_requests_are_compared_by_identity():
    a, b = request(), request()
    assert a != b and len({a, b}) == 2


def test_stop_ids_are_the_checkpoints_and_the_callers():
    assert resolve_stop_ids(SamplingParams(stop_token_ids=[5]), [7, 8]) == {5, 7, 8}
    assert resolve_stop_ids(SamplingParams(stop_token_ids=[5], ignore_eos=True), [7, 8]) == {5}
    assert resolve_stop_ids(SamplingParams(stop_token_ids=range(30)), [98, 99]) == {*range(30), 98, 99}
    with pytest.raises(UserError, match="33 stop token ids .*32 is the limit"):
        resolve_stop_ids(SamplingParams(stop_token_ids=range(31)), [98, 99])
