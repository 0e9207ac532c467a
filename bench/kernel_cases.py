"""The shapes that `bench.kernels` measures: what each has to move and to compute, how it is set up, and its peers.

The floor of a case is max(bytes / copy bandwidth, operations / matmul rate), with everything that must be read or
written counted once. Heads are those of Llama 3 8B, for MLA those of DeepSeek-V2 and V3; pages have 16 tokens and are
shuffled. A call takes the next of many copies of what it reads, until the L2 cache holds nothing of it when its turn
comes again: `Rig.copies`.

    python -m bench.kernels

Shapes: B sequences, T new tokens, L history, H query heads, K KV heads, D head dim, R latent rank, V vocabulary.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import flex_attention

from bench.gpu_clock import Call, Measure, graph_clock, host_clock
from kernels import kv_write, mla, reference_write, sampler, sampling
from kernels.decode import paged_decode
from kernels.prefill import paged_prefill
from kernels.reference import history_slots
from kernels.reference_mla import absorb_query, mla_absorbed, project_output

GIB = 1 << 30
MOST_COPIES = 512
SPARE = 4 * GIB  # of GPU memory, for what a case allocates beside its data


class Skipped(Exception):
    """Why a case or a peer is not measured here."""


class Wrong(Exception):
    """What is wrong with a result."""


@dataclass(frozen=True)
class Rig:
    """Where it all runs: a GPU, or Triton's interpreter on a CPU, where only the answers mean something."""

    device: torch.device
    dtype: torch.dtype
    clock: Callable[[list[Call]], Measure]
    flash: SDPBackend
    compiler: str  # a backend of torch.compile
    cold_bytes: int  # after so many others the L2 cache has nothing left of a byte
    most_copies: int
    free: Callable[[], float]  # bytes

    def copies(self, size: int) -> int:
        """How many different sets of `size` bytes a round of calls reads."""
        return max(1, min(self.most_copies, -(-self.cold_bytes // size)))

    def require(self, size: float, what: str) -> None:
        if size + SPARE > self.free():
            raise Skipped(f"{what}: {size / 1e9:.0f} GB, and {self.free() / 1e9:.0f} GB are free")

    def compile(self, function: Callable) -> Callable:
        return compiled(function, self.compiler)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Made in place: the largest are a quarter of the memory."""
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0, scale)


@functools.cache
def compiled(function: Callable, backend: str) -> Callable:
    """Kept, so that cases of one shape share a compilation."""
    return torch.compile(function, backend=backend, dynamic=False)


def gpu_rig() -> Rig:
    device = torch.device("cuda")
    cold = 3 * torch.cuda.get_device_properties(device).L2_cache_size
    return Rig(
        *(device, torch.bfloat16, graph_clock, SDPBackend.FLASH_ATTENTION, "inductor", cold, MOST_COPIES),
        free=lambda: torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(),
    )


def tiny_rig() -> Rig:
    """float16 instead of bfloat16, which the interpreter computes wrongly."""
    cpu = torch.device("cpu")
    return Rig(cpu, torch.float16, host_clock, SDPBackend.MATH, "eager", GIB, 2, free=lambda: float("inf"))


@dataclass(frozen=True)
class Goal:
    """`least` of the share of the ceiling ("share"), or of the speed of the fastest peer whose name begins so."""

    what: str
    least: float


@dataclass
class Built:
    """A case with its data: the calls of one round, one a copy.

    A call gives a tensor or several. They are compared with `reference(copy)`, by default with the first peer; what
    `project` makes of them with every other peer. Peers are made one by one: one that cannot be is left out.
    """

    calls: list[Call]
    peers: dict[str, Callable[[], list[Call]]]
    reference: Callable[[int], Any] | None = None
    project: Callable[[Any], Any] = lambda out: out
    differ: Callable[[Any, Any], float] = field(default_factory=lambda: relative_error)


@dataclass(frozen=True)
class Case:
    group: str
    name: str
    size: int  # bytes that a call has to move
    flops: int
    rotated: int  # bytes of it that differ from copy to copy
    build: Callable[[Rig], Built]
    goals: tuple[Goal, ...] = ()


def relative_error(out: Any, wanted: Any) -> float:
    """||out - wanted|| / ||wanted||, the largest of several."""
    if isinstance(out, Tensor):
        out, wanted = (out,), (wanted,)
    return worst(float((o.float() - w.float()).norm() / w.float().norm()) for o, w in zip(out, wanted, strict=True))


def worst(errors: Iterable[float]) -> float:
    """The largest, and of all numbers NaN is."""
    return max(errors, key=lambda e: (math.isnan(e), e))


def share_that_differs(out: Tensor, wanted: Tensor) -> float:
    return float((out != wanted).float().mean())


def short(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


# ---- histories on pages


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    dim: int
    page_size: int

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    def kv_bytes(self, tokens: int) -> int:
        """Of keys and values of 2 bytes a number."""
        return 2 * 2 * self.kv * self.dim * tokens


LLAMA_8B = Heads(32, 8, 128, 16)
TINY = Heads(4, 2, 16, 8)


def shuffled_tables(rig: Rig, copies: int, B: int, longest: int, page_size: int) -> list[Tensor]:
    """A page table [B, N] for each copy; all their pages are different ones of a pool of copies * B * N."""
    N = -(-longest // page_size)
    pages = torch.randperm(copies * B * N, device=rig.device).view(copies, B, N)
    return [table.clone() for table in pages]  # one by one, each aligned


def pool_slots(tables: list[Tensor], page_size: int) -> int:
    return sum(table.numel() for table in tables) * page_size


def rows_of(table: Tensor, length: int, page_size: int) -> Tensor:
    """Slots [length] of the history on the pages `table` [N]."""
    last = torch.full((1,), length - 1, device=table.device)
    return history_slots(table[None], last, page_size)[0, :length]


def make_pools(rig: Rig, heads: Heads, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values [slots, K, D]."""
    slots = pool_slots(tables, heads.page_size)
    rig.require(heads.kv_bytes(slots), "keys and values")
    return rig.normal(slots, heads.kv, heads.dim), rig.normal(slots, heads.kv, heads.dim)


def contiguous_history(pool: Tensor, table: Tensor, length: int, page_size: int) -> Tensor:
    """pool [slots, K, D], table [B, N] -> [B, K, length, D], for those who know no pages."""
    out = torch.empty(len(table), pool.shape[1], length, pool.shape[2], dtype=pool.dtype, device=pool.device)
    for b, pages in enumerate(table):
        out[b] = pool[rows_of(pages, length, page_size)].transpose(0, 1)
    return out


def sdpa(rig: Rig, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Any = None) -> Tensor:
    """q [B, H, T, D], k and v [B, K, L, D] -> [B, H, T, D], by FlashAttention or not at all."""
    with sdpa_kernel(rig.flash):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True)


# ---- decode


def decode_cases(tiny: bool) -> Iterator[Case]:
    heads = TINY if tiny else LLAMA_8B
    shapes = [(2, 40), (1, 300)] if tiny else [(B, L << 10) for B in (1, 16, 64, 256) for L in (1, 8, 32)]
    for B, L in shapes:
        history = heads.kv_bytes(B * L)
        size = history + 2 * 2 * B * heads.query * heads.dim + 8 * B * -(-L // heads.page_size)  # q, out, page table
        goals = (Goal("share", 0.85),) if history > 500e6 else ()
        flex = tiny or (B, L) in FLEX_SHAPES
        build = partial(build_decode, heads=heads, B=B, L=L, flex=flex)
        yield Case("decode", f"{B} x {short(L)}", size, decode_flops(heads, B * L), history, build, goals)


FLEX_SHAPES = [(1, 32 << 10), (16, 8 << 10), (64, 8 << 10)]  # FlexAttention is compiled for each: seconds


def decode_flops(heads: Heads, keys: int) -> int:
    """A product with the key and one with the value, of every query head, for each of the keys that are seen."""
    return 4 * heads.query * heads.dim * keys


def build_decode(rig: Rig, heads: Heads, B: int, L: int, flex: bool) -> Built:
    S = heads.page_size
    tables = shuffled_tables(rig, rig.copies(heads.kv_bytes(B * L)), B, L, S)
    keys, values = make_pools(rig, heads, tables)
    q = rig.normal(B, heads.query, heads.dim)
    lengths = torch.full((B,), L, device=rig.device)

    @functools.cache
    def histories() -> list[tuple[Tensor, Tensor]]:
        rig.require(heads.kv_bytes(L * B * len(tables)), "contiguous keys and values")
        return [tuple(contiguous_history(pool, table, L, S) for pool in (keys, values)) for table in tables]

    def by_sdpa() -> list[Call]:
        return [lambda k=k, v=v: sdpa(rig, q[:, :, None], k, v, heads.scale)[:, :, 0] for k, v in histories()]

    def by_flex() -> list[Call]:
        attend = partial(rig.compile(flex_attention), scale=heads.scale, enable_gqa=True)
        return [lambda k=k, v=v: attend(q[:, :, None], k, v)[:, :, 0] for k, v in histories()]

    peers = {"SDPA flash": by_sdpa}
    if flex:
        peers["FlexAttention"] = by_flex
    peers["FlashInfer"] = partial(flashinfer_decode, heads, q, keys, values, tables, L)
    calls = [partial(paged_decode, q, keys, values, table, lengths, S, heads.scale) for table in tables]
    return Built(calls, peers)


def flashinfer_decode(
    heads: Heads, q: Tensor, keys: Tensor, values: Tensor, tables: list[Tensor], L: int
) -> list[Call]:
    """FlashInfer (Ye et al., 2025) plans a batch on the host and keeps the plan in a wrapper: one for each copy."""
    if importlib.util.find_spec("flashinfer") is None:
        raise Skipped("not installed")
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    B, N = tables[0].shape
    pages = tuple(pool.view(-1, heads.page_size, heads.kv, heads.dim) for pool in (keys, values))
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)  # the calls run one after the other
    indptr = torch.arange(0, B * N + 1, N, dtype=torch.int32, device=q.device)
    in_last = torch.full((B,), (L - 1) % heads.page_size + 1, dtype=torch.int32, device=q.device)
    calls = []
    for table in tables:
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=heads.query > heads.kv)
        wrapper.plan(
            *(indptr, table.flatten().int(), in_last, heads.query, heads.kv, heads.dim, heads.page_size),
            q_data_type=q.dtype,
            kv_data_type=keys.dtype,
            sm_scale=heads.scale,
        )
        calls.append(partial(wrapper.run, q, pages))
    return calls


# ---- prefill


def prefill_cases(tiny: bool) -> Iterator[Case]:
    """Each: new tokens and prefix of every sequence."""
    if tiny:
        heads, shapes = TINY, {"24": [(24, 0)], "8 behind 16": [(8, 16)], "ragged": [(12, 0), (4, 13), (1, 7)]}
    else:
        heads, shapes = LLAMA_8B, {short(n << 10): [(n << 10, 0)] for n in (1, 2, 4, 8, 16)}
        shapes |= {"1k behind 8k": [(1024, 8192)], "4k behind 4k": [(4096, 4096)]}
        shapes["ragged: 2k, 512 behind 4k, 300 behind 1000, 16 decodes at 8k"] = [
            *[(2048, 0), (512, 4096), (300, 1000)],
            *[(1, 8191)] * 16,
        ]
    for name, sequences in shapes.items():
        flops = decode_flops(heads, sum(keys_seen(new, prefix) for new, prefix in sequences))
        new, history = (sum(x) for x in zip(*((n, n + p) for n, p in sequences), strict=True))
        size = heads.kv_bytes(history) + 2 * 2 * new * heads.query * heads.dim
        goals = (Goal("SDPA flash", 0.9), *([Goal("share", 0.6)] if new == 16 << 10 else []))
        build = partial(build_prefill, heads=heads, sequences=sequences)
        yield Case("prefill", name, size, flops, heads.kv_bytes(history), build, goals)


def keys_seen(new: int, prefix: int) -> int:
    """By all new tokens together: each sees the prefix, the new ones before it and itself."""
    return new * prefix + new * (new + 1) // 2


def build_prefill(rig: Rig, heads: Heads, sequences: list[tuple[int, int]]) -> Built:
    S = heads.page_size
    news, lengths = [new for new, _ in sequences], [new + prefix for new, prefix in sequences]
    tables = shuffled_tables(rig, rig.copies(heads.kv_bytes(sum(lengths))), len(sequences), max(lengths), S)
    keys, values = make_pools(rig, heads, tables)
    q = rig.normal(sum(news), heads.query, heads.dim)
    starts = torch.tensor([0, *news], device=rig.device).cumsum(0)

    def by_sdpa() -> list[Call]:
        """One call a sequence: SDPA knows no ragged batches."""
        queries = [part.transpose(0, 1)[None] for part in q.split(news)]
        biases = [causal_lower_right(new, length) for new, length in zip(news, lengths, strict=True)]
        histories = [
            [[contiguous_history(p, table[b : b + 1], n, S) for p in (keys, values)] for b, n in enumerate(lengths)]
            for table in tables
        ]

        def run(copy: list[list[Tensor]]) -> tuple[Tensor, ...]:
            each = zip(queries, copy, biases, strict=True)
            return tuple(sdpa(rig, x, *kv, heads.scale, bias)[0].transpose(0, 1) for x, kv, bias in each)

        return [partial(run, copy) for copy in histories]

    ends = torch.tensor(lengths, device=rig.device)
    calls = [partial(paged_prefill, q, keys, values, table, starts, ends, S, heads.scale) for table in tables]
    return Built(calls, {"SDPA flash": by_sdpa}, project=lambda out: out.split(news))


# ---- MLA


@dataclass(frozen=True)
class Latent:
    rank: int
    rope: int
    nope: int
    value: int
    page_size: int

    @property
    def scale(self) -> float:
        return (self.nope + self.rope) ** -0.5


DEEPSEEK = Latent(512, 64, 128, 128, 16)
TINY_LATENT = Latent(32, 16, 16, 16, 8)


def mla_cases(tiny: bool) -> Iterator[Case]:
    dims = TINY_LATENT if tiny else DEEPSEEK
    shapes = [(4, 2, 40), (4, 1, 300)] if tiny else []
    shapes = shapes or [(H, B, L << 10) for H in (16, 128) for B in (1, 16, 64, 128) for L in (1, 8, 32)]
    for H, B, L in shapes:
        history, flops = mla_bytes(dims, B * L), mla_flops(dims, H, B * L)
        size = history + 2 * B * H * (2 * dims.rank + dims.rope)  # q and out
        build = partial(build_mla, dims=dims, H=H, B=B, L=L)
        goals = (Goal("share", 0.8), Goal("expanded", 7))
        yield Case("mla", f"{H} heads, {B} x {short(L)}", size, flops, history, build, goals)


def mla_bytes(dims: Latent, tokens: int) -> int:
    return 2 * (dims.rank + dims.rope) * tokens


def mla_flops(dims: Latent, H: int, keys: int) -> int:
    """A score from R + rope products, and R of them with the weight."""
    return 2 * H * (2 * dims.rank + dims.rope) * keys


def build_mla(rig: Rig, dims: Latent, H: int, B: int, L: int) -> Built:
    """Random projections, so that the absorbed form and the expanded one have to agree."""
    S = dims.page_size
    tables = shuffled_tables(rig, rig.copies(mla_bytes(dims, B * L)), B, L, S)
    rig.require(mla_bytes(dims, pool_slots(tables, S)), "the cache")
    cache = rig.normal(pool_slots(tables, S), dims.rank + dims.rope)
    w_k = rig.normal(H, dims.nope, dims.rank, scale=dims.rank**-0.5)
    w_v = rig.normal(H, dims.value, dims.rank, scale=dims.rank**-0.5)
    q_nope, q_rope = rig.normal(B, H, dims.nope), rig.normal(B, H, dims.rope)
    q_latent = absorb_query(q_nope, w_k)
    lengths = torch.full((B,), L, device=rig.device)
    splits = mla.balanced_splits(lengths, H, L, rig.dtype)  # an engine makes them once a step, for all layers

    def reference(copy: int) -> Tensor:
        """float32, one sequence after the other: of the cache in float32 there would be no room for all."""
        one = torch.tensor([0, 1], device=rig.device)
        in_order = torch.arange(-(-L // S), device=rig.device)[None]
        outs = []
        for b, pages in enumerate(tables[copy]):
            rows, q = cache[rows_of(pages, L, S)].float(), (q_latent[b : b + 1].float(), q_rope[b : b + 1].float())
            outs.append(mla_absorbed(*q, rows, in_order, one, lengths[b : b + 1], S, dims.scale))
        return torch.cat(outs)

    @functools.cache
    def expanded() -> list[tuple[Tensor, Tensor]]:
        width = dims.nope + dims.rope
        rig.require(2 * 2 * H * width * L * B * len(tables), "expanded keys and values")
        return [expand(cache, table, w_k, w_v, L, S, width) for table in tables]

    query = torch.cat((q_nope, q_rope), -1)[:, :, None]

    def by_sdpa() -> list[Call]:
        """By whatever kernel torch takes where keys and values differ in width."""
        attend = partial(F.scaled_dot_product_attention, query, scale=dims.scale)
        return [lambda k=k, v=v: attend(k, v[..., : dims.value])[:, :, 0] for k, v in expanded()]

    def by_flash() -> list[Call]:
        """FlashAttention wants equal widths: zeros fill up the values, which it has to read."""
        return [lambda k=k, v=v: sdpa(rig, query, k, v, dims.scale)[:, :, 0, : dims.value] for k, v in expanded()]

    attend = partial(mla.mla_decode, q_latent, q_rope, cache)
    calls = [partial(attend, t, lengths, page_size=S, scale=dims.scale, splits=splits) for t in tables]
    peers = {"expanded, SDPA": by_sdpa, "expanded, SDPA flash": by_flash}
    return Built(calls, peers, reference, project=lambda out: project_output(out.float(), w_v.float()))


def expand(
    cache: Tensor, table: Tensor, w_k: Tensor, w_v: Tensor, L: int, page_size: int, width: int
) -> tuple[Tensor, Tensor]:
    """The keys and values that MLA does without: [B, H, L, width] each, the values filled up with zeros."""
    (H, V, R), B = w_v.shape, len(table)
    keys = torch.empty(B, H, L, width, dtype=cache.dtype, device=cache.device)
    values = torch.zeros_like(keys)
    for b, pages in enumerate(table):
        rows = cache[rows_of(pages, L, page_size)]
        latent, rope = rows[:, :R], rows[:, R:]
        keys[b, :, :, : w_k.shape[1]] = torch.einsum("lr,hnr->hln", latent, w_k)
        keys[b, :, :, w_k.shape[1] :] = rope
        values[b, :, :, :V] = torch.einsum("lr,hvr->hlv", latent, w_v)
    return keys, values


# ---- sampling

SAMPLING = {
    "greedy": dict(temperature=0.0),
    "top-p 0.9": dict(temperature=1.0, top_p=0.9),
    "top-k 50, top-p 0.95": dict(temperature=1.0, top_k=50, top_p=0.95),
}


def sampling_cases(tiny: bool) -> Iterator[Case]:
    """Floor: the logits, read once. Copy bandwidth is taken for what a GPU reads, though it also writes half of that."""
    V, batches = (500, (2,)) if tiny else (128256, (1, 64, 256))
    for B in batches:
        for name, params in SAMPLING.items():
            size = 4 * B * V
            build = partial(build_sampling, B=B, V=V, params=params)
            yield Case("sampling", f"{name}, {B} x {V}", size, 0, size, build, (Goal("share", 1 / 3),))


def build_sampling(rig: Rig, B: int, V: int, params: dict[str, float]) -> Built:
    """Logits from N(0, 4^2), of which the best few hold most of the mass, as a model's do."""
    copies = rig.copies(4 * B * V)
    state = sampling.SamplingTensors.empty(copies * B + 1, V, rig.device)
    for name, value in params.items():
        getattr(state, name).fill_(value)
    state.seed.copy_(torch.arange(len(state.seed)))
    positions = torch.arange(B, device=rig.device) + 1000
    logits = [torch.empty(B, V, device=rig.device).normal_(0, 4) for _ in range(copies)]
    rows = [torch.arange(B, device=rig.device) + 1 + i * B for i in range(copies)]  # row 0 is padding

    def by_torch() -> list[Call]:
        plain = rig.compile(sampling.sample)
        return [partial(plain, x, state, r, positions) for x, r in zip(logits, rows, strict=True)]

    calls = [partial(sampler.sample, x, state, r, positions) for x, r in zip(logits, rows, strict=True)]
    return Built(calls, {"compiled PyTorch": by_torch}, differ=share_that_differs)


# ---- the write


def write_cases(tiny: bool) -> Iterator[Case]:
    heads = TINY if tiny else LLAMA_8B
    for T in (2, 8) if tiny else (1, 64, 256, 8192):
        size = write_bytes(heads, T)
        yield Case("write", f"{short(T)} tokens", size, 0, size, partial(build_write, heads=heads, T=T))


def write_bytes(heads: Heads, T: int) -> int:
    """Queries, keys and values are read and written; cos, sin and slots are read."""
    return T * (2 * 2 * heads.dim * (heads.query + 2 * heads.kv) + 4 * heads.dim + 8)


def build_write(rig: Rig, heads: Heads, T: int) -> Built:
    """Queries, keys and values are views of one product, as a model makes them. Each side writes to a pool of its own."""
    H, K, D = heads.query, heads.kv, heads.dim
    copies = rig.copies(write_bytes(heads, T))
    slots = [s.clone() for s in torch.randperm(copies * T, device=rig.device).view(copies, T)]
    parts = [rig.normal(T, H + 2 * K, D).split((H, K, K), 1) for _ in range(copies)]
    angles = torch.rand(T, D // 2, device=rig.device) * 6
    cos, sin = angles.cos(), angles.sin()

    def write_with(function: Callable) -> list[Call]:
        keys, values = (torch.zeros(copies * T, K, D, dtype=rig.dtype, device=rig.device) for _ in range(2))

        def run(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return function(q, k, v, keys, values, cos, sin, at, False), keys, values

        return [partial(run, *qkv, at) for qkv, at in zip(parts, slots, strict=True)]

    def by_torch() -> list[Call]:
        return write_with(rig.compile(reference_write.rope_and_write))

    return Built(write_with(kv_write.rope_and_write), {"compiled PyTorch": by_torch})


GROUPS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "decode": decode_cases,
    "prefill": prefill_cases,
    "mla": mla_cases,
    "sampling": sampling_cases,
    "write": write_cases,
}
