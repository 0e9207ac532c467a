"""From logits to tokens, on the device, in one traceable function.

No full sort: top-k and top-p need the logits in order only down to where they cut, which is nearly always among the best few
hundred. Sorting 16 rows of a 49k vocabulary takes 28 ms on two CPU cores, finding their best 64 takes 0.6.

No generator: the noise of a token is a hash of (seed, position, token id), so what a seeded request gets does not depend
on what shares its batch, on the order of rows or on the device. Sampling is argmax(logits + Gumbel noise), which draws from
the softmax without computing it (Gumbel-max). `kernels.sampler` does the same on a GPU, in Triton.

    python -m pytest tests/test_sampling.py
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels.widths import MAX_BIAS, MAX_STOP_IDS, TOP_LOGPROBS

PROMPT_BIT = 1 << 30  # in `seen`: the token occurs in the prompt; the bits below count the outputs


@dataclass
class SamplingTensors:
    """What is kept of R requests, one row each; row 0 is padding. The defaults of a row mean "greedy, nothing else"."""

    temperature: Tensor  # [R] 0 = greedy
    top_k: Tensor  # [R] 0 = off
    top_p: Tensor  # [R] 1 = off
    min_p: Tensor  # [R] 0 = off
    repetition_penalty: Tensor  # [R] 1 = off
    presence_penalty: Tensor  # [R] 0 = off
    frequency_penalty: Tensor  # [R] 0 = off
    seed: Tensor  # [R] int64
    stop_ids: Tensor  # [R, MAX_STOP_IDS] forbidden before position `stop_from`; padding repeats an id or holds -1
    stop_from: Tensor  # [R] first position at which a stop id may be sampled
    bias_ids: Tensor  # [R, MAX_BIAS] padding: id 0 with value 0
    bias_values: Tensor  # [R, MAX_BIAS]
    seen: Tensor  # [R, V] int32: PROMPT_BIT | number of times sampled
    last_token: Tensor  # [R] the last one sampled
    length: Tensor  # [R] tokens whose keys and values are in the pages: the position of the last one sampled

    @classmethod
    def empty(cls, rows: int, vocab_size: int, device: torch.device) -> "SamplingTensors":
        def full(value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((rows, *shape), value, dtype=dtype, device=device)

        return cls(
            temperature=full(0),
            top_k=full(0, dtype=torch.int64),
            top_p=full(1),
            min_p=full(0),
            repetition_penalty=full(1),
            presence_penalty=full(0),
            frequency_penalty=full(0),
            seed=full(0, dtype=torch.int64),
            stop_ids=full(-1, MAX_STOP_IDS, dtype=torch.int64),
            stop_from=full(0, dtype=torch.int64),
            bias_ids=full(0, MAX_BIAS, dtype=torch.int64),
            bias_values=full(0, MAX_BIAS),
            seen=full(0, vocab_size, dtype=torch.int32),
            last_token=full(0, dtype=torch.int64),
            length=full(0, dtype=torch.int64),
        )

    def select(self, rows: Tensor) -> "SamplingTensors":
        """The parameters of the rows of one batch [B]."""
        return SamplingTensors(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def sample(
    logits: Tensor, sampling: SamplingTensors, rows: Tensor, positions: Tensor, bitmask: Tensor | None = None
) -> Tensor:
    """logits [B, V] float32 -> token ids [B]. Sequence b has the parameters of row rows[b], its new token positions[b].

    `bitmask` is that of `apply_bitmask`; it holds for greedy rows as well. A row that may take nothing gets token 0.
    """
    p = sampling.select(rows)
    if bitmask is not None:
        logits = apply_bitmask(logits, bitmask)
    logits = apply_penalties(logits, p, positions)
    greedy = logits.argmax(-1)
    scaled = logits * (1 / torch.where(p.temperature > 0, p.temperature.clamp(min=1e-5), 1.0))[:, None]
    scaled = filter_logits(scaled, p.top_k, p.top_p, p.min_p)
    drawn = (scaled + gumbel_noise(p.seed, positions, logits.shape[-1])).argmax(-1)
    return torch.where(p.temperature > 0, drawn, greedy)


def apply_bitmask(logits: Tensor, bitmask: Tensor) -> Tensor:
    """logits [B, V], bitmask int32 [B, ceil(V / 32)] as xgrammar fills it -> logits with -inf for what is not allowed.

    Bit j of word i set = token 32 * i + j is allowed; bits behind the last token mean nothing. Where nothing is allowed
    the whole row is -inf, and no other row changes. Raises ValueError for another shape or dtype.
    """
    B, V = logits.shape
    if bitmask.shape != (B, -(-V // 32)) or bitmask.dtype != torch.int32:
        found = f"{bitmask.dtype} {list(bitmask.shape)}"
        raise ValueError(f"bitmask is {found}: for {V} tokens it must be torch.int32 [{B}, {-(-V // 32)}]")
    bits = bitmask[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bitmask.device) & 1
    return logits.masked_fill(bits.flatten(1)[:, :V] == 0, float("-inf"))


def apply_penalties(logits: Tensor, p: SamplingTensors, positions: Tensor) -> Tensor:
    """Repetition (CTRL, prompt and output), presence and frequency (OpenAI, output only), logit bias, early stops."""
    count = p.seen & (PROMPT_BIT - 1)
    repeated = torch.where(logits > 0, logits / p.repetition_penalty[:, None], logits * p.repetition_penalty[:, None])
    logits = torch.where(p.seen != 0, repeated, logits)
    logits = logits - p.frequency_penalty[:, None] * count - p.presence_penalty[:, None] * (count > 0)
    logits = logits.scatter_add(1, p.bias_ids, p.bias_values)
    early = (p.stop_ids >= 0) & (positions < p.stop_from)[:, None]
    ban = torch.where(early, float("-inf"), 0.0)
    return logits.scatter_add(1, p.stop_ids.clamp(min=0), ban)


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """-inf outside the top k, then outside the nucleus of mass p of what is left, then below min_p of the best.

    Tokens that tie with the last one kept are kept too.
    """
    keep = logits >= torch.ops.folio.cutoff(logits, top_k, top_p)[:, None]
    keep &= (logits - logits.amax(-1, keepdim=True)).exp() >= min_p[:, None]
    return logits.masked_fill(~keep, float("-inf"))


@torch.library.custom_op("folio::cutoff", mutates_args=())
def cutoff(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit [B] that is in the top k (0 = off) and in the nucleus of mass top_p (1 = off) of those.

    Only as much is sorted as it takes. A CPU looks at the best 64, then at 8 times as many, until the cut of every row
    lies inside; a GPU must not wait for an answer, and sorts all. One op, opaque to the compiler, for the loop's sake.
    """
    V = logits.shape[-1]
    relative = (logits - logits.amax(-1, keepdim=True)).exp()
    has_k, has_p = top_k > 0, top_p < 1
    m = V if logits.is_cuda else min(V, max(64, int(top_k.max())))
    while True:
        best = logits.topk(m, sorted=True).values
        p = (best - best[:, :1]).exp()
        in_k = (torch.arange(m, device=logits.device) < top_k[:, None]) | ~has_k[:, None]
        total = torch.where(has_k, (p * in_k).sum(-1), relative.sum(-1))
        before = p.cumsum(-1) - p
        keep = in_k & ((before < (top_p * total)[:, None]) | ~has_p[:, None])
        if m == V or bool((~keep[:, -1] | ~(has_k | has_p) | (has_k & ~has_p & (top_k == m))).all()):
            last = keep.sum(-1).clamp(min=1) - 1
            return torch.where(has_k | has_p, best.gather(1, last[:, None])[:, 0], float("-inf"))
        m = min(V, 8 * m)


@cutoff.register_fake
def _(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0])


def gumbel_noise(seed: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel(0, 1) noise [B, V], a pure function of seed [B], position [B] and token id."""
    key = _mix(_mix(_mix(seed & _MASK) ^ ((seed >> 32) & _MASK)) ^ positions)
    bits = _mix(key[:, None] ^ _mix(torch.arange(1, vocab_size + 1, device=seed.device)))
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # 23 bits, so that it is exact and never 0 or 1
    return -torch.log(-torch.log(uniform))


_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser in int64; both constants are below 2**31, so that no product overflows.

    Constants: Wellons and Ettinger, hash-prospector (the unlicense).
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [B, V], ids [B] -> (logprob of ids [B], its rank from 1 [B], top values and ids [B, TOP_LOGPROBS]).

    Of the model's own distribution: before temperature, penalties and filters, as vLLM and OpenAI report it.
    """
    all_logprobs = logits.log_softmax(-1)
    chosen = all_logprobs.gather(1, ids[:, None])
    rank = (all_logprobs > chosen).sum(-1) + 1
    values, indices = all_logprobs.topk(min(TOP_LOGPROBS, logits.shape[-1]), dim=-1)
    return chosen[:, 0], rank, values, indices
