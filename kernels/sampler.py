"""From logits to tokens in three launches: what `kernels.sampling.sample` computes, without a sort.

Gumbel-max with noise that is fixed by (seed, position, token) turns sampling into a search: of the tokens that top-k,
top-p and min-p keep, find the one whose logit + noise is largest. What they keep is everything from some logit upwards.
So let t be the winner among ALL tokens:

- If t is among the kept, it is the answer. To know that, it takes only the mass of the tokens above t.
- If not, everything kept lies above t: the next candidate is the winner among the tokens above t.

Each rejected candidate cuts the mass that is left to a uniformly drawn part of it, so it takes about 1 + ln(1 / kept
mass) rounds: 1.1 for p = 0.9. FlashInfer's sampling kernels (Ye et al., 2025) reject with pivots like this and draw
anew each round; here the noise stays, so the result is exact and does not depend on how many rounds there were.

- `edit_kernel` copies the rows that have penalties, biases or early stops, and edits the copies. Mostly there are none.
- `survey_kernel` reads every row once, spread over the whole GPU: the largest logit, the sum of weights, the winner, and
  the peak of each stretch of 64 tokens.
- `settle_kernel`, one program a row, tests and replaces candidates. It reads only stretches whose peak is above the
  candidate. Top-k cuts at the k-th largest logit, found by bisection: first over the peaks, which are in registers and
  each stand for one token at least, and in memory only where these cannot tell.

Cost in bytes a row of V float32 logits. The floor is one reading, 4 V. Greedy or without filters: 4 V + V / 16 of peaks,
and settle reads nothing. A bitmask adds V / 8. Top-p and min-p: for each round the stretches that hold anything above
the candidate, 4 V at most, little where few tokens have most of the mass. Top-k: the stretches of the k best, 256 k at
most, once or twice as a rule, 40 times if the best tokens lie side by side. An edited row: 12 V more, for logits, `seen`
and the copy.

Prediction for an H200 (132 multiprocessors, 4.3 TB/s) and 256 rows of V = 128k; it has not been measured on a GPU. The
floor is 31 us. Survey takes 40 to 75: about 35 instructions a token hash it, weigh it and compare, which is as long as
reading it takes; its two logarithms would double that, and are left out for whole tiles where they cannot matter.
Settle takes 5 to 40: a step through its few stretches is 1 to 2 us of waiting for memory, and on wide distributions
top-p reads most of the row again. Per row and not per span, because a launch for each round would cost as much as a
round; a single row thus has one multiprocessor, 10 to 70 us. A sort moves values and 64-bit indices, 12 V, in and
out in each of its passes.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_sampling.py

Shapes: B sequences, V tokens, R rows of sampling parameters.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import paged
from kernels.sampling import PROMPT_BIT as _PROMPT_BIT
from kernels.sampling import SamplingTensors
from kernels.widths import MAX_BIAS, MAX_STOP_IDS

STRETCH = tl.constexpr(64)  # tokens that share a peak
TILE = tl.constexpr(32)  # stretches that a program holds in registers
LIST = tl.constexpr(1024)  # peaks that settle looks at together
SPAN = tl.constexpr(8192)  # tokens of a program of survey: fixed, so that no row's sums depend on its batch
FEW = tl.constexpr(8)  # logits that are dropped one by one
PROMPT_BIT = tl.constexpr(_PROMPT_BIT)
LIMIT = tl.constexpr(1.7e38)  # half of the largest float32, so that differences are finite
MAX_BATCH = 65535
MAX_VOCAB = 1 << 20  # whose peaks settle can hold at once
SLACK = tl.constexpr(1e-4)  # more than an error in the last bit of a logarithm


# ---- noise: `kernels.sampling.gumbel_noise`, bit for bit up to its logarithms


@triton.jit
def _mix(x):
    """uint32 -> uint32."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _key(seed, position):
    return _mix(_mix(_mix(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32)) ^ position.to(tl.uint32))


@triton.jit
def _bits(key, token):
    """-> 23 random bits of each token, int32."""
    return (_mix(key ^ _mix((token + 1).to(tl.uint32))) >> 9).to(tl.int32)


