"""Experts written out in float64, one token and one of its experts at a time: what the real ones are compared with."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Layer:
    """Everything that `experts` and `grouped_experts` take beside x, chosen and weights."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "silu"
    clamp: tuple[float, ...] = ()
    weigh_input: bool = False

    @property
    def arguments(self) -> tuple:
        return tuple(vars(self).values())


def make_layer(
    E: int, hidden: int, size: int, dtype: torch.dtype, bias: bool = False, device: str = "cpu", **knobs
) -> Layer:
    def random(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    biases = (random(E, 2 * size, scale=0.5), random(E, hidden, scale=0.5)) if bias else (None, None)
    weights = random(E, 2 * size, hidden, scale=2 * hidden**-0.5), random(E, hidden, size, scale=size**-0.5)
    return Layer(*weights, *biases, **knobs)


def make_choices(T: int, E: int, k: int, device: str = "cpu", among: int | None = None) -> tuple[Tensor, Tensor]:
    """-> chosen [T, k], different in each row, all below `among`; weights [T, k]."""
    order = torch.rand(T, among or E, device=device).argsort(-1)
    return order[:, :k].contiguous(), torch.rand(T, k, device=device) + 0.1


def plain_experts(x: Tensor, chosen: Tensor, weights: Tensor, layer: Layer) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for t in range(len(x)):
        for e, w in zip(chosen[t].tolist(), weights[t].tolist(), strict=True):
            token = x[t].double() * (w if layer.weigh_input else 1.0)
            h = layer.gate_up[e].double() @ token
            if layer.gate_up_bias is not None:
                h += layer.gate_up_bias[e]
            half = len(h) // 2
            y = layer.down[e].double() @ gate(h[:half], h[half:], layer)
            if layer.down_bias is not None:
                y += layer.down_bias[e]
            out[t] += y if layer.weigh_input else w * y
    return out


def gate(g: Tensor, u: Tensor, layer: Layer) -> Tensor:
    if layer.clamp:
        alpha, limit = layer.clamp
        g, u = torch.where(g > limit, limit, g), torch.where(u.abs() > limit, limit * u.sign(), u)
        return g / (1 + torch.exp(-alpha * g)) * (1 + u)
    if layer.activation == "silu":
        return g / (1 + torch.exp(-g)) * u
    if layer.activation == "gelu":
        return g * (1 + torch.erf(g / math.sqrt(2))) / 2 * u
    return g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2 * u
