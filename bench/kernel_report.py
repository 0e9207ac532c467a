"""What the compiler makes of every Triton kernel: registers, spills, shared memory, instructions. Needs no GPU.

The kernels' own Python wrappers run here as if on the GPU that is asked for, choose a configuration, and are compiled
instead of launched (`bench/compile_ahead.py`). So the table shows what they would launch. Triton compiles even what
does not fit, so that has to be looked at: DOES NOT FIT.

    python -m bench.kernel_report
    python -m bench.kernel_report --arch gfx942 --kernel decode prefill

With another Triton:

    pip install --no-deps --target .tr360 triton==3.6.0
    PYTHONPATH=.tr360 python -m bench.kernel_report

`tests/test_kernel_compile.py` fails if a default configuration spills, does not fit, or misses the tensor cores.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

os.environ.pop("TRITON_INTERPRET", None)  # this is about the compiler

import torch
import triton
from torch import Tensor

from bench.compile_ahead import CHIPS, Kernel, compiling
from kernels.decode import paged_decode
from kernels.grouped import grouped_experts
from kernels.kv_write import rope_and_write, rope_and_write_latent, write_kv
from kernels.mla import mla_decode, mla_extend
from kernels.mla_splits import Splits
from kernels.prefill import paged_prefill
from kernels.sampler import sample
from kernels.sampling import SamplingTensors
from kernels.variants import CAUSAL, Variant

KV_HEADS = 8
ROPE = 64  # dims of MLA's rotated key


@dataclass(frozen=True)
class Case:
    """A launch: what the model looks like, and what it asks for."""

    kernel: str  # of LAUNCHES
    dim: int = 128  # of a head; in MLA of the latent; in sampling the vocabulary; of experts the hidden size
    dtype: str = "bfloat16"
    group: int = 4  # query heads of a KV head; in MLA all of them; of experts the mean number of rows
    page_size: int = 16
    variant: str = "causal"
    value_dim: int | None = None  # None: as the keys; of experts their intermediate size


def cases(arch: str) -> list[Case]:
    """Every head dim and dtype, and for the commonest of them every group, page size and variant. Nothing has been
    tuned for AMD: there, one of each shape of tiles."""
    kinds = ("decode", "prefill")
    dims = (64, 80, 96, 128, 192, 256)
    found = [Case(k, dim, dtype) for k in kinds for dim in dims for dtype in ("bfloat16", "float32")]
    found += [Case(k, dtype="float16") for k in kinds]
    found += [Case(k, group=group) for k in kinds for group in (1, 7, 32, 71)]
    found += [Case(k, page_size=size) for k in kinds for size in (1, 128)]
    found += [Case(k, variant=v) for k in kinds for v in ("softcap", "window", "alibi", "sinks", "softcap window")]
    found += [Case(k, 256, variant="softcap window") for k in kinds]  # Gemma 2 and 3
    found += [Case(k, 64, group=8, variant="window sinks") for k in kinds]  # gpt-oss
    found += [Case(k, group=5, variant="chunk") for k in kinds]  # Llama 4
    found += [Case("direct"), Case("direct", variant="sinks"), Case("direct", 256)]
    found += [Case(k, 192, value_dim=128) for k in kinds]  # MLA in its expanded form

    found += [Case("mla_decode", 512, group=heads) for heads in (16, 20, 64, 128)]
    found += [Case("mla_decode", 512, group=heads, page_size=size) for heads in (16, 128) for size in (1, 128)]
    found += [Case("mla_decode", 512, dtype, group=16) for dtype in ("float16", "float32")]
    found += [Case("mla_direct", 512, group=heads) for heads in (16, 128)]
    found += [Case("mla_extend", 512, group=heads) for heads in (16, 128)]
    found += [Case("mla_extend", 512, group=128, page_size=size) for size in (1, 128)]
    found += [Case("mla_extend", 512, dtype, group=128) for dtype in ("float16", "float32")]
    found += [Case("mla_extend", 512, group=128, variant="splits")]

    qwen, oss, llama = (2048, 768), (2880, 2880), (5120, 8192)  # Qwen3-30B-A3B; gpt-oss; Llama 4
    found += [experts(qwen, group=rows) for rows in (1, 64, 128)]
    found += [experts(qwen, dtype) for dtype in ("float16", "float32")]
    found += [experts(oss, group=rows, variant="clamp bias") for rows in (1, 64, 128)]
    found += [experts(llama, group=rows, variant="weigh") for rows in (1, 128)]

    found += [Case("write"), Case("rope"), Case("rope", 80), Case("rope", variant="interleaved")]
    found += [Case("rope_latent", 512, group=heads, variant="interleaved") for heads in (16, 128)]
    found += [Case("sample", 128256, "float32"), Case("sample", 151936, "float32", variant="bitmask")]
    if arch.startswith("sm"):
        return found
    return [
        c
        for c in found
        if c.kernel == "sample" or c == replace(Case(c.kernel, c.dim, group=c.group), value_dim=c.value_dim)
    ]


def experts(sizes: tuple[int, int], dtype: str = "bfloat16", group: int = 1, variant: str = "causal") -> Case:
    return Case("experts", sizes[0], dtype, group, variant=variant, value_dim=sizes[1])


# ---- launches: only shapes count, so the tensors are small and hold nothing


def launch_attention(case: Case) -> None:
    dtype = getattr(torch, case.dtype)
    B, H = 500 if case.kernel == "direct" else 8, KV_HEADS * case.group  # 500 sequences fill any GPU without splits
    q = torch.zeros(B, H, case.dim, dtype=dtype)
    keys = torch.zeros(case.page_size, KV_HEADS, case.dim, dtype=dtype)
    values = torch.zeros(case.page_size, KV_HEADS, case.value_dim or case.dim, dtype=dtype)
    table, starts, lengths = batch(B, case.page_size)
    options = dict(page_size=case.page_size, scale=case.dim**-0.5, variant=variant_of(case.variant, H))
    options["sinks"] = torch.zeros(H) if "sinks" in case.variant else None
    if case.kernel == "prefill":
        paged_prefill(q, keys, values, table, starts, lengths, **options)
    else:
        paged_decode(q, keys, values, table, lengths, **options)


def batch(sequences: int, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> page table for histories of 8,192, first query of each, lengths; int64, as the engine's are."""
    table = torch.zeros(sequences, 8192 // page_size, dtype=torch.int64)
    return table, torch.zeros(sequences + 1, dtype=torch.int64), torch.zeros(sequences, dtype=torch.int64)


def variant_of(words: str, heads: int) -> Variant:
    if words == "causal":
        return CAUSAL
    softcap = ("softcap", (50.0,)) if "softcap" in words else ("", ())
    score = ("alibi", (torch.zeros(heads),)) if "alibi" in words else softcap
    mask = ("sliding_window", (4096,)) if "window" in words else ("", ())
    mask = ("chunk", (8192,)) if "chunk" in words else mask
    return Variant(*score, *mask)


def launch_mla(case: Case) -> None:
    dtype, B = getattr(torch, case.dtype), 8
    q_latent, q_rope = (torch.zeros(B, case.group, dim, dtype=dtype) for dim in (case.dim, ROPE))
    cache = torch.zeros(case.page_size, case.dim + ROPE, dtype=dtype)
    table, starts, lengths = batch(B, case.page_size)
    tokens = torch.full((1,), 256, dtype=torch.int32)
    if case.kernel == "mla_extend":
        splits = Splits(tokens, 8) if case.variant == "splits" else None
        mla_extend(q_latent, q_rope, cache, table, starts, lengths, case.page_size, 0.1, splits)
    else:
        splits = Splits(tokens, 1 if case.kernel == "mla_direct" else 8)
        mla_decode(q_latent, q_rope, cache, table, lengths, case.page_size, 0.1, splits)


def launch_write(case: Case) -> None:
    dtype, T, slots = getattr(torch, case.dtype), 8, torch.zeros(8, dtype=torch.int64)
    k = torch.zeros(T, KV_HEADS, case.dim, dtype=dtype)
    keys, values = (torch.zeros(case.page_size, KV_HEADS, case.dim, dtype=dtype) for _ in range(2))
    if case.kernel == "write":
        return write_kv(keys, values, slots, k, k)
    q, cos = torch.zeros(T, KV_HEADS * case.group, case.dim, dtype=dtype), torch.zeros(T, case.dim // 2)
    rope_and_write(q, k, k, keys, values, cos, cos, slots, case.variant == "interleaved")


def launch_write_latent(case: Case) -> None:
    dtype, T, slots = getattr(torch, case.dtype), 8, torch.zeros(8, dtype=torch.int64)
    q_rope, latent, cos = torch.zeros(T, case.group, ROPE, dtype=dtype), torch.zeros(T, case.dim), torch.zeros(T, 32)
    cache = torch.zeros(case.page_size, case.dim + ROPE, dtype=dtype)
    interleaved = case.variant == "interleaved"
    rope_and_write_latent(q_rope, q_rope[:, 0], latent.to(dtype), cache, cos, cos, slots, interleaved)


def launch_sample(case: Case) -> None:
    B, V = 2, case.dim
    rows = torch.zeros(B, dtype=torch.int64)
    bitmask = torch.zeros(B, -(-V // 32), dtype=torch.int32) if case.variant == "bitmask" else None
    sample(torch.zeros(B, V), SamplingTensors.empty(B, V, torch.device("cpu")), rows, rows, bitmask)


def launch_experts(case: Case) -> None:
    """Few experts, so that the weights are small: nothing but the sort depends on their number."""
    dtype, E, k, hidden, size = getattr(torch, case.dtype), 4, 2, case.dim, case.value_dim
    T = max(1, case.group * E // k)
    x, chosen = torch.zeros(T, hidden, dtype=dtype), torch.zeros(T, k, dtype=torch.int64)
    gate_up, down = torch.zeros(E, 2 * size, hidden, dtype=dtype), torch.zeros(E, hidden, size, dtype=dtype)
    biases = (gate_up[:, :, 0].contiguous(), down[:, :, 0].contiguous()) if "bias" in case.variant else (None, None)
    clamp = (1.702, 7.0) if "clamp" in case.variant else ()
    weights = torch.zeros(T, k)
    grouped_experts(x, chosen, weights, gate_up, down, *biases, "silu", clamp, "weigh" in case.variant)


LAUNCHES: dict[str, Callable[[Case], None]] = {
    "decode": launch_attention,  # with the merge of its splits
    "direct": launch_attention,  # decode in one split
    "prefill": launch_attention,
    "mla_decode": launch_mla,  # with the merge
    "mla_direct": launch_mla,
    "mla_extend": launch_mla,
    "write": launch_write,
    "rope": launch_write,
    "rope_latent": launch_write_latent,
    "experts": launch_experts,
    "sample": launch_sample,
}


# ---- the table


def report(arch: str, wanted: list[Case]) -> Iterator[tuple[Case, Kernel]]:
    """Each kernel of each case, once."""
    seen = set()
    for case in wanted:
        with compiling(arch) as kernels:
            LAUNCHES[case.kernel](case)
        for kernel in kernels:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                yield case, kernel


def line(case: Case, kernel: Kernel) -> str:
    dim = f"{case.dim}/{case.value_dim}" if case.value_dim else str(case.dim)
    what = f"{dim:>7} {case.dtype:<8} G{case.group:<3} S{case.page_size:<3} {case.variant:<14}"
    sizes = f"{tile(kernel):>7} {kernel.warps:>5} {kernel.stages:>6}"
    memory = f"{kernel.stack:>5} {kernel.spills:>6} {kernel.loop_spills:>8} {kernel.shared:>7}"
    costs = f"{kernel.registers:>9} {memory} {kernel.programs:>11}"
    counts = ", ".join(f"{n} {times}" for n, times in kernel.instructions.items())
    limit = "" if kernel.programs else " DOES NOT FIT"
    return f"{kernel.arch:<6} {kernel.name.removesuffix('_kernel'):<14} {what} {sizes} {costs}  {counts}{limit}"


def tile(kernel: Kernel) -> str:
    names = ("BLOCK_M", "BLOCK_S", "BLOCK_K", "BLOCK_N", "COLUMNS")
    return "x".join(str(kernel.constants[n]) for n in names if n in kernel.constants)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm80", "sm90"], choices=CHIPS)
    parser.add_argument("--kernel", nargs="+", default=list(LAUNCHES), choices=LAUNCHES)
    parser.add_argument("--json", action="store_true", help="one JSON object a kernel, nothing else")
    args = parser.parse_args()
    if not args.json:
        print(f"triton {triton.__version__}; G: query heads of a KV head, S: page size")
        print(f"{'':61}    tile warps stages registers stack spills in loops  shared programs/SM  instructions")
    for arch in args.arch:
        for case, kernel in report(arch, [c for c in cases(arch) if c.kernel in args.kernel]):
            record = {"case": asdict(case), **asdict(kernel), "tile": tile(kernel), "programs": kernel.programs}
            print(json.dumps(record) if args.json else line(case, kernel), flush=True)


if __name__ == "__main__":
    main()
