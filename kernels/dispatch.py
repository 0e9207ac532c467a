"""The one door to the kernels: which of them a step takes, and how the step is laid out for them.

A step is T new tokens of B sequences, decodes and chunks of prompts in any mixture. What all layers share of it is laid out
once, outside of the compiled graph: where the new tokens go, and how the kernels find each history. There are three backends:

    triton       the kernels of `decode.py`, `prefill.py`, `mla.py`, `kv_write.py`, `sampler.py`: what a GPU takes
    sdpa         histories gathered, then PyTorch's own attention: what a CPU takes. A layer that changes scores (soft
                 cap, ALiBi), which SDPA cannot do, takes `reference`; so does one with sinks, elsewhere than on a CPU
    reference    the softmax written out

A layer calls `write` and `attend`, or `write_latent` and `attend_latent` (MLA, for which the last two are the same: `latent.py`);
the step ends with `sample`; and none knows which it is. What experts compute follows from where their weights are, whatever
attention takes: `run_experts`. Padding is a sequence whose page table names page 0, which nobody owns.

    python -m pytest tests/test_attention.py
"""

import importlib.util
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError
from kernels import reference_write, sampling
from kernels.decode_loops import decode_in_loops
from kernels.experts import experts
from kernels.latent import latent_decode, latent_extend
from kernels.reference import Rectangles, cut, history_slots, one_rectangle, paged_reference, paged_sdpa, slots_at
from kernels.reference_mla import absorb_query, project_output
from kernels.sampling import SamplingTensors
from kernels.variants import Mask, Variant

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from kernels import kv_write, sampler
    from kernels.decode import paged_decode
    from kernels.grouped import grouped_experts
    from kernels.mla import mla_decode
    from kernels.mla_extend import mla_step
    from kernels.paged import INTERPRETED, MAX_HEAD_DIM
    from kernels.prefill import paged_prefill

BACKENDS = ("auto", "reference", "sdpa", "triton")


def choose_backend(name: str, device: torch.device, head_dim: int, latent: tuple[int, int] | None = None) -> str:
    """-> reference, sdpa or triton. "auto" is triton on a GPU and sdpa elsewhere. UserError for what cannot run there.

    latent: with MLA, its rank and how many dims are rotated; `head_dim` is then no matter.
    """
    if name not in BACKENDS:
        raise UserError(f"attention must be one of {', '.join(BACKENDS)}, not {name!r}")
    if name == "auto":
        name = "triton" if device.type == "cuda" else "sdpa"
    if name == "triton":
        if not HAS_TRITON:
            raise UserError("attention 'triton': Triton is not installed (pip install triton; it exists for Linux)")
        if device.type != "cuda" and not INTERPRETED:
            raise UserError(f"attention 'triton' needs a GPU, not {device} (TRITON_INTERPRET=1 simulates one, slowly)")
        if latent is not None:
            if any(size < 16 or size & (size - 1) for size in latent):
                limit = "a kv_lora_rank and a qk_rope_head_dim that are powers of 2, at least 16"
                raise UserError(
                    f"attention 'triton' takes {limit}, not {latent[0]} and {latent[1]}: use 'sdpa' (--attention sdpa)"
                )
        elif head_dim % 8 or head_dim > MAX_HEAD_DIM:
            limit = f"head dims that are multiples of 8, up to {MAX_HEAD_DIM}"
            raise UserError(f"attention 'triton' takes {limit}, not {head_dim}: use 'sdpa' (--attention sdpa)")
    return name


@dataclass
class Pages:
    """Histories as the Triton kernels find them."""

    page_table: Tensor  # [B, N]
    page_size: int
    query_start: Tensor | None  # [B + 1] where each sequence's new tokens begin, and the end; None: a decode, one each
    lengths: Tensor  # [B] of each sequence, its new tokens included
    on_host: Tensor | None  # [2 B] on the CPU: position of each first new token, how many there are; None: a decode


@dataclass
class Slots:
    """Histories as the compiler's own loops find them: a decode on a CPU."""

    slots: Tensor  # [B, L] of each history entry


@dataclass
class Layout:
    """How a step lies in memory, for all layers."""

    positions: Tensor  # [T] of each new token in its sequence
    write_slots: Tensor  # [T] where its key and value go
    history: Pages | Rectangles | Slots