@triton.jit
def _gumbel(bits):
    """23 bits -> Gumbel(0, 1) noise, between -2.9 and 16.7. It grows with the bits."""
    uniform = (bits.to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -tl.log(-tl.log(uniform))


# ---- one row


@triton.jit
def _total(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _anchor(top):
    """What weights are relative to, exp(x - anchor): the largest logit, or the finite number nearest to it."""
    return tl.minimum(tl.maximum(top, -LIMIT), LIMIT)


@triton.jit
def _open(b, logits, edits, edited, rows, positions, temperature, seed, stride, V: tl.constexpr):
    """-> of row b: its logits, what they are multiplied by, the key of its noise, and its temperature."""
    r = tl.load(rows + b).to(tl.int64)
    heat = tl.load(temperature + r)
    scale = tl.div_rn(1.0, tl.where(heat > 0, tl.maximum(heat, 1e-5), 1.0))
    row = edits + b * V if tl.load(edited + b) != 0 else logits + b * stride
    return row, scale, _key(tl.load(seed + r), tl.load(positions + b)), heat


@triton.jit
def _read(row, words, token, scale, V: tl.constexpr):
    """Logits of a row as they are compared: bans and NaN are -inf, as is what lies behind the last token."""
    x = tl.load(row + token, mask=token < V, other=float("-inf")) * scale
    if words is not None:
        allowed = tl.load(words + token // 32, mask=token < V, other=0) >> (token % 32)
        x = tl.where((allowed & 1) != 0, x, float("-inf"))
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def _draw(x, token, key, random, best, best_token, best_x):
    """Let the tokens of a tile [n, STRETCH] compete with the best so far -> best logit + noise, its token, its logit.

    A hash is cheap, two logarithms are not: they are left out where each stretch's largest logit and largest noise
    together could not win. The first of equals wins; later tiles must have larger ids.
    """
    bits = tl.zeros_like(token)
    bound = tl.max(x, 1)
    if random:
        bits = _bits(key, token)
        bound += _gumbel(tl.max(bits, 1))
    if tl.max(bound, 0) > best - SLACK:
        score = x
        if random:
            score = x + _gumbel(bits)
        here = tl.max(tl.max(score, 1), 0)
        if here > best:
            best = here
            best_token = tl.min(tl.min(tl.where(score == here, token, 0x7FFFFFFF), 1), 0)
            best_x = tl.max(tl.max(tl.where(token == best_token, x, float("-inf")), 1), 0)
    return best, best_token, best_x


# ---- the first kernel


@triton.jit
def edit_kernel(
    edits,  # [B, V] float32
    edited,  # [B] int32
    logits,
    rows,
    positions,
    repetition_penalty,
    presence_penalty,
    frequency_penalty,
    stop_ids,
    stop_from,
    bias_ids,
    bias_values,
    seen,
    stride,
    V: tl.constexpr,
    BIASES: tl.constexpr,
    STOPS: tl.constexpr,
):
    """One program: one span of one row. `kernels.sampling.apply_penalties`, and whether there was anything to do."""
    b = tl.program_id(1).to(tl.int64)
    r = tl.load(rows + b).to(tl.int64)
    repetition = tl.load(repetition_penalty + r)
    presence = tl.load(presence_penalty + r)
    frequency = tl.load(frequency_penalty + r)
    i = tl.arange(0, triton.next_power_of_2(BIASES))
    bias = tl.load(bias_values + r * BIASES + i, mask=i < BIASES, other=0.0)
    j = tl.arange(0, triton.next_power_of_2(STOPS))
    stop = tl.load(stop_ids + r * STOPS + j, mask=j < STOPS, other=-1)
    stop = tl.where(tl.load(positions + b) < tl.load(stop_from + r), stop, -1)

    penalised = (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0)
    others = tl.max((bias != 0.0).to(tl.int32), 0) + tl.max((stop >= 0).to(tl.int32), 0)
    if tl.program_id(0) == 0:
        tl.store(edited + b, penalised.to(tl.int32) + others)
    if penalised | (others > 0):
        logits += b * stride
        edits += b * V
        seen += r * V
        first = tl.program_id(0) * SPAN
        last = tl.minimum(first + SPAN, V)
        for start in range(first, last, TILE * STRETCH):
            token = start + tl.arange(0, TILE * STRETCH)
            x = tl.load(logits + token, mask=token < V, other=0.0)
            if penalised:
                met = tl.load(seen + token, mask=token < V, other=0)
                count = met & (PROMPT_BIT - 1)
                x = tl.where(met != 0, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
                x = x - frequency * count.to(tl.float32) - tl.where(count > 0, presence, 0.0)
            tl.store(edits + token, x, mask=token < V)
        tl.debug_barrier()  # what follows changes what other threads have written
        biased = tl.load(bias_ids + r * BIASES + i, mask=i < BIASES, other=-1)
        tl.atomic_add(edits + biased, bias, mask=(biased >= first) & (biased < last) & (bias != 0.0))
        tl.debug_barrier()
        tl.store(edits + stop, tl.full([1], float("-inf"), tl.float32), mask=(stop >= first) & (stop < last))


# ---- the second


@triton.jit
def survey_kernel(
    found,  # [4, B, spans] float32: largest logit, sum of weights, and of the winner: logit + noise, logit
    counted,  # [2, B, spans] int32: the winner, and how many logits are above -inf
    peaks,  # [B, stretches] float32
    logits,
    edits,
    edited,
    words,  # [B, ceil(V / 32)] int32 or None
    rows,
    positions,
    temperature,
    seed,
    stride,
    word_stride,
    V: tl.constexpr,
):
    """One program: one span of one row."""
    b = tl.program_id(1).to(tl.int64)
    row, scale, key, heat = _open(b, logits, edits, edited, rows, positions, temperature, seed, stride, V)
    if words is not None:
        words += b * word_stride
    STRETCHES: tl.constexpr = (V + STRETCH - 1) // STRETCH
    first = tl.program_id(0) * SPAN
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    alive = tl.full([], 0, tl.int32)
    best = tl.full([], float("-inf"), tl.float32)
    best_token = tl.full([], 0, tl.int32)
    best_x = tl.full([], float("-inf"), tl.float32)
    for start in range(first, tl.minimum(first + SPAN, V), TILE * STRETCH):
        stretch = start // STRETCH + tl.arange(0, TILE)
        token = stretch[:, None] * STRETCH + tl.arange(0, STRETCH)[None, :]
        x = _read(row, words, token, scale, V)
        peak = tl.max(x, 1)
        tl.store(peaks + b * STRETCHES + stretch, peak, mask=stretch < STRETCHES)
        new_top = tl.maximum(top, tl.max(peak, 0))
        total = total * tl.exp(_anchor(top) - _anchor(new_top)) + _total(tl.exp(x - _anchor(new_top)))
        alive += _total((x > float("-inf")).to(tl.int32))
        top = new_top
        best, best_token, best_x = _draw(x, token, key, heat > 0, best, best_token, best_x)

    spans = tl.num_programs(0)
    at = b * spans + tl.program_id(0)
    plane = tl.num_programs(1) * spans
    tl.store(found + at, top)
    tl.store(found + plane + at, total)
    tl.store(found + 2 * plane + at, best)
    tl.store(found + 3 * plane + at, best_x)
    tl.store(counted + at, best_token)
    tl.store(counted + plane + at, alive)


# ---- the third


@triton.jit
def _above(pivot, min_p, line, V: tl.constexpr):
    """-> of the tokens with logits above the pivot: how many, their weight, the smallest logit, how many have that one,
    and the winner among those that min_p keeps: token, logit.

    line: what `settle_kernel` keeps of its row. Only stretches are read whose peak is above the pivot, in order of
    their ids; `listed` is where they are noted.
    """
    row, words, peaks, listed, anchor, key, scale = line
    n = tl.full([], 0, tl.int32)
    tl.debug_barrier()  # the list before has been read
    for start in range(0, tl.cdiv(V, STRETCH), LIST):
        stretch = start + tl.arange(0, LIST)
        live = tl.load(peaks + stretch, mask=stretch < tl.cdiv(V, STRETCH), other=float("-inf")) > pivot
        tl.store(listed + n + tl.cumsum(live.to(tl.int32), 0) - 1, stretch, mask=live)
        n += tl.sum(live.to(tl.int32), 0)
    tl.debug_barrier()

    count = tl.full([], 0, tl.int32)
    mass = tl.full([], 0.0, tl.float32)
    lowest = tl.full([], float("inf"), tl.float32)
    ties = tl.full([], 0, tl.int32)
    best = tl.full([], float("-inf"), tl.float32)
    best_token = tl.full([], 0, tl.int32)
    best_x = tl.full([], float("-inf"), tl.float32)
    for start in range(0, n, TILE):
        i = start + tl.arange(0, TILE)
        stretch = tl.load(listed + i, mask=i < n, other=tl.cdiv(V, STRETCH))
        token = stretch[:, None] * STRETCH + tl.arange(0, STRETCH)[None, :]
        x = _read(row, words, token, scale, V)
        weight = tl.exp(x - anchor)
        above = x > pivot
        count += _total(above.to(tl.int32))
        mass += _total(tl.where(above, weight, 0.0))
        low = tl.min(tl.min(tl.where(above, x, float("inf")), 1), 0)
        ties = tl.where(low > lowest, ties, tl.where(low < lowest, 0, ties) + _total((x == low).to(tl.int32)))
        lowest = tl.minimum(low, lowest)
        kept = tl.where(above & (weight >= min_p), x, float("-inf"))
        best, best_token, best_x = _draw(kept, token, key, True, best, best_token, best_x)
    return count, mass, lowest, ties, best_token, best_x


@triton.jit
def _order(x):
    """float32 -> the int32 that has its place in the order of floats, as int64."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _at_order(order):
    """The inverse of `_order`."""
    order = order.to(tl.int32)
    return tl.where(order >= 0, order, order ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _below_kth(k, top, line, V: tl.constexpr, PEAKS: tl.constexpr):
    """-> a number below the k-th largest logit, but not below the next smaller one. More than k are above -inf.

    Bisection over the integers that have the order of the floats: at least k logits are above `low`, fewer above `high`.
    First over the peaks alone, of which each stands for one logit at least. That ends just below the k-th peak, with
    the k-th logit and few more above; then it is quicker to drop the smallest until it is the k-th.
    """
    low = _order(tl.full([], float("-inf"), tl.float32))
    high = _order(top)
    i = tl.arange(0, PEAKS)
    peak = tl.load(line[2] + i, mask=i < tl.cdiv(V, STRETCH), other=float("-inf"))
    while high - low > 1:
        middle = (low + high) >> 1
        enough = tl.sum((peak > _at_order(middle)).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)

    middle = low
    high = _order(top)
    searching = high > low
    while searching:
        count, _, lowest, ties, _, _ = _above(_at_order(middle), 0.0, line, V)
        enough = count >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        searching = (high - low > 1) & ((count < k) | (count - ties >= k))
        middle = tl.where(enough & (count - k < FEW), _order(lowest), (low + high) >> 1)
    return _at_order(low)


@triton.jit
def settle_kernel(
    tokens,  # [B] int64
    listed,  # [B, stretches] int32
    found,
    counted,
    peaks,
    logits,
    edits,
    edited,
    words,
    rows,
    positions,
    temperature,
    seed,
    top_k,
    top_p,
    min_p,
    stride,
    word_stride,
    spans,
    V: tl.constexpr,
    SPANS: tl.constexpr,  # a power of 2
    PEAKS: tl.constexpr,  # likewise
):
    """One program: one row. Ends for any input: a candidate is above the one before."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SPANS)
    at = b * spans + i
    plane = tl.num_programs(0) * spans
    tops = tl.load(found + at, mask=i < spans, other=float("-inf"))
    totals = tl.load(found + plane + at, mask=i < spans, other=0.0)
    scores = tl.load(found + 2 * plane + at, mask=i < spans, other=float("-inf"))
    winners = tl.load(counted + at, mask=i < spans, other=0x7FFFFFFF)
    top = tl.max(tops, 0)
    anchor = _anchor(top)
    token = tl.min(tl.where(scores == tl.max(scores, 0), winners, 0x7FFFFFFF), 0)
    x = tl.load(found + 3 * plane + at, mask=(i < spans) & (winners == token), other=float("-inf"))
    x = tl.max(x, 0)

    row, scale, key, heat = _open(b, logits, edits, edited, rows, positions, temperature, seed, stride, V)
    if words is not None:
        words += b * word_stride
    if (heat > 0) & (x < top):  # the largest logit is always kept
        STRETCHES: tl.constexpr = (V + STRETCH - 1) // STRETCH
        line = (row, words, peaks + b * STRETCHES, listed + b * STRETCHES, anchor, key, scale)

        r = tl.load(rows + b).to(tl.int64)
        least = tl.minimum(tl.load(min_p + r), 1.0)
        p = tl.load(top_p + r)
        k = tl.load(top_k + r)
        kept = tl.sum(totals * tl.exp(_anchor(tops) - anchor), 0)  # the weight that p is a part of
        legal = tl.exp(x - anchor) >= least
        if (k > 0) & (k < tl.sum(tl.load(counted + plane + at, mask=i < spans, other=0), 0)):
            cut = _below_kth(k, top, line, V, PEAKS)
            n, kept, lowest, _, token, x = _above(cut, least, line, V)
            kept -= (n - k).to(tl.float32) * tl.exp(lowest - anchor)  # ties with the k-th
            legal = legal | True
        # What min_p has refused is no more than a pivot, which may as well be at the border, with room for rounding.
        border = anchor + 1.01 * tl.log(tl.maximum(least, 1e-37)) - 1e-6 * (tl.abs(anchor) + 1)
        x = tl.where(legal, x, tl.maximum(x, border))
        searching = (x < top) & ((p < 1) | ~legal)
        while searching:
            _, mass, _, _, next_token, next_x = _above(x, least, line, V)
            inside = legal & ((mass < p * kept) | (p >= 1))
            searching = (p < 1) & ~inside & (next_x > x) & (next_x < top)
            token = tl.where(inside, token, next_token)
            x = tl.where(inside, x, next_x)
            legal = legal | True
    tl.store(tokens + b, token.to(tl.int64))


# ---- on the host


@torch.library.custom_op("folio::triton_sample", mutates_args=())
def _sample(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    bitmask: Tensor | None,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
    seed: Tensor,
    stop_ids: Tensor,
    stop_from: Tensor,
    bias_ids: Tensor,
    bias_values: Tensor,
    seen: Tensor,
) -> Tensor:
    parameters = dict(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, seed=seed, stop_ids=stop_ids,
        stop_from=stop_from, bias_ids=bias_ids, bias_values=bias_values, seen=seen,
    )  # fmt: skip
    check(logits, rows, positions, bitmask, parameters)
    B, V = logits.shape
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    if B == 0:
        return tokens
    spans, stretches = triton.cdiv(V, SPAN.value), triton.cdiv(V, STRETCH.value)
    edits, peaks = logits.new_empty(B, V), logits.new_empty(B, stretches)
    found = logits.new_empty(4, B, spans)
    edited, listed, counted = (
        rows.new_empty(shape, dtype=torch.int32) for shape in ((B,), (B, stretches), (2, B, spans))
    )
    strides = logits.stride(0), 0 if bitmask is None else bitmask.stride(0)
    edit_kernel[spans, B](
        edits, edited, logits, rows, positions, repetition_penalty, presence_penalty, frequency_penalty,
        stop_ids, stop_from, bias_ids, bias_values, seen, strides[0], V, MAX_BIAS, MAX_STOP_IDS, num_warps=4,
    )  # fmt: skip
    row = logits, edits, edited, bitmask, rows, positions, temperature, seed
    survey_kernel[spans, B](found, counted, peaks, *row, *strides, V, num_warps=4)
    sizes = triton.next_power_of_2(spans), triton.next_power_of_2(stretches)
    settle_kernel[B,](
        tokens, listed, found, counted, peaks, *row, top_k, top_p, min_p, *strides, spans, V, *sizes, num_warps=8
    )
    return tokens


@_sample.register_fake
def _(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def sample(
    logits: Tensor, sampling: SamplingTensors, rows: Tensor, positions: Tensor, bitmask: Tensor | None = None
) -> Tensor:
    """logits [B, V] float32 -> token ids [B] int64, as `kernels.sampling.sample`.

    rows, positions [B] int32 or int64; bitmask int32 [B, ceil(V / 32)], a set bit allows. Where a sum of weights falls
    on top_p but for rounding, the two may differ. NaN counts as -inf; a row that is -inf throughout gets token 0.
    ValueError for what does not fit together.
    """
    p = sampling
    return _sample(
        logits, rows, positions, bitmask, p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty,
        p.presence_penalty, p.frequency_penalty, p.seed, p.stop_ids, p.stop_from, p.bias_ids, p.bias_values, p.seen,
    )  # fmt: skip


@functools.cache
def right_parameters(rows: int, vocab_size: int) -> SamplingTensors:
    """What the parameters of so many rows have to look like; there is nothing in these tensors."""
    return SamplingTensors.empty(rows, vocab_size, torch.device("meta"))


def check(
    logits: Tensor, rows: Tensor, positions: Tensor, bitmask: Tensor | None, parameters: dict[str, Tensor]
) -> None:
    """Raise ValueError for what a kernel would read past, or compute nonsense from. Looks at no element of a tensor."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)

    require(logits.dim() == 2, f"logits must be [B, V], not {list(logits.shape)}")
    require(logits.dtype == torch.float32, f"logits is {logits.dtype}: must be torch.float32")
    B, V = logits.shape
    require(B <= MAX_BATCH, f"a batch of {B} rows: a grid takes {MAX_BATCH} at most")
    require(1 <= V <= MAX_VOCAB, f"a vocabulary of {V} tokens: must be 1 to {MAX_VOCAB}")
    require(V == 1 or logits.stride(1) == 1, f"the logits of a row must lie side by side, not {logits.stride(1)} apart")
    for name, tensor in (("rows", rows), ("positions", positions)):
        require(tensor.shape == (B,), f"{name} must be [{B}], one for each row of logits, not {list(tensor.shape)}")
        require(tensor.dtype in (torch.int32, torch.int64), f"{name} is {tensor.dtype}: must be int32 or int64")
        require(tensor.is_contiguous(), f"{name} must be contiguous, its stride is {tensor.stride()}")
    if bitmask is not None:
        words = triton.cdiv(V, 32)
        shape = list(bitmask.shape)
        require(shape == [B, words], f"bitmask must be [{B}, {words}], 32 of {V} tokens a word, not {shape}")
        require(bitmask.dtype == torch.int32, f"bitmask is {bitmask.dtype}: must be torch.int32")
        require(words == 1 or bitmask.stride(1) == 1, "the words of a row of bitmask must lie side by side")
    expected = right_parameters(len(parameters["seen"]), V)
    for name, tensor in parameters.items():
        right = getattr(expected, name)
        there = f"{name} is {tensor.dtype} {list(tensor.shape)}"
        require(tensor.shape == right.shape, f"{there}: must be {list(right.shape)}")
        require(tensor.dtype == right.dtype, f"{there}: must be {right.dtype}")
        require(tensor.is_contiguous(), f"{name} must be contiguous, its strides are {tensor.stride()}")
    for name, tensor in {"rows": rows, "positions": positions, "bitmask": bitmask, **parameters}.items():
        if tensor is not None:
            require(tensor.device == logits.device, f"{name} is on {tensor.device}, logits on {logits.device}")
    on = logits.device
    require(logits.is_cuda or paged.INTERPRETED, f"logits is on {on}: Triton needs a GPU, or TRITON_INTERPRET=1")
