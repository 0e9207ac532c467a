"""What the two processes say to each other comes over whole, and nothing else does.

python -m pytest tests/test_server_messages.py
"""

import dataclasses
import json
import subprocess
import sys
import types
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_process import ROOT

from errors import UserError
from scheduler.request import SamplingParams
from serving import messages as m
from serving.params import NOT_OVER_JSON, Params, flat, sampling_params

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3),
    max_leaves=8,
)  # fmt: skip


def values_of(kind: object) -> st.SearchStrategy:
    """Any value of a field's type."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is typing.Any:
        return JSON
    if kind is str:
        return TEXT
    if kind is int:
        return st.integers(-(2**63), 2**63 - 1)
    if kind is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if kind in (bool, type(None)):
        return st.booleans() if kind is bool else st.none()
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{f.name: values_of(hints[f.name]) for f in dataclasses.fields(kind)})
    if origin is list:
        return st.lists(values_of(inside[0]), max_size=3)
    if origin is tuple:
        return st.tuples(*map(values_of, inside))
    if origin is dict:
        return st.dictionaries(*map(values_of, inside), max_size=3)
    if origin is typing.Literal:
        return st.sampled_from(inside)
    assert origin in (types.UnionType, typing.Union), kind
    return st.one_of(*map(values_of, inside))


@given(st.lists(st.one_of(*map(values_of, m.TYPES)), max_size=3))
def test_messages_come_over_as_they_were(messages):
    assert m.decode(m.encode(*messages)) == messages


@given(st.binary() | JSON.map(lambda x: json.dumps(x).encode()) | st.lists(JSON).map(lambda x: json.dumps(x).encode()))
def test_what_is_no_message_is_a_value_error(frame):
    try:
        assert m.decode(frame) == []  # an empty list is a frame
    except ValueError as error:
        assert "not a message" in str(error)


@pytest.mark.parametrize(
    "said",
    [
        {"type": "abort"},
        {"type": "abort", "rid": 1},
        {"type": "abort", "rid": "1", "more": 1},
        {"type": "nothing", "rid": "1"},
        {"rid": "1"},
        {"type": "submit", "rid": "1", "prompt_ids": ["1"], "params": {}},
        {"type": "submit", "rid": "1", "prompt_ids": [1.5], "params": {}},
    ],
)
def test_a_wrong_field_is_a_value_error(said):
    with pytest.raises(ValueError, match="not a message"):
        m.decode(json.dumps([said]).encode())


def test_every_sampling_parameter_can_be_sent_but_the_function():
    assert set(Params.model_fields) | NOT_OVER_JSON == {f.name for f in dataclasses.fields(SamplingParams)}
    assert sampling_params({}) == SamplingParams()
    assert sampling_params({name: getattr(Params(), name) for name in Params.model_fields}) == SamplingParams()


def test_sampling_parameters_come_over_as_they_were():
    values = {
        "max_new_tokens": 3, "n": 2, "temperature": 0, "top_p": 0.5, "logit_bias": {"7": 1.5}, "stop": ["a"],
        "stop_token_ids": [4], "json_schema": {"type": "integer"}, "seed": 5, "logprobs": 2,
    }  # fmt: skip
    sent = json.loads(m.encode(m.Submit("1", [1], flat(values))))[0]["params"]
    expected = SamplingParams(**values | {"logit_bias": {7: 1.5}, "json_schema": '{"type": "integer"}'})
    assert sampling_params(sent) == expected


@pytest.mark.parametrize(
    "values, name",
    [
        ({"allowed_tokens_fn": 1}, "allowed_tokens_fn"),
        ({"nothing": 1}, "nothing"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"stop": [1]}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"json_schema": 1}, "json_schema"),
    ],
)
def test_a_wrong_sampling_parameter_is_named(values, name):
    with pytest.raises(UserError, match=f"^{name}"):
        sampling_params(values)


def test_a_thousand_levels_do_not_reach_the_frame():
    deep: dict = {}
    for _ in range(500):
        deep = {"items": deep}
    assert len(m.decode(m.encode(m.Submit("1", [1], flat({"json_schema": deep}))))) == 1
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(UserError, match="json_schema"):
        flat({"json_schema": deep})


def test_the_http_process_has_no_torch():
    code = "import sys, serving.app; print([name for name in ('torch', 'numpy', 'xgrammar') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
