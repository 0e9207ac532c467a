"""The layers that every block is made of: norms, linear layers, the MLP; and what a step tells them all.

python -m pytest tests/test_linear.py tests/test_families.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.activations import gated
from kernels.dispatch import Layout
from kernels.linear import can_pack, pack, packed_linear, plain_linear, unpack


def rms_normalized(x: Tensor, eps: float) -> Tensor:
    """x [..., N] float32, divided by the root of its mean square."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class BareNorm(nn.Module):
    """RMSNorm without a weight; computed in float32."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalized(x.float(), self.eps).to(x.dtype)


@dataclass
class StepContext:
    """What every layer of one step shares, computed once."""

    layout: Layout  # where the keys and values lie, and who sees what
    cos_sin: list[tuple[Tensor, Tensor]]  # for each rope: cos, sin [T, dim / 2] float32
    query_scale: Tensor | None  # [T, 1, 1]


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich, 2019), or LayerNorm without bias when `center`; computed in float32."""

    def __init__(self, shape: int | tuple[int, ...], eps: float, offset: float = 0.0, center: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.eps, self.offset, self.center = eps, offset, center

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        if self.center:
            y = y - y.mean(-1, keepdim=True)
        y = rms_normalized(y, self.eps)
        return (y * (self.weight.float() + self.offset)).to(x.dtype)


class Linear(nn.Module):
    """y = x W' + b. `pack()` re-lays the weight for the CPU, after loading; `unpack()` makes it plain again."""

    def __init__(self, n_in: int, n_out: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(n_out), requires_grad=False) if bias else None
        self.packed = False

    def pack(self) -> None:
        if not self.packed and can_pack(self.weight):
            self.weight = nn.Parameter(pack(self.weight.data), requires_grad=False)
            self.packed = True

    def unpack(self) -> None:
        if self.packed:
            self.weight = nn.Parameter(unpack(self.weight.data), requires_grad=False)
            self.packed = False

    def forward(self, x: Tensor) -> Tensor:
        return (packed_linear if self.packed else plain_linear)(x, self.weight, self.bias)


class MLP(nn.Module):
    """Two matrices up, one down, and a gate between them."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, activation: str):
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, bias)
        self.down = Linear(intermediate_size, hidden_size, bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated(self.gate_up(x), self.activation))
