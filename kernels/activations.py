"""What stands between the two products of an MLP: the activated gate times the other half.

python -m pytest tests/test_experts.py
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def gated(gate_up: Tensor, activation: str, clamp: Sequence[float] = ()) -> Tensor:
    """gate_up [..., 2I], the gates first -> activation(gate) * up [..., I] (GLU variants: Shazeer, 2020).

    `clamp` (alpha, limit): gpt-oss's instead (OpenAI, 2025), gate * sigmoid(alpha * gate) * (up + 1), where neither gets
    larger than the limit, nor `up` smaller than minus it. The `activation` counts for nothing then.
    """
    gate, up = gate_up.chunk(2, -1)
    if not clamp:
        return ACTIVATIONS[activation](gate) * up
    alpha, limit = clamp
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)
