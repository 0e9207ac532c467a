"""Linear layers on a CPU: oneDNN with the weight packed once, instead of a BLAS call that packs it every time.

At batch 1 a decode step reads every weight once and does almost nothing else, so the floor is
bytes / memory bandwidth. The BLAS behind `F.linear` reaches about half of it on the machines we measured;
oneDNN's inner product over a blocked weight comes nearer, and is 2-4x faster at 2-16 rows. A loop that
the compiler makes over a plain weight comes nearer still, for one row. So there are two layouts: packed for batches, and
plain for an engine that was compiled for one row at a time. `python -m bench.linear` compares the first two, and
`python -m bench.decode --rows b1` shows what the loop makes of a whole model.

The packed weight is an opaque tensor that the compiler cannot look into, so the product is a
`torch.library` op: eager and compiled code call the same thing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows the blocked layout is chosen for. Measured: packing for 16 is the best or level at 1 to 512 rows.
PACK_FOR_ROWS = 16
# Numbers in a matrix. A call of oneDNN takes some 15 us before it computes, of BLAS 2; up to here that decides.
WORTH_A_CALL = 1 << 18
HAS_ONEDNN = torch.backends.mkldnn.is_available()
HAS_BF16 = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # in hardware
CPU_DTYPES = (torch.float32, torch.bfloat16) if HAS_BF16 else (torch.float32,) if HAS_ONEDNN else ()  # worth all this

_library = torch.library.Library("folio", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] times a weight [out, in], packed or plain -> [T, out]. Not to be traced: for inside of an op."""
    if weight.is_mkldnn or (can_pack(weight) and weight.numel() >= WORTH_A_CALL):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")  # plain: a little slower
    return F.linear(x, weight, bias)


# The dispatcher looks at both tensors, and the packed one has a key of its own.
_library.impl("packed_linear", product, "CPU")
_library.impl("packed_linear", product, "MkldnnCPU")


@torch.library.register_fake("folio::packed_linear", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def can_pack(weight: Tensor) -> bool:
    """Is there a oneDNN for this device and dtype, with instructions that make it the faster path?"""
    return weight.device.type == "cpu" and weight.dtype in CPU_DTYPES


def pack(weight: Tensor) -> Tensor:
    """weight [out, in] -> the same numbers in oneDNN's blocked layout: as many bytes, readable by `packed_linear` only."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACK_FOR_ROWS)


def unpack(weight: Tensor) -> Tensor:
    """The plain [out, in] weight again."""
    return weight.to_dense() if weight.is_mkldnn else weight


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times a plain weight [out, in] -> [T, out]. Compiled, one row on a CPU is a loop that reads the weight once."""
    if not can_pack(weight):
        return F.linear(x, weight, bias)
    if x.shape[0] == 1 and torch.compiler.is_compiling():
        y = (weight.float() * x.float()).sum(-1)[None]
        return (y if bias is None else y + bias).to(x.dtype)
    return torch.ops.folio.packed_linear(x, weight, bias)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times a packed weight [out, in] -> [..., out]."""
    return torch.ops.folio.packed_linear(x, weight, bias)
