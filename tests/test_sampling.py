"""Sampling against plain references: sorting for the filters, a loop for the penalties, the softmax for the draws.

pytest tests/test_sampling.py
"""

import math

import pytest
import torch
import xgrammar
from torch import Tensor

from kernels.sampling import (
    PROMPT_BIT,
    TOP_LOGPROBS,
    SamplingTensors,
    apply_bitmask,
    apply_penalties,
    cutoff,
    filter_logits,
    gumbel_noise,
    logprobs,
    sample,
)

INF = float("inf")


def random_logits(seed: int, rows: int = 6, vocab: int = 50) -> Tensor:
    """Row 0 smooth, 1 with ties, 2 with -inf, 3 negative, 4 far apart, 5 nearly equal, and so on."""
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    x[1::6] = x[1::6].round()
    x[2::6, ::3] = -INF
    x[3::6] -= 100
    x[4::6] *= 20
    x[5::6] *= 1e-3
    return x


def params(rows: int, vocab: int, **values) -> SamplingTensors:
    """`rows` equal rows, or one value a row where a list is given."""
    p = SamplingTensors.empty(rows, vocab, torch.device("cpu"))
    for name, value in values.items():
        tensor = getattr(p, name)
        tensor[:] = torch.tensor(value, dtype=tensor.dtype) if isinstance(value, list) else value
    return p


def draw(logits: Tensor, p: SamplingTensors, positions: Tensor, bitmask: Tensor | None = None) -> Tensor:
    """Row b of logits with row b of parameters."""
    return sample(logits, p, torch.arange(len(logits)), positions, bitmask)


