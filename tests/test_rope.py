"""Inverse frequencies of every rope scaling against those of `transformers`.

pytest tests/test_rope.py
"""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from errors import UserError
from rope import RopeSpec, inverse_frequencies

MAX_POSITION = 4096
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [2.0 + i for i in range(16)],
    "original_max_position_embeddings": 1024,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "old spelling": {"type": "linear", "factor": 3.0},
    "llama3": LLAMA3,
    "llama3, another ramp": {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 3.0},
    "yarn": YARN,
    "yarn, betas": {**YARN, "beta_fast": 8, "beta_slow": 2},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, mscale alone": {**YARN, "mscale": 0.7},
    "yarn, attention factor": {**YARN, "attention_factor": 0.6, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, factor from the lengths": {**YARN, "factor": None},
    "yarn, factor 1": {**YARN, "factor": 1.0},
    "longrope": LONG,
    "longrope, factor": {**LONG, "factor": 32.0},
    "longrope, factor below 1": {**LONG, "factor": 0.5},
    "longrope, attention factor": {**LONG, "attention_factor": 1.7},
}


def theirs(scaling: dict, theta: float, head_dim: int, length: int) -> tuple[torch.Tensor, float]:
    scaling = {"rope_type": scaling.get("type"), **copy.deepcopy(scaling)}
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITION,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"), seq_len=length)


def assert_same(scaling: dict, theta: float = 10000.0, length: int = MAX_POSITION) -> torch.Tensor:
    inv_freq, factor = inverse_frequencies(RopeSpec(theta, 32, MAX_POSITION, scaling), length)
    expected, expected_factor = theirs(scaling, theta, 32, length)
    assert inv_freq.dtype == torch.float32 and inv_freq.shape == (16,)
    torch.testing.assert_close(inv_freq, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-9)
    return inv_freq


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_like_transformers(name: str, theta: float):
    inv_freq = assert_same(SCALINGS[name], theta)
    plain, _ = inverse_frequencies(RopeSpec(theta, 32, MAX_POSITION), MAX_POSITION)
    assert name == "yarn, factor 1" or not torch.allclose(inv_freq, plain), "this scaling changes nothing"


def test_longrope_takes_the_long_factors_only_beyond_the_original_length():
    short, edge, long = (assert_same(LONG, length=n) for n in (100, 1024, 1025))
    assert short.equal(edge) and not short.equal(long)


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "default"}, {"rope_type": "dynamic", "factor": 4.0}])
def test_no_scaling(scaling: dict):
    """ "dynamic" scales only beyond the longest position, which no sequence reaches."""
    inv_freq, factor = inverse_frequencies(RopeSpec(100.0, 8, 64, scaling), 64)
    expected = torch.tensor([1.0, 100**-0.25, 100**-0.5, 100**-0.75])
    torch.testing.assert_close(inv_freq, expected)
    assert factor == 1.0


def test_dynamic_with_alpha_is_another_theta():
    scaled, _ = inverse_frequencies(RopeSpec(10000.0, 8, 64, {"rope_type": "dynamic", "alpha": 5.0}), 64)
    plain, _ = inverse_frequencies(RopeSpec(10000.0 * 5 ** (8 / 6), 8, 64), 64)
    assert scaled.equal(plain)


def test_the_rope_of_a_part_of_the_head():
    inv_freq, _ = inverse_frequencies(RopeSpec(10000.0, 6, 64), 64)
    assert inv_freq.shape == (3,)
    assert math.isclose(inv_freq[-1].item(), 10000 ** (-4 / 6), rel_tol=1e-6)


def test_an_unknown_scaling_is_named_with_those_that_are_known():
    with pytest.raises(UserError, match="'spiral' is not supported.*default.*linear.*llama3.*longrope.*yarn"):
        inverse_frequencies(RopeSpec(10000.0, 8, 64, {"rope_type": "spiral"}), 64)


def test_longrope_with_the_wrong_number_of_factors():
    with pytest.raises(UserError, match="16 factors for 8 rotated pairs"):
        inverse_frequencies(RopeSpec(10000.0, 16, MAX_POSITION, LONG), MAX_POSITION)
