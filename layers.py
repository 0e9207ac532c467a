"""The layers that every block is made of: norms, linear layers, activations.

python -m pytest tests/test_linear.py tests/test_families.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import can_pack, pack, packed_linear, plain_linear, unpack

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


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
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
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