def full(value: float, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((rows,), value, dtype=dtype)


def kept(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    B = logits.shape[0]
    out = filter_logits(logits, full(top_k, B, torch.int64), full(top_p, B), full(min_p, B))
    keep = out > -INF
    assert out[keep].equal(logits[keep]), "what is kept is not changed"
    return keep


def expected_kept(row: list[float], top_k: int, top_p: float, min_p: float) -> list[bool]:
    """One row, by sorting, in float64."""
    best, ordered = max(row), sorted(row, reverse=True)
    inside = ordered[: top_k or len(row)]
    least, total = inside[-1], sum(math.exp(x - best) for x in inside)
    if top_p < 1:
        mass = 0.0
        for least in inside:
            mass += math.exp(least - best)
            if mass >= top_p * total:  # the token that crosses is in
                break
    return [x >= least and x > -INF and math.exp(x - best) >= min_p for x in row]


def assert_kept(top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> None:
    """On vocabularies below and above what is looked at first."""
    for seed, vocab in enumerate((1, 2, 50, 64, 65, 300, 1500)):
        logits = random_logits(seed, vocab=vocab)
        logits[:, 0] = logits[:, 0].clamp(min=-200)  # not all may be -inf
        expected = [expected_kept(row, top_k, top_p, min_p) for row in logits.tolist()]
        assert kept(logits, top_k, top_p, min_p).tolist() == expected, vocab


# ---- filters


@pytest.mark.parametrize("top_k", [1, 2, 7, 49, 50, 63, 64, 65, 100, 1499, 1500, 10**6])
def test_top_k(top_k: int):
    assert_kept(top_k=top_k)
    assert kept(random_logits(0)[:1], top_k=top_k).sum() == min(top_k, 50)  # no ties in the first row


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_top_p(top_p: float):
    assert_kept(top_p=top_p)


def test_top_p_includes_the_token_that_crosses():
    logits = torch.tensor([[0.15, 0.5, 0.1, 0.25]]).log()
    order = [1, 3, 0, 2]
    for top_p, count in ((0.4, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.91, 4), (1.0, 4)):
        assert kept(logits, top_p=top_p)[0].nonzero().flatten().tolist() == sorted(order[:count]), top_p


@pytest.mark.parametrize("min_p", [1e-3, 0.05, 0.3, 1.0])
def test_min_p(min_p: float):
    assert_kept(min_p=min_p)


@pytest.mark.parametrize(
    "top_k, top_p, min_p", [(10, 0.7, 0), (5, 0.95, 0.1), (30, 1, 0.02), (0, 0.8, 0.2), (99, 0.9, 0)]
)
def test_filters_together(top_k: int, top_p: float, min_p: float):
    """The nucleus is one of what top-k leaves."""
    assert_kept(top_k, top_p, min_p)


@pytest.mark.parametrize("vocab", [50, 1500])
def test_the_cutoff_of_a_row_does_not_depend_on_its_batch(vocab: int):
    """Rows that need little next to rows that need nearly all."""
    logits = random_logits(7, rows=12, vocab=vocab)
    top_k = torch.tensor([0, 1, 40, 900, 0, 0, 3, 0, 70, 0, 0, 2000])
    top_p = torch.tensor([1, 0.5, 0.9, 0.99, 0.999, 0.2, 1, 0.97, 1, 1, 0.6, 0.8])
    together = cutoff(logits, top_k, top_p)
    assert together.equal(torch.cat([cutoff(logits[b : b + 1], top_k[b : b + 1], top_p[b : b + 1]) for b in range(12)]))
    assert together[[0, 9]].tolist() == [-INF, -INF]  # both filters off


def test_every_row_has_its_own_filter():
    row = random_logits(1)[:1]
    out = filter_logits(
        row.expand(4, -1), torch.tensor([0, 3, 0, 0]), torch.tensor([1, 1, 0.5, 1]), torch.tensor([0, 0, 0, 0.2])
    )
    alone = [kept(row), kept(row, top_k=3), kept(row, top_p=0.5), kept(row, min_p=0.2)]
    assert (out > -INF).equal(torch.cat(alone))
    assert len({tuple(keep.flatten().tolist()) for keep in alone}) == 4


@pytest.mark.parametrize("filters", [{}, {"top_k": 1}, {"top_k": 5}, {"top_p": 0.1}, {"min_p": 1.0}])
def test_ties_stay_together_and_a_vocabulary_of_one_stays(filters: dict):
    assert kept(torch.full((1, 8), -2.0), **filters).all()
    assert kept(torch.tensor([[-7.0]]), **filters).all()
    assert kept(torch.tensor([[-INF, 3.0, 3.0, -INF]]), **filters).tolist() == [[False, True, True, False]]


# ---- penalties, bias, bans


@pytest.mark.parametrize("seed", range(4))
def test_penalties_against_a_loop(seed: int):
    gen = torch.Generator().manual_seed(seed)
    B, V = 5, 30
    logits = torch.randn(B, V, generator=gen) * 4
    prompts = torch.randint(V, (B, 8), generator=gen).tolist()
    outputs = torch.randint(V, (B, 12), generator=gen).tolist()
    repetition, presence, frequency = [1.0, 1.3, 0.7, 2.0, 1.0], [0.0, 0.5, -1.0, 2.0, 0.0], [0.0, 0.0, 1.5, -0.2, 0.3]
    p = params(B, V, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    for b in range(B):
        p.seen[b, torch.tensor(prompts[b])] = PROMPT_BIT
        for token in outputs[b]:
            p.seen[b, token] += 1
    before = logits.clone()
    out = apply_penalties(logits, p, torch.zeros(B, dtype=torch.int64))
    assert logits.equal(before), "the logits are still needed for logprobs"
    for b in range(B):
        for token in range(V):
            x, count = float(logits[b, token]), outputs[b].count(token)
            if token in prompts[b] or count:
                x = x / repetition[b] if x > 0 else x * repetition[b]
            x -= frequency[b] * count + presence[b] * (count > 0)
            assert out[b, token].item() == pytest.approx(x, abs=1e-5)


def test_logit_bias():
    logits, p = random_logits(0, rows=2), params(2, 50)
    p.bias_ids[0, :3], p.bias_values[0, :3] = torch.tensor([4, 0, 9]), torch.tensor([100.0, -3.0, -100.0])
    out = apply_penalties(logits, p, torch.zeros(2, dtype=torch.int64))
    expected = logits.clone()
    expected[0, 4] += 100
    expected[0, 0] -= 3
    expected[0, 9] -= 100
    assert out.equal(expected)


def test_stop_ids_are_banned_before_their_time():
    logits, p = random_logits(0, rows=3), params(3, 50, stop_from=[10, 11, 0])
    p.stop_ids[:, :2] = torch.tensor([7, 0])
    out = apply_penalties(logits, p, torch.tensor([10, 10, 10]))
    expected = logits.clone()
    expected[1, [7, 0]] = -INF
    assert out.equal(expected)


# ---- bitmasks


def random_bitmask(rows: int, vocab: int, seed: int) -> Tensor:
    """Half of the bits set, the spare ones behind the last token too."""
    words = (rows, -(-vocab // 32))
    return torch.randint(-(2**31), 2**31, words, generator=torch.Generator().manual_seed(seed)).int()


def allowed(bitmask: Tensor, vocab: int) -> Tensor:
    """bitmask [B, W] -> bool [B, V], bit by bit."""
    return torch.tensor([[bool(row[t // 32] >> (t % 32) & 1) for t in range(vocab)] for row in bitmask.tolist()])


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, 100, 1500])
def test_bitmask_against_xgrammar_and_a_loop(vocab: int):
    logits, bitmask = random_logits(vocab, vocab=vocab), random_bitmask(6, vocab, vocab)
    before, expected = logits.clone(), logits.clone()
    out = apply_bitmask(logits, bitmask)
    assert out.equal(logits.masked_fill(~allowed(bitmask, vocab), -INF))
    if vocab > 32:  # with one word a row, xgrammar's own reads past the end
        xgrammar.apply_token_bitmask_inplace(expected, bitmask)
        assert out.equal(expected)
    assert logits.equal(before), "the logits are still needed for logprobs"


def test_spare_bits_of_a_bitmask_mean_nothing():
    logits, bitmask = random_logits(0, vocab=50), torch.zeros(6, 2, dtype=torch.int32)
    assert apply_bitmask(logits, bitmask + torch.tensor([0, -1 << 18], dtype=torch.int32)).eq(-INF).all()
    assert apply_bitmask(logits, bitmask + torch.tensor([-1, (1 << 18) - 1], dtype=torch.int32)).equal(logits)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.3}, {"min_p": 1.0}], ids=str)
def test_a_bitmask_comes_before_everything_else(filters: dict):
    """What is banned counts for no filter, and neither penalties nor biases bring it back."""
    B, V = 12, 50
    logits, bitmask = random_logits(3, rows=B, vocab=V), random_bitmask(B, V, 4)
    p = params(B, V, temperature=[0.0, 1.5] * 6, seed=list(range(B)), repetition_penalty=1.2, **filters)
    p.seen[:, ::2] = 1
    p.bias_ids[:, 0], p.bias_values[:, 0] = 7, 50.0
    banned = logits.masked_fill(~allowed(bitmask, V), -INF)
    tokens = draw(logits, p, torch.arange(B), bitmask)
    assert tokens.equal(draw(banned, p, torch.arange(B)))
    assert allowed(bitmask, V)[torch.arange(B), tokens].all()
    assert tokens[::2].equal(apply_penalties(banned, p, torch.arange(B)).argmax(-1)[::2])


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 3}, {"top_p": 0.3}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}], ids=str
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_may_take_nothing_gets_token_0_and_disturbs_nobody(filters: dict, temperature: float):
    logits, bitmask = random_logits(5), random_bitmask(6, 50, 6)
    p = params(6, 50, temperature=temperature, seed=9, **filters)
    before = draw(logits, p, torch.arange(6), bitmask)
    bitmask[3] = 0
    after = draw(logits, p, torch.arange(6), bitmask)
    others = torch.arange(6) != 3
    assert after[3] == 0 and after[others].equal(before[others])
    assert apply_bitmask(logits, bitmask)[3].eq(-INF).all()


@pytest.mark.parametrize("bitmask", [torch.zeros(6, 1).int(), torch.zeros(5, 2).int(), torch.zeros(6, 2).long()])
def test_a_bitmask_of_another_shape_or_dtype(bitmask: Tensor):
    with pytest.raises(ValueError, match=r"for 50 tokens it must be torch.int32 \[6, 2\]"):
        apply_bitmask(random_logits(0), bitmask)


def test_sampling_with_a_bitmask_is_one_graph():
    p = params(6, 50, temperature=[0.0, 1.0] * 3, top_k=5)
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    for bitmask in (None, random_bitmask(6, 50, 0)):
        args = random_logits(0), p, torch.arange(6), torch.arange(6), bitmask
        assert compiled(*args).equal(sample(*args))


# ---- draws


def test_greedy_is_argmax():
    logits = random_logits(3, rows=12)
    p = params(12, 50, seed=list(range(12)), top_k=3, top_p=0.5)
    assert draw(logits, p, torch.arange(12)).equal(logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-30, 1e-39])
def test_a_tiny_temperature_is_greedy(temperature: float):
    logits = random_logits(3)[:1].repeat(50, 1)
    assert draw(logits, params(50, 50, temperature=temperature), torch.arange(50)).eq(logits[0].argmax()).all()


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_the_tightest_filter_is_greedy(filters: dict):
    logits = random_logits(3)[:1].repeat(50, 1)
    p = params(50, 50, temperature=5.0, **filters)
    assert draw(logits, p, torch.arange(50)).eq(logits[0].argmax()).all()


def test_a_seeded_row_does_not_depend_on_its_batch():
    gen = torch.Generator().manual_seed(5)
    B, V = 8, 40
    logits, positions = torch.randn(B, V, generator=gen), torch.arange(100, 100 + B)
    p = params(B, V, temperature=[1.0, 0.7, 0, 2.0] * 2, seed=[1, 2, 3, 2**62, -5, 2**63 - 1, 0, 8], top_k=[0, 5] * 4)
    together = draw(logits, p, positions)
    order = torch.randperm(B, generator=gen)
    assert sample(logits[order], p, order, positions[order]).equal(together[order])
    for b in range(B):
        one = torch.tensor([b])
        assert sample(logits[one], p, one, positions[one]).equal(together[one])
    assert draw(logits, p, positions).equal(together)


def test_seeds_and_positions_give_different_draws():
    """256 draws of 1000 equal tokens: as many distinct ones as chance has it, 226 +- 5."""
    n, V = 256, 1000
    flat = torch.zeros(n, V)
    same = [7] * n
    seeds = {"small": list(range(n)), "high bits": [i << 40 for i in range(n)], "negative": [-i for i in range(n)]}
    for name, each in seeds.items():
        draws = draw(flat, params(n, V, temperature=1.0, seed=each), full(3, n, torch.int64))
        assert 200 < len(set(draws.tolist())) < 250, name
    draws = draw(flat, params(n, V, temperature=1.0, seed=same), torch.arange(n))
    assert 200 < len(set(draws.tolist())) < 250
    draws = draw(flat, params(n, V, temperature=1.0, seed=same), full(3, n, torch.int64))
    assert len(set(draws.tolist())) == 1


def chi_square(draws: Tensor, probs: Tensor) -> tuple[float, int]:
    """-> (statistic, degrees of freedom), over the tokens that can occur."""
    can = probs > 0
    counts = torch.bincount(draws, minlength=len(probs)).double()
    assert counts[~can].sum() == 0, "an excluded token was drawn"
    expected = probs[can].double() * len(draws)
    return float(((counts[can] - expected) ** 2 / expected).sum()), int(can.sum()) - 1


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}, {"top_k": 4}, {"min_p": 0.3}], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_draws_follow_the_softmax(temperature: float, filters: dict, vary: str):
    n, logits = 20_000, torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.3, -0.7, 1.2, 0.8, -1.0])
    keep = expected_kept(
        (logits / temperature).tolist(), filters.get("top_k", 0), filters.get("top_p", 1), filters.get("min_p", 0)
    )
    probs = (logits / temperature).masked_fill(~torch.tensor(keep), -INF).softmax(0)
    p = params(n, 10, temperature=temperature, seed=list(range(n)) if vary == "seed" else 1234, **filters)
    positions = torch.arange(n) if vary == "position" else full(17, n, torch.int64)
    statistic, freedom = chi_square(draw(logits.expand(n, -1), p, positions), probs)
    assert statistic < freedom + 4.5 * math.sqrt(2 * max(freedom, 1)) + 4


