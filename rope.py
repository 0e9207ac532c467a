"""Rotary position embedding: the inverse frequencies of every scaling, in float32.

RoPE turns pair i of a head by the angle `position * inv_freq[i]` (Su et al., RoFormer, 2021). What
families call "rope scaling" only changes `inv_freq`, once, at load time, and sometimes multiplies
cos and sin by a constant. So all of it fits on this page, and `model.py` sees two things:
the vector and the constant.

    python -m pytest tests/test_rope.py
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from errors import UserError


@dataclass(frozen=True)
class RopeSpec:
    """One rotary embedding. `dim` is the number of rotated dims of a head (even; the rest pass through).

    `scaling` holds the checkpoint's own keys (`rope_type`, `factor`, ...) and nothing else.
    """

    theta: float
    dim: int
    max_position: int
    scaling: dict[str, Any] = field(default_factory=dict)

    @property
    def type(self) -> str:
        return self.scaling.get("rope_type") or self.scaling.get("type") or "default"


def inverse_frequencies(spec: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    """-> (inv_freq [dim / 2] float32, factor on cos and sin).

    `max_model_len` is the longest sequence that will be served; LongRoPE picks its long or its short
    factors by it. The choice is made once and not per request, because a cached key must not change
    its meaning while a sequence grows (vLLM does the same).
    """
    if spec.type not in SCALINGS:
        raise UserError(f"rope scaling {spec.type!r} is not supported; these are: {', '.join(sorted(SCALINGS))}")
    return SCALINGS[spec.type](spec, max_model_len)


def _powers(spec: RopeSpec) -> Tensor:
    return spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim)


def _default(spec: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    return 1.0 / _powers(spec), 1.0


def _linear(spec: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al., 2023)."""
    return 1.0 / _powers(spec) / spec.scaling["factor"], 1.0


def _dynamic(spec: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    """NTK-aware scaling changes theta only beyond max_position, where no sequence goes; Hunyuan's `alpha` always does."""
    theta = spec.theta * (spec.scaling.get("alpha") or 1.0) ** (spec.dim / (spec.dim - 2))
    return _default(replace(spec, theta=theta), max_model_len)


def _llama3(spec: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, a linear ramp in between."""
    s = spec.scaling
    inv_freq = 1.0 / _powers(spec)
    turns = s["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # full turns inside the old context
    ramp = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    keep = ramp.clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / s["factor"]), 1.0


def _yarn(spec: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023): interpolate the dims that turn less than `beta_slow` times, keep those above `beta_fast`."""
    s = spec.scaling
    original = s.get("original_max_position_embeddings") or spec.max_position
    factor = s.get("factor") or spec.max_position / original

    def dim_of(turns: float) -> float:
        return spec.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dim_of(s.get("beta_fast") or 32), dim_of(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    ramp = ((torch.arange(spec.dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    inv_freq = 1.0 / _powers(spec)
    return inv_freq * (1 - ramp) + inv_freq / factor * ramp, _yarn_attention_factor(s, factor)


def _yarn_attention_factor(s: dict[str, Any], factor: float) -> float:
    if s.get("attention_factor") is not None:
        return s["attention_factor"]
    if s.get("mscale") and s.get("mscale_all_dim"):
        return yarn_mscale(factor, s["mscale"]) / yarn_mscale(factor, s["mscale_all_dim"])
    return yarn_mscale(factor)


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """How much larger YaRN makes queries and keys of a context that is `factor` times as long."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(spec: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al., 2024): a searched factor for each dim, one set for short and one for long contexts."""
    s = spec.scaling
    original = s["original_max_position_embeddings"]
    each = torch.tensor(s["long_factor"] if max_model_len > original else s["short_factor"], dtype=torch.float32)
    if each.numel() != spec.dim // 2:
        raise UserError(f"longrope has {each.numel()} factors for {spec.dim // 2} rotated pairs")
    factor = s.get("factor") or spec.max_position / original
    attention = s.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0 / (each * _powers(spec)), attention


SCALINGS = {
    "default": _default,
    "dynamic": _dynamic,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
