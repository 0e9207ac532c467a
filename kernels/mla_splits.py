"""How a launch of `kernels/mla.py` is cut: rows and entries into tiles, and a long history into splits.

The tile follows from the architecture and from how many rows a sequence has; the splits from how many programs fill the
GPU. Lengths live on the device, where the host must not wait for them: it fixes how many splits there can be, and the
device computes how long they are.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_mla.py
    python -m bench.kernel_report --kernel mla_decode mla_extend
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.paged import Config, device_key, table_for

# By architecture, then by rows of a sequence (heads times new tokens). From the compiler's report (R = 512), not from a
# clock. sm90: 16 rows use HMMA and are bound by memory, so five stages (two tiles in flight: a page table eats the
# others) and two programs a multiprocessor; 64 rows are the fewest that wgmma takes, and with their float32 output [64,
# R] the most that registers hold. sm80 has 163 KiB and no wgmma: 64 rows spill, 32 do not.
TILES = {
    "sm90": {16: Config(16, 32, 8, 5), 32: Config(32, 32, 8, 2), 64: Config(64, 64, 8, 3)},
    "sm80": {16: Config(16, 32, 8, 2), 32: Config(32, 32, 8, 2), 64: Config(32, 32, 8, 2)},
    "gfx942": {16: Config(16, 32, 4, 1), 32: Config(16, 32, 4, 1), 64: Config(16, 32, 4, 1)},
}
TILE_FLOAT32 = Config(16, 16, 8, 1)

MIN_SPLIT = 256  # entries: below that, writing and merging a partial result costs more than reading the history
PROGRAMS_PER_SM = 2  # that fit beside each other with 16 rows; with more it is one


def config(arch: str, rows: int, dtype: torch.dtype) -> Config:
    """`rows`: heads times new tokens of a sequence."""
    if dtype == torch.float32:
        return TILE_FLOAT32
    return table_for(TILES, arch)[16 if rows <= 16 else 32 if rows <= 32 else 64]


@dataclass(frozen=True)
class Splits:
    """How long histories are cut. Made once a step, for all layers; nothing here makes the host wait for the device."""

    tokens: Tensor  # [1] int32 on the device: entries of a split, rounded up to whole tiles
    most: int  # that a history can have: the grid is that high, and programs without work leave at once


def balanced_splits(lengths: Tensor, heads: int, max_length: int, dtype: torch.dtype) -> Splits:
    """lengths [B] on the device, no one above `max_length` -> splits that give each program equally much to read.

    All splits are equally long, however ragged the batch: a history of 32k among short ones becomes many, a short one
    stays whole. The result of a row then depends on its batch, by rounding; `fixed_splits` is for those who mind.
    """
    arch, sms = device_key(lengths)
    block_m = config(arch, heads, dtype).block_m
    blocks = triton.cdiv(heads, block_m)  # of one sequence
    programs = sms * (PROGRAMS_PER_SM if block_m == 16 else 1)
    # Room for four times as many as equal lengths need, as far as the longest can use them.
    most = max(1, min(4 * programs // (blocks * max(1, len(lengths))), triton.cdiv(max_length, MIN_SPLIT)))
    tokens = (lengths.sum(dtype=torch.int32) * blocks // programs + 1).clamp(min=MIN_SPLIT)
    return Splits(tokens.view(1), most)


def fixed_splits(tokens: int, max_length: int, device: torch.device | str) -> Splits:
    """Splits of `tokens` entries whatever the batch: a row's result is then the same to the last bit in any company.

    (Batch invariance: He et al., "Defeating Nondeterminism in LLM Inference", 2025.)
    """
    if tokens < 1:
        raise ValueError(f"a split of {tokens} entries: must be at least 1")
    return Splits(torch.full((1,), tokens, dtype=torch.int32, device=device), max(1, triton.cdiv(max_length, tokens)))
