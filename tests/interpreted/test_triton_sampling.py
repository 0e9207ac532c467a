"""The Triton sampler against the one in PyTorch, token for token, on a CPU: Triton's interpreter runs it.

New tensors start as NaN or as the largest integer. Seeds are fresh; FOLIO_SEED repeats one. A fresh case could fall on a
border within rounding, where both answers are right: a border within 1e-6 of a random number, once in many thousand runs.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_sampling.py
"""

import os
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from test_sampling import chi_square, expected_kept
from torch import Tensor

from kernels import paged, sampler, sampling
from kernels.sampling import MAX_BIAS, MAX_STOP_IDS, PROMPT_BIT, SamplingTensors, gumbel_noise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
INF, NAN = float("inf"), float("nan")
SPAN, STRETCH = sampler.SPAN.value, sampler.STRETCH.value


@pytest.fixture(autouse=True)
def fresh_seed_and_poison() -> Iterator[None]:
    seed = int(os.environ.get("FOLIO_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"FOLIO_SEED={seed}")
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


def params(rows: int, vocab: int, **values: float | list[float]) -> SamplingTensors:
    """`rows` equal rows, or one value a row where a list is given; seeds are random."""
    p = SamplingTensors.empty(rows, vocab, torch.device(DEVICE))
    p.seed[:] = torch.randint(-(2**63), 2**63 - 1, (rows,))
    for name, value in values.items():
        tensor = getattr(p, name)
        tensor[:] = torch.tensor(value, dtype=tensor.dtype) if isinstance(value, list) else value
    return p


def peaked(rows: int, vocab: int) -> Tensor:
    """As from a model: row 0 wide, 1 with a few tokens far above the others, 2 rounded to bfloat16, and so on."""
    x = torch.randn(rows, vocab) * 2
    x[1::3, torch.randint(vocab, (20,))] += 4 * torch.rand(20) + 8
    x[2::3] = (x[2::3] + 16).bfloat16().float()
    return x.to(DEVICE)


def random_bitmask(rows: int, vocab: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (rows, -(-vocab // 32))).int().to(DEVICE)


def both(
    logits: Tensor,
    p: SamplingTensors,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    bitmask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> what the kernels choose, and what PyTorch chooses."""
    rows = torch.arange(len(logits), device=DEVICE) if rows is None else rows
    positions = torch.randint(10**6, (len(logits),), device=DEVICE) if positions is None else positions
    before = logits.clone()
    ours = sampler.sample(logits, p, rows, positions, bitmask)
    assert logits.nan_to_num().equal(before.nan_to_num()), "the logits are still needed for logprobs"
    return ours, sampling.sample(logits, p, rows, positions, bitmask)


def assert_same(*args: Tensor, **kwargs: Tensor) -> Tensor:
    ours, theirs = both(*args, **kwargs)
    assert ours.tolist() == theirs.tolist()
    return ours


# ---- parameters

FILTERS = {  # one row each
    "temperature": [0, 1, 0.7, 1.5, 1, 1, 1, 1, 1, 1, 0.7, 1.3, 0],
    "top_k": [0, 0, 0, 0, 50, 3, 0, 0, 0, 20, 64, 40, 5],
    "top_p": [1, 1, 1, 1, 1, 1, 0.9, 0.3, 1, 0.8, 0.95, 0.9, 0.5],
    "min_p": [0, 0, 0, 0, 0, 0, 0, 0, 0.1, 0, 0, 0.05, 0],
}


@pytest.mark.parametrize("shift", range(2))
def test_filters_alone_and_together(shift: int):
    """Each on each kind of logits, on a vocabulary of two spans, more stretches than a tile, and a rest."""
    rows = len(FILTERS["top_k"])
    assert_same(peaked(rows + shift, SPAN + 801)[shift:], params(rows, SPAN + 801, **FILTERS))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vocab", [SPAN + 70, 50])
def test_random_mixes(vocab: int, masked: bool):
    def pick(*values: float) -> list[float]:
        return torch.tensor(values)[torch.randint(len(values), (rows,))].tolist()

    rows = 9
    p = params(
        rows,
        vocab,
        temperature=pick(0, 0.3, 1, 1, 2),
        top_k=pick(0, 0, 1, 7, 60, 10**6),
        top_p=pick(1, 1, 0.1, 0.6, 0.9, 0.99),
        min_p=pick(0, 0, 0.02, 0.5),
        repetition_penalty=pick(1, 1, 1.3, 0.8),
        presence_penalty=pick(0, 0, 0.5),
        frequency_penalty=pick(0, 0, -0.2, 1),
        stop_from=pick(0, 1000),
    )
    p.seen[:] = torch.randint(4, (rows, vocab)) * (torch.rand(rows, vocab) < 0.3)
    p.seen[torch.rand(rows, vocab).to(DEVICE) < 0.2] |= PROMPT_BIT
    p.stop_ids[:, :4] = torch.randint(vocab, (rows, 4))
    p.bias_ids[::2, :9] = torch.randperm(vocab)[:9]
    p.bias_values[::2, :9] = torch.randn(9) * 5
    bitmask = random_bitmask(rows, vocab) if masked else None
    order, positions = torch.randperm(rows).to(DEVICE), torch.randint(2000, (rows,)).to(DEVICE)
    assert_same(peaked(rows, vocab), p, order, positions, bitmask)


def test_penalties():
    """Greedy, so that each of them decides; seen is known to the last bit."""
    V = SPAN + 100
    logits = torch.zeros(4, V, device=DEVICE)
    logits[:, SPAN + 3], logits[:, 5], logits[:, 70] = 10, 9, 8
    p = params(4, V, repetition_penalty=[1, 2, 1, 1], presence_penalty=[0, 0, 3, 0], frequency_penalty=[0, 0, 0, 0.8])
    p.seen[:, SPAN + 3] = PROMPT_BIT | 2
    p.seen[:, 5] = PROMPT_BIT
    assert assert_same(logits, p).tolist() == [SPAN + 3, 70, 5, 5]


def test_biases_at_the_borders_of_spans():
    """The padding, id 0 with value 0, must not touch what stands for id 0 itself."""
    V = SPAN + 100
    spots = [0, SPAN - 1, SPAN, V - 1]
    p = params(6, V)
    for b, spot in enumerate(spots):
        p.bias_ids[b, 7], p.bias_values[b, 7] = spot, 100.0
    p.bias_ids[4], p.bias_values[4] = torch.arange(MAX_BIAS) * 7, torch.arange(MAX_BIAS) * 1.0
    logits = torch.zeros(6, V, device=DEVICE)
    logits[5, 9] = 1
    assert assert_same(logits, p).tolist() == [*spots, 7 * (MAX_BIAS - 1), 9]


def test_stop_ids_are_banned_before_their_time():
    V = SPAN + 100
    p = params(4, V, stop_from=[10, 11, 11, 0])
    p.stop_ids[:, 0], p.stop_ids[:, 1] = SPAN + 5, 3
    p.stop_ids[2] = torch.arange(MAX_STOP_IDS)
    logits = torch.zeros(4, V, device=DEVICE)
    logits[:, SPAN + 5], logits[:, 3], logits[:, 31], logits[:, 40] = 9, 8, 7, 6
    positions = torch.full((4,), 10, device=DEVICE)
    assert assert_same(logits, p, positions=positions).tolist() == [SPAN + 5, 31, SPAN + 5, SPAN + 5]
    logits[:, SPAN + 5] = 0
    assert assert_same(logits, p, positions=positions).tolist() == [3, 31, 40, 3]


def test_a_bitmask_bans_for_greedy_rows_and_from_filters():
    V = 2 * STRETCH + 9
    logits = torch.randn(8, V, device=DEVICE)
    logits[:, 100], logits[:, V - 1] = 30, 29
    bitmask = random_bitmask(8, V)
    bitmask[:, 100 // 32] &= ~(1 << 100 % 32)
    bitmask[:, (V - 1) // 32] |= 1 << (V - 1) % 32
    p = params(8, V, temperature=[0, 1] * 4, top_k=[0, 0, 1, 1] * 2, top_p=[1, 1, 1, 1, 0.5, 0.5, 1, 1])
    assert assert_same(logits, p, bitmask=bitmask).tolist() == [V - 1] * 8


# ---- where filters cut


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": [1, 2, 7, 50]},
        {"top_p": [1e-6, 0.3, 0.9, 0.0]},
        {"top_k": [3, 20, 50, 700], "top_p": [0.5, 0.95, 0.2, 0.9]},
        {"min_p": [1.0, 0.9, 0.3, 0.01]},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["ties", "flat", "nearly flat"])
def test_ties_and_flat_distributions(kind: str, filters: dict):
    """With ties at the cut all of them are kept, and top-p takes its part of k tokens, not of the ties as well."""
    V = 1500
    logits = {
        "ties": torch.randn(4, V).mul(2).round(),
        "flat": torch.zeros(4, V),
        "nearly flat": torch.randn(4, V) / 999,
    }
    assert_same(logits[kind].to(DEVICE), params(4, V, temperature=1.0, **filters))


def test_where_a_filter_cuts_decides_often():
    """Few tokens of much the same weight, so that one token more or less in a filter shows."""
    p = params(32, 12, temperature=1.0, top_k=[0, 6, 8, 0] * 8, top_p=[0.5, 0.6, 1, 1] * 8, min_p=[0, 0, 0.6, 0.5] * 8)
    assert_same(torch.randn(32, 12).div(2).to(DEVICE), p)


def test_top_p_of_ties_at_the_kth():
    """4, then five 1s, k = 3: the mass is that of 4, 1, 1. Half of it takes the 4 alone, 0.7 of it also all 1s."""
    n = 12 if INTERPRETED else 2000
    logits = torch.tensor([1.0, 1, 4, 1, 1, 1, -3]).log1p().expand(n, -1).to(DEVICE)
    p = params(n, 7, temperature=1.0, top_k=3, top_p=[0.5, 0.7] * (n // 2))
    tokens = torch.tensor(assert_same(logits.contiguous().nan_to_num(-INF), p).tolist())
    assert tokens[::2].eq(2).all() and tokens[1::2].ne(6).all()


@pytest.mark.parametrize("top_k", [40, 64, 65, 2**40])
def test_top_k_of_as_many_as_there_are(top_k: int):
    """Also where a bitmask leaves fewer than k: all are kept."""
    p = params(3, 65, temperature=5.0, top_k=top_k, top_p=[1, 0.9, 0.5])
    assert_same(peaked(3, 65), p)
    assert_same(peaked(3, 65), p, bitmask=torch.tensor([[0, 1 << 9 | 1 << 31, 1]] * 3).int().to(DEVICE))


def test_top_tokens_side_by_side():
    """All of the best in a few stretches: the peaks say little about the k-th."""
    V = 2000
    logits = torch.randn(6, V)
    logits[:, 640:800] += 20
    p = params(6, V, temperature=1.0, top_k=[5, 30, 100, 159, 160, 161], top_p=[1, 0.9, 1, 0.99, 1, 0.5])
    assert_same(logits.to(DEVICE), p)


@pytest.mark.parametrize("temperature", [1e-39, 1e-10, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float):
    logits = peaked(4, 300)
    logits[2] = torch.randn(300)
    assert assert_same(logits, params(4, 300, temperature=temperature)).equal(logits.argmax(-1))


# ---- sizes and places


@pytest.mark.parametrize("vocab", [1, STRETCH, STRETCH + 1, 2048, SPAN - 1, SPAN, SPAN + 1, 2 * SPAN + 1])
def test_vocabularies_around_the_borders_of_blocks(vocab: int):
    """The last token and the first of a span must be found wherever they lie."""
    logits = peaked(4, vocab)
    logits[2, vocab - 1] = 60
    p = params(4, vocab, temperature=[1, 0, 1, 1], top_p=[0.9, 1, 1, 0.5], top_k=[0, 0, 0, 4])
    assert assert_same(logits, p)[2] == vocab - 1


def test_a_real_vocabulary():
    assert_same(peaked(2, 151936), params(2, 151936, temperature=1.0, top_k=[20, 0], top_p=[0.8, 0.95]))


def test_nothing_to_do():
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    out = sampler.sample(torch.empty(0, 9, device=DEVICE), params(1, 9), none, none)
    assert out.shape == (0,) and out.dtype == torch.int64


def test_a_row_does_not_depend_on_its_batch():
    """Nor on the order, on the row its parameters are in, on integer types or on strides."""
    B, V = 6, 600
    wide = torch.randn(B, 2 * V, device=DEVICE) * 2
    logits, positions = wide[:, :V], torch.randint(1000, (B,), device=DEVICE)
    p = params(B + 3, V, temperature=1.0, top_k=[0, 0, 9] * 3, top_p=[1, 0.8, 0.9] * 3)
    rows, bitmask = torch.tensor([3, 8, 1, 1, 7, 4], device=DEVICE), random_bitmask(B, V)
    together = assert_same(logits, p, rows, positions, bitmask)
    order = torch.randperm(B, device=DEVICE)
    shuffled = sampler.sample(logits[order], p, rows[order].int(), positions[order].int(), bitmask[order])
    assert shuffled.equal(together[order])
    for b in range(B):
        one = slice(b, b + 1)
        assert sampler.sample(logits[one], p, rows[one], positions[one], bitmask[one]).equal(together[one])


def test_logits_of_more_than_2_to_the_31_elements():
    torch.use_deterministic_algorithms(False)  # or all of it would be filled
    V, stride = 200, 2**30 + 16
    pool = torch.empty(2 * stride + V, device=DEVICE)  # hardly touched
    logits = pool.as_strided((3, V), (stride, 1))
    logits[:] = torch.randn(3, V)
    p = params(3, V, temperature=1.0, top_p=0.9, frequency_penalty=[0, 0, 0.5])
    p.seen[:] = torch.randint(5, (3, V))
    assert_same(logits, p)


# ---- what should not be there


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.5, "min_p": 0.1}], ids=str
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_rows_end_and_disturb_nobody(filters: dict, temperature: float):
    V = 300
    logits = torch.randn(7, V, device=DEVICE)
    p = params(7, V, temperature=temperature, **filters)
    rows, bitmask = torch.arange(7, device=DEVICE), torch.full((7, 10), -1, dtype=torch.int32, device=DEVICE)
    before = sampler.sample(logits, p, rows, rows, bitmask)
    logits[0] = NAN
    logits[1, ::2] = NAN
    logits[2, 40] = INF
    logits[3, ::3] = INF
    logits[4] = -INF
    bitmask[5] = 0
    after = sampler.sample(logits, p, rows, rows, bitmask)
    assert after[6] == before[6]
    assert after[[0, 4, 5]].tolist() == [0, 0, 0]
    assert after[1] % 2 == 1 and after[2] == 40 and after[3] % 3 == 0
    assert ((after >= 0) & (after < V)).all()


BAD = {
    r"logits must be \[B, V\]": lambda a: a.update(logits=a["logits"][0]),
    "logits is torch.float16: must be torch.float32": lambda a: a.update(logits=a["logits"].half()),
    "side by side, not 2 apart": lambda a: a.update(logits=torch.zeros(3, 80, device=DEVICE)[:, ::2]),
    "a vocabulary of 0 tokens": lambda a: a.update(logits=a["logits"][:, :0]),
    r"rows must be \[3\]": lambda a: a.update(rows=a["rows"][:2]),
    "positions is torch.float32": lambda a: a.update(positions=a["positions"].float()),
    r"bitmask must be \[3, 2\], 32 of 40": lambda a: a.update(bitmask=a["bitmask"][:, :1]),
    "bitmask is torch.int64": lambda a: a.update(bitmask=a["bitmask"].long()),
    r"seen is torch.int32 \[3, 41\]: must be \[3, 40\]": lambda a: a.update(sampling=params(3, 41)),
    "top_k is torch.float32": lambda a: setattr(a["sampling"], "top_k", a["sampling"].top_k.float()),
    "seen must be contiguous": lambda a: setattr(a["sampling"], "seen", a["sampling"].seen.T.contiguous().T),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str):
    rows = torch.arange(3, device=DEVICE)
    arguments = dict(logits=torch.zeros(3, 40, device=DEVICE), sampling=params(3, 40), rows=rows, positions=rows)
    arguments["bitmask"] = random_bitmask(3, 40)
    BAD[message](arguments)
    with pytest.raises(ValueError, match=message):
        sampler.sample(**arguments)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU these tensors are where they should be")
def test_tensors_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(paged, "INTERPRETED", False)
    with pytest.raises(ValueError, match="logits is on cpu: Triton needs a GPU"):
        both(torch.zeros(2, 9), params(2, 9))


# ---- draws


@triton.jit
def noise_kernel(out, bits, seeds, positions, V: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(0)
    key = sampler._key(tl.load(seeds + b), tl.load(positions + b))
    token = tl.arange(0, BLOCK)
    tl.store(bits + b * V + token, sampler._bits(key, token), mask=token < V)
    tl.store(out + b * V + token, sampler._gumbel(sampler._bits(key, token)), mask=token < V)


def test_noise():
    """Logarithms may differ in their last bit; those of the hash may not."""
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 1 << 32, int(torch.randint(2**62, ()))], device=DEVICE)
    positions = torch.randint(2**31, (7,), device=DEVICE)
    bits, noise = torch.empty(7, 1000, dtype=torch.int32, device=DEVICE), torch.empty(7, 1000, device=DEVICE)
    noise_kernel[7,](noise, bits, seeds, positions, 1000, 1024)
    expected = gumbel_noise(seeds, positions, 1000)
    assert (noise - expected).abs().max() < 4e-6
    uniform = (-(-expected.double()).exp()).exp()
    assert (bits - (uniform * 2**23 - 0.5)).abs().max() < 4
    extremes = -torch.log(-torch.log(torch.tensor([0.5, 2**23 - 0.5], dtype=torch.float64) / 2**23))
    assert extremes[0] > -2.9 and extremes[1] < 16.7, "what _gumbel's docstring says"


def test_draws_follow_what_the_filters_leave():
    n = 120 if INTERPRETED else 20_000
    logits = torch.tensor([2.0, 1.0, 0.5, 1.5, -1.0, 0.0])
    keep = torch.tensor(expected_kept(logits.tolist(), 0, 0.9, 0.05))
    probs = logits.masked_fill(~keep, -INF).softmax(0)
    p = params(n, 6, temperature=1.0, seed=list(range(n)), top_p=0.9, min_p=0.05)
    rows = torch.arange(n, device=DEVICE)
    tokens = sampler.sample(logits.expand(n, -1).to(DEVICE), p, rows, torch.full_like(rows, 17))
    statistic, freedom = chi_square(tokens.cpu(), probs)
    assert freedom == 3 and statistic < 35  # once in 8e6


@pytest.mark.skipif(not INTERPRETED, reason="counts what only the interpreter calls")
def test_readings_are_few(monkeypatch: pytest.MonkeyPatch):
    """Rounds are about 1 + ln(1 / mass), steps to the k-th logit at most 32 and a few."""
    calls = []
    above = sampler._above
    monkeypatch.setattr(sampler, "_above", lambda *args: calls.append(0) or above(*args))

    def readings(logits: Tensor, **values: float) -> float:
        calls.clear()
        assert_same(logits, params(len(logits), logits.shape[1], temperature=1.0, **values))
        return len(calls) / len(logits)

    V = 3000
    assert readings(torch.randn(4, V)) == 0
    assert readings(torch.randn(4, V), top_k=10**6) == 0
    assert readings(torch.randn(3, V), top_p=0.9) < 4
    assert readings(torch.randn(3, V) / 1000, top_k=50) < 30
    assert readings(torch.randn(3, V).mul(4).round(), top_k=20, top_p=0.8) < 30
    assert readings(torch.randn(3, V) / 1000, top_p=0.001) < 25


def test_passes_through_torch_compile_as_one_graph():
    p = params(4, 90, temperature=1.0, top_k=5)
    args = torch.randn(4, 90, device=DEVICE), p, torch.arange(4, device=DEVICE), torch.arange(4, device=DEVICE)
    compiled = torch.compile(sampler.sample, fullgraph=True, backend="aot_eager")
    assert compiled(*args).equal(sampler.sample(*args))