def lay_out(
    starts: Sequence[int],
    lengths: Sequence[int],
    spans: Tensor,
    page_table: Tensor,
    page_size: int,
    backend: str,
    variants: Collection[Variant],
    groups: int,
    dtype: torch.dtype,
) -> Layout:
    """starts, lengths [B]: position of each sequence's first new token, and how many there are; spans [2, B]: both, on the
    device; page_table [B, N] -> Layout. Not for a graph: its shapes follow from the numbers.

    The table's columns must reach as far as the longest history. `variants`: of the layers. `groups`: query heads of one KV
    head.
    """
    device = page_table.device
    start, length = spans
    end = length.cumsum(0)
    sequence = torch.repeat_interleave(length, output_size=sum(lengths))
    positions = torch.arange(sum(lengths), device=device) + (start - end + length)[sequence]
    if backend == "triton":
        offsets, on_host = torch.nn.functional.pad(end, (1, 0)), torch.tensor([*starts, *lengths])
        history = Pages(page_table, page_size, offsets, start + length, on_host)
    else:
        masks = masks_for_sdpa(variants, backend)
        history = cut(starts, lengths, positions, page_table, page_size, masks, groups, dtype)
    write_slots = page_table[sequence, positions // page_size] * page_size + positions % page_size
    return Layout(positions, write_slots, history)


def lay_out_decode(
    positions: Tensor,
    page_table: Tensor,
    page_size: int,
    backend: str,
    variants: Collection[Variant],
    groups: int,
    dtype: torch.dtype,
) -> Layout:
    """positions [B] of one new token each, page_table [B, N] -> Layout. Looks at no number, so it may be part of a graph.

    Compiled for a CPU, attention becomes the compiler's own loops over the pages, whatever the backend.
    """
    if backend == "triton":
        history = Pages(page_table, page_size, None, positions + 1, None)
    else:
        history = Slots(history_slots(page_table, positions, page_size))
        if not torch.compiler.is_compiling():
            history = one_rectangle(history.slots, positions, masks_for_sdpa(variants, backend), groups, dtype)
    return Layout(positions, slots_at(page_table, positions[:, None], page_size)[:, 0], history)


def masks_for_sdpa(variants: Collection[Variant], backend: str) -> list[Mask]:
    """The masks of those layers that SDPA can do."""
    return list(dict.fromkeys(v.mask for v in variants if backend == "sdpa" and v.only_masks))


def write(
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    cos_sin: tuple[Tensor, Tensor] | None,
    interleaved: bool,
) -> Tensor:
    """Put k [T, K, D], rotated, and v [T, K, V] into the pages -> q [T, H, D], rotated. cos_sin None: nothing is rotated."""
    kernels = kv_write if isinstance(layout.history, Pages) else reference_write
    if cos_sin is None:
        kernels.write_kv(keys, values, layout.write_slots, k, v)
        return q
    return kernels.rope_and_write(q, k, v, keys, values, *cos_sin, layout.write_slots, interleaved)


def attend(
    layout: Layout,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    variant: Variant,
    sinks: Tensor | None = None,
) -> Tensor:
    """Each new token attends to its sequence's pages, up to and with itself: q [T, H, D] -> [T, H, V]. sinks [H]: see `Variant`."""
    h = layout.history
    if isinstance(h, Slots):
        return decode_in_loops(q, keys, values, h.slots, layout.positions, scale, variant, sinks)
    if isinstance(h, Pages):
        args = (q, keys, values, h.page_table)
        if h.query_start is None:
            return paged_decode(*args, h.lengths, h.page_size, scale, variant, sinks=sinks)
        return paged_prefill(*args, h.query_start, h.lengths, h.page_size, scale, variant, sinks)
    bias = h.bias.get(variant.mask) if variant.only_masks else None
    if bias is not None and (sinks is None or q.device.type == "cpu"):
        return paged_sdpa(q, keys, values, h.read_slots, h.shapes, scale, bias, sinks)
    return paged_reference(q, keys, values, h.read_slots, h.shapes, scale, layout.positions, *variant.flat, sinks)


def run_experts(
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
    """Each token through the experts that it chose: x [T, hidden] -> [T, hidden]; the arguments of `kernels.experts.experts`.

    On a GPU the Triton kernels, which never wait for it; without Triton, and elsewhere, one expert after the other.
    """
    run = grouped_experts if x.is_cuda and HAS_TRITON else experts
    return run(x, chosen, weights, gate_up, down, gate_up_bias, down_bias, activation, clamp, weigh_input)


def write_latent(
    layout: Layout,
    q_rope: Tensor,
    k_rope: Tensor,
    latent: Tensor,
    cache: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    interleaved: bool,
) -> Tensor:
    """MLA: put [latent [T, R] | k_rope [T, rope], rotated] into the pages -> q_rope [T, H, rope], rotated."""
    kernels = kv_write if isinstance(layout.history, Pages) else reference_write
    return kernels.rope_and_write_latent(q_rope, k_rope, latent, cache, *cos_sin, layout.write_slots, interleaved)


def attend_latent(layout: Layout, q_nope: Tensor, q_rope: Tensor, kv_up: Tensor, cache: Tensor, scale: float) -> Tensor:
    """MLA: q_nope [T, H, nope], q_rope [T, H, rope], kv_up [H, nope + V, R], cache [slots, R + rope] -> [T, H, V]."""
    h, nope = layout.history, q_nope.shape[2]
    if isinstance(h, Slots):
        return latent_decode(q_nope, q_rope, kv_up, cache, h.slots, layout.positions, scale)
    if isinstance(h, Rectangles):
        return latent_extend(q_nope, q_rope, kv_up, cache, h.read_slots, h.shapes, layout.positions, scale)
    if h.query_start is not None:
        where = h.page_table, h.query_start, h.lengths, h.on_host
        return mla_step(q_nope, q_rope, kv_up, cache, *where, h.page_size, scale)
    query = absorb_query(q_nope, kv_up[:, :nope])
    out = mla_decode(query, q_rope, cache, h.page_table, h.lengths, h.page_size, scale)
    return project_output(out, kv_up[:, nope:])


def sample(
    backend: str,
    logits: Tensor,
    state: SamplingTensors,
    rows: Tensor,
    positions: Tensor,
    bitmask: Tensor | None = None,
) -> Tensor:
    """logits [B, V] float32 -> token ids [B], by the parameters of `rows` [B] of `state`; see `kernels/sampling.py`."""
    kernels = sampler if backend == "triton" else sampling
    return kernels.sample(logits, state, rows, positions, bitmask)
