"""Weights that a checkpoint stores in 8 or 4 bits, turned into ordinary numbers while they are loaded.

Folio computes with 16 or 32 bits. But DeepSeek-V3 and gpt-oss are published in formats of their own only:

    fp8      weight [N, K] float8_e4m3fn, weight_scale_inv [N / 128, K / 128]: a scale for each block of 128 x 128, the last
             ones partial (DeepSeek-V3, 2024)
    mxfp4    X_blocks [E, N, G, 16] uint8, X_scales [E, N, G] uint8: of each of E experts N rows of G groups of 32 numbers, two
             of 4 bits in a byte, the first in the low half; a scale is a power of 2 (OCP Microscaling Formats, 2023)

Which one, config.json says under `quantization_config`. `stored_as` finds what belongs together and gives each weight the name
and the shape that it has where it is not quantised, so that no one else has to know. `weight_of` makes the weight of it. On the
way some rows at a time are float32, never the whole.

    python -m pytest tests/test_quantized.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errors import UserError

METHODS = ("fp8", "mxfp4")
PIECE = 1 << 20  # numbers that are expanded at a time
GROUP = 32  # numbers of MXFP4 that share a scale

# The 16 numbers of 4 bits (e2m1): sign, two bits of exponent, one of mantissa.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = torch.cat([E2M1, -E2M1])
PAIRS = torch.stack([E2M1.repeat(16), E2M1.repeat_interleave(16)], 1)  # [256, 2] of each byte


@dataclass(frozen=True)
class Quantization:
    """What `quantization_config` says, as far as it matters here."""

    method: str
    block: tuple[int, int] = (0, 0)  # of fp8: rows and columns that share a scale


def quantization(raw_config: dict[str, Any]) -> Quantization | None:
    """The contents of a config.json -> how its weights are stored. UserError for what is not known here."""
    settings = raw_config.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method not in METHODS:
        raise UserError(
            f"quantization_config.quant_method {method!r} is not supported; these are: {', '.join(METHODS)}"
        )
    if method == "mxfp4":
        return Quantization(method)
    block = settings.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise UserError(f"quantization_config.weight_block_size must be two positive integers, not {block!r}")
    return Quantization(method, tuple(block))


# ---- what a file has, and what that stands for


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, before it is read."""

    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """What a weight is stored as."""

    parts: tuple[str, ...]  # itself; or what is quantised, and its scales
    shape: tuple[int, ...]  # of the weight


def stored_as(found: Mapping[str, Stored], quantization: Quantization | None) -> dict[str, Source]:
    """The tensors of a checkpoint -> its weights, under the names that they have where they are not quantised.

    UserError names an fp8 weight without scales, or with those of another shape, and blocks of mxfp4 likewise.
    """
    method = quantization.method if quantization else ""
    weights: dict[str, Source] = {}
    for name, tensor in found.items():
        if method == "mxfp4" and name.endswith("_blocks"):
            parts = (name, _scales_of_blocks(found, name))
            weights[name.removesuffix("_blocks")] = Source(parts, _shape_of_blocks(tensor.shape))
        elif tensor.dtype == "F8_E4M3":
            if method != "fp8":
                raise UserError(f"{name} is stored in 8 bits (float8_e4m3fn), of which config.json says nothing")
            weights[name] = Source((name, _scales_of_fp8(found, name, quantization.block)), tensor.shape)
        else:
            weights[name] = Source((name,), tensor.shape)
    scales = {part for source in weights.values() for part in source.parts[1:]}
    return {name: source for name, source in weights.items() if name not in scales}


def _shape_of_blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[E, N, G, 16] -> [E, G * 32, N]: where gpt-oss is not quantised, its experts are stored with the inputs first."""
    E, N, G, _ = shape
    return E, G * GROUP, N


def _scales_of_fp8(found: Mapping[str, Stored], name: str, block: tuple[int, int]) -> str:
    scales, shape = f"{name}_scale_inv", found[name].shape
    if len(shape) != 2:
        raise UserError(f"{name} is stored in 8 bits and has {len(shape)} dimensions; blocks of {list(block)} need 2")
    wanted = tuple(-(-size // b) for size, b in zip(shape, block, strict=True))
    _check_scales(found, name, scales, wanted, ("F32", "BF16", "F16", "F8_E8M0"))
    return scales


def _scales_of_blocks(found: Mapping[str, Stored], name: str) -> str:
    scales, (dtype, shape) = f"{name.removesuffix('_blocks')}_scales", (found[name].dtype, found[name].shape)
    if dtype != "U8" or len(shape) != 4 or shape[-1] != GROUP // 2:
        raise UserError(
            f"{name} is {dtype} {list(shape)}; blocks of mxfp4 are U8 [experts, rows, groups, {GROUP // 2}]"
        )
    _check_scales(found, name, scales, shape[:-1], ("U8",))
    return scales


def _check_scales(
    found: Mapping[str, Stored], name: str, scales: str, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> None:
    if scales not in found:
        raise UserError(f"{name} is quantised, and its scales {scales} are missing")
    have = found[scales]
    if have.shape != shape or have.dtype not in dtypes:
        wanted = f"{' or '.join(dtypes)} {list(shape)}"
        raise UserError(f"{scales} is {have.dtype} {list(have.shape)}; {name} {list(found[name].shape)} needs {wanted}")


# ---- the weights


@dataclass
class Fp8:
    """A weight still mapped: [N, K] float8_e4m3fn, scales [ceil(N / block rows), ceil(K / block columns)]."""

    weight: Tensor
    scales: Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def copy_to(self, target: Tensor) -> None:
        """Into [N, K] of any dtype, on any device: a row of blocks at a time."""
        rows, columns = self.block
        pieces = zip(target.split(rows), self.weight.split(rows), self.scales.float(), strict=True)
        for out, weight, scales in pieces:
            out.copy_(weight.float() * scales.repeat_interleave(columns)[: weight.shape[1]])


def expand_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks [E, N, G, 16], scales [E, N, G], both uint8 -> the weight [E, G * 32, N], a view of [E, N, G * 32]."""
    E, N, G, _ = blocks.shape
    weight = torch.empty(E, N, G * GROUP, dtype=dtype)
    rows = max(1, PIECE // (G * GROUP))
    pieces = (t.flatten(0, 1).split(rows) for t in (weight, blocks, scales))
    for out, part, powers in zip(*pieces, strict=True):
        numbers = PAIRS[part.int()].view(len(part), G, GROUP)
        out.copy_((numbers * powers.view(torch.float8_e8m0fnu).float()[..., None]).flatten(1))
    return weight.transpose(1, 2)


def weight_of(parts: list[Tensor], quantization: Quantization | None, dtype: torch.dtype) -> Tensor | Fp8:
    """The tensors that `stored_as` named for a weight, read -> the weight, of `dtype` if it has to be expanded.

    Fp8 is left mapped: the weights of hundreds of experts are small, and read together.
    """
    if quantization is None or len(parts) == 1:
        return parts[0]
    return Fp8(*parts, quantization.block) if quantization.method == "fp8" else expand_mxfp4(*parts, dtype)