def test_gumbel_noise():
    noise = gumbel_noise(torch.arange(200) * 7919, torch.arange(200), 5000)
    assert noise.shape == (200, 5000) and noise.dtype == torch.float32
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    uniform = (-(-noise.double()).exp()).exp().flatten().sort().values
    steps = torch.arange(1, len(uniform) + 1, dtype=torch.float64) / len(uniform)
    assert (uniform - steps).abs().max() < 2 / math.sqrt(len(uniform))  # Kolmogorov and Smirnov
    for shift in (1, 2, 17):  # neighbours in the vocabulary, in position and in seed are unrelated
        assert (
            torch.corrcoef(torch.stack([noise[:, shift:].flatten(), noise[:, :-shift].flatten()]))[0, 1].abs() < 0.005
        )
        assert torch.corrcoef(torch.stack([noise[shift:].flatten(), noise[:-shift].flatten()]))[0, 1].abs() < 0.005


# ---- logprobs


def test_logprobs_are_those_of_the_bare_softmax():
    logits = random_logits(2)
    ids = torch.tensor([0, 1, 2, 3, 4, 5])
    chosen, rank, values, indices = logprobs(logits, ids)
    expected = logits.double().log_softmax(-1)
    assert values.shape == indices.shape == (6, TOP_LOGPROBS)
    for b, token in enumerate(ids.tolist()):
        assert chosen[b].item() == pytest.approx(expected[b, token].item(), abs=1e-4)
        assert rank[b].item() == 1 + sum(x > logits[b, token] for x in logits[b])
        assert values[b].tolist() == pytest.approx(sorted(expected[b].tolist(), reverse=True)[:TOP_LOGPROBS], abs=1e-4)
        assert logits[b, indices[b]].tolist() == sorted(logits[b].tolist(), reverse=True)[:TOP_LOGPROBS]


def test_logprobs_of_a_small_vocabulary():
    chosen, rank, values, indices = logprobs(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([2]))
    assert chosen.item() == pytest.approx(-math.log(3)) and rank.item() == 1
    assert values.shape == (1, 3) and sorted(indices[0].tolist()) == [0, 1, 2]
