"""The experts of a mixture, on a CPU: each that was chosen by a token is run once, with all tokens that chose it.

Of E experts a token takes k. Their weights are nearly all of the model's, so reading those of the others would cost E / k
times what it need: one token reads k experts, a prompt those that are hit. Tokens are sorted by expert; each expert then is
two products over a slice of them, oneDNN's with the weight packed once (`kernels/linear.py`), because with a prompt's tokens
spread over so many experts the slices are short, and that is where packing pays the most.

A token's outputs are put side by side again and then added up, in the order of its choice, whoever shares its batch: so its
sum does not depend on them. How many tokens an expert gets is known at run time only. That is no matter for a graph to trace,
so all of it is one `torch.library` op, which eager and compiled code call alike. Compiled for a single row there is nothing to
sort, and the compiler's loops over the plain weights of the k experts come nearer to the memory's bandwidth.

    python -m pytest tests/test_experts.py
    python -m bench.experts

Shapes: T tokens, E experts, k of them a token, I intermediate size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activations import gated
from kernels.linear import can_pack, product

# Rows of a product with packed float32 weights: oneDNN takes longer for fewer (measured on AVX-512).
LEAST_ROWS = 4
_ARGUMENTS = "Tensor? gate_up_bias, Tensor? down_bias, str activation, float[] clamp, bool weigh_input"
_library = torch.library.Library("folio", "FRAGMENT")
_library.define(
    f"experts(Tensor x, Tensor chosen, Tensor weights, Tensor gate_up, Tensor down, {_ARGUMENTS}) -> Tensor"
)
_library.define(
    f"packed_experts(Tensor x, Tensor chosen, Tensor weights, Tensor[] gate_up, Tensor[] down, {_ARGUMENTS}) -> Tensor"
)


def _experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor | list[Tensor],
    down: Tensor | list[Tensor],
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    clamp: Sequence[float],
    weigh_input: bool,
) -> Tensor:
    T, k = chosen.shape
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=len(gate_up)).tolist()
    rows = x[order // k]  # [T * k, hidden]
    if weigh_input:
        rows = (rows * weights.flatten()[order, None]).to(x.dtype)
    least = LEAST_ROWS if x.dtype == torch.float32 and not isinstance(gate_up, Tensor) else 1
    results, start = [], 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        h = rows[start : start + count]
        if count < least:
            h = F.pad(h, (0, 0, 0, least - count))
        h = product(h, gate_up[expert], None if gate_up_bias is None else gate_up_bias[expert])
        h = gated(h, activation, clamp)
        h = product(h, down[expert], None if down_bias is None else down_bias[expert])
        results.append(h[:count])
        start += count
    if not results:
        return torch.empty_like(x)
    y = torch.empty_like(rows).index_copy_(0, order, torch.cat(results)).view(T, k, -1)
    exact = torch.promote_types(x.dtype, torch.float32)
    return (y if weigh_input else y * weights[:, :, None]).sum(1, dtype=exact).to(x.dtype)


# Weights that are packed have a key of their own, which the dispatcher sees in the list, too.
for _key in ("CPU", "CUDA"):
    _library.impl("experts", _experts, _key)
for _key in ("CPU", "MkldnnCPU"):
    _library.impl("packed_experts", _experts, _key)


@torch.library.register_fake("folio::experts", lib=_library)
@torch.library.register_fake("folio::packed_experts", lib=_library)
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor | list[Tensor],
    down: Tensor | list[Tensor],
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    clamp: Sequence[float] = (),
    weigh_input: bool = False,
) -> Tensor:
    """Run each token through the experts that it chose -> the weighted sum of their outputs [T, hidden].

    x [T, hidden]; chosen [T, k] int64, all of a row different; weights [T, k] float32. gate_up [E, 2I, hidden], down
    [E, hidden, I], both plain or both lists of E packed ones; biases [E, 2I] and [E, hidden]. `activation`, `clamp`: see
    `gated`. `weigh_input`: the weights multiply what goes into the experts, and not what comes out.
    """
    rest = (gate_up_bias, down_bias, activation, list(clamp), weigh_input)
    if not isinstance(gate_up, Tensor):
        return torch.ops.folio.packed_experts(x, chosen, weights, gate_up, down, *rest)
    if x.shape[0] == 1 and torch.compiler.is_compiling() and can_pack(gate_up):
        return _one_row(x, chosen, weights, gate_up, down, *rest)
    return torch.ops.folio.experts(x, chosen, weights, gate_up, down, *rest)


def _one_row(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    clamp: Sequence[float],
    weigh_input: bool,
) -> Tensor:
    """x [1, hidden]. To be compiled: `weight[expert]` becomes part of the loop that reads it, and nothing is gathered."""
    expert, w = chosen[0], weights[0, :, None]  # [k], [k, 1]
    h = (x * w).to(x.dtype) if weigh_input else x.expand(len(expert), -1)
    h = (gate_up[expert].float() * h.float()[:, None]).sum(-1)  # [k, 2I]
    h = gated((h if gate_up_bias is None else h + gate_up_bias[expert]).to(x.dtype), activation, clamp)
    y = (down[expert].float() * h.float()[:, None]).sum(-1)  # [k, hidden]
    y = (y if down_bias is None else y + down_bias[expert]).to(x.dtype)
    return (y if weigh_input else y * w).sum(0, keepdim=True).to(x.dtype)


def tokens_per_expert(chosen: Tensor, num_experts: int) -> Tensor:
    """chosen [T, k] -> how many tokens each expert gets [E], without waiting for the device."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=chosen.device)
    return counts.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
