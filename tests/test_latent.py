"""MLA over pages in plain PyTorch: both forms against `reference_mla.py` and each other; slots of nobody hold NaN.

python -m pytest tests/test_latent.py
"""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from test_families import error, folder, our_logits, our_model, reference
from test_reference_mla import make
from torch import Tensor

from engine import Engine, SamplingParams
from kernels import latent
from kernels.latent import expanded_is_cheaper, latent_decode, latent_extend, pieces
from kernels.reference import cut, history_slots
from kernels.reference_mla import mla_expanded
from runner import Runner

PAGE, SCALE = 4, 0.2


@pytest.fixture(params=[3, 7, 512], ids="pieces of {}".format)
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Histories in so many pieces, and queries in blocks of as many."""
    monkeypatch.setattr(latent, "entries_of_piece", lambda _: request.param)
    monkeypatch.setattr(latent, "QUERIES", request.param)
    yield request.param


def step(case: dict[str, Tensor], form: str) -> Tensor:
    lengths, new = case["lengths"], case["offsets"].diff()
    starts = lengths - new
    positions = torch.cat([torch.arange(a, b) for a, b in zip(starts.tolist(), lengths.tolist(), strict=True)])
    spans = starts.tolist(), new.tolist()
    cells = cut(*spans, positions, case["page_table"], PAGE, (), 1, torch.float64)
    weights = torch.cat((case["w_k"], case["w_v"]), 1)
    where = case["cache"], cells.read_slots, cells.shapes, positions
    return latent_extend(case["q_nope"], case["q_rope"], weights, *where, SCALE, form)


@pytest.mark.parametrize("new", [[1, 1, 1], [7, 2, 40], [1, 1, 17], [3, 1, 1], [7, 1, 25]], ids=str)
@pytest.mark.parametrize("form", latent.FORMS)
def test_any_step(new: list[int], form: str, piece: int):
    case = make(sum(new), [7, 2, 40], new, PAGE, heads=3)
    torch.testing.assert_close(step(case, form), mla_expanded(**case, page_size=PAGE, scale=SCALE))


@pytest.mark.parametrize("lengths", [[1], [40], [1, 9, 9, 30, 2, 2, 2], [*range(40, 20, -1), 3]], ids=str)
def test_decode(lengths: list[int], piece: int):
    case = make(len(lengths), lengths, [1] * len(lengths), PAGE, heads=5)
    last = case["lengths"] - 1
    slots = history_slots(case["page_table"], last, PAGE)
    weights = torch.cat((case["w_k"], case["w_v"]), 1)
    out = latent_decode(case["q_nope"], case["q_rope"], weights, case["cache"], slots, last, SCALE)
    torch.testing.assert_close(out, mla_expanded(**case, page_size=PAGE, scale=SCALE))


def test_both_forms_are_taken_in_one_step(monkeypatch: pytest.MonkeyPatch):
    """A decode and a short chunk on a long history absorb, a long chunk expands."""
    taken = []
    chunk, decode = latent.chunk_of_prompt, latent.decode_absorbed
    monkeypatch.setattr(latent, "chunk_of_prompt", lambda *args: taken.append(args[-1]) or chunk(*args))
    monkeypatch.setattr(latent, "decode_absorbed", lambda *args: taken.append("decode") or decode(*args))
    step(make(0, [9, 40, 40], [1, 2, 30], PAGE, heads=3), "cheaper")
    assert taken == ["decode", False, True]


def test_which_form_is_cheaper():
    """By DeepSeek's dims: a decode never expands, a fresh prompt does, and 171 new tokens are worth a long history."""
    v3 = dict(heads=128, nope=128, rope=64, value=128, rank=512)
    assert not any(expanded_is_cheaper(**v3, new=1, history=n) for n in (2, 100, 100_000))
    assert all(expanded_is_cheaper(**v3, new=n, history=n) for n in (2, 100, 5000))
    assert not expanded_is_cheaper(**v3, new=160, history=100_000) and expanded_is_cheaper(
        **v3, new=180, history=100_000
    )


@pytest.mark.parametrize("lengths", [[5, 5, 5], [50], [30, 6, 1, 1, 1], [12] * 9 + [3], [1] * 30], ids=str)
@pytest.mark.parametrize("most", [2, 10, 64])
def test_pieces(lengths: list[int], most: int):
    """Every entry is in one piece, in order, and no piece has a sequence whose history has ended."""
    seen = [0] * len(lengths)
    for some, entries in pieces(lengths, most):
        rows = range(some.start, some.stop)
        assert rows and len(rows) * (entries.stop - entries.start) <= max(most, len(rows))
        for b in rows:
            assert seen[b] == entries.start < lengths[b]
            seen[b] = entries.stop
    assert all(end >= length for end, length in zip(seen, lengths, strict=True))


def test_short_histories_are_whole_and_together():
    assert list(pieces([4] * 20, 64)) == [(slice(0, 16), slice(0, 4)), (slice(16, 20), slice(0, 4))]


def test_the_cache_is_not_expanded_by_a_decode(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(latent, "expanded", lambda *_: pytest.fail("a decode expands"))
    step(make(3, [40, 40], [1, 1], PAGE, heads=3), "cheaper")


# ---- in a model


@pytest.mark.parametrize("name", ["deepseek_v2_dense", "deepseek_v3_halves", "mistral4_dense"])
def test_absorbed_and_expanded_logits_agree(name: str, monkeypatch: pytest.MonkeyPatch):
    ids, theirs = reference(name)
    model, logits = our_model(folder(name)), {}
    for form in ("absorbed", "expanded"):
        monkeypatch.setattr("kernels.dispatch.latent_extend", lambda *args, form=form: latent_extend(*args, form))
        logits[form] = our_logits(model, ids, [17, 1, len(ids) - 18])
        assert error(logits[form], theirs) < 1e-5
    assert error(logits["absorbed"], logits["expanded"]) < 1e-5
    assert not logits["absorbed"].equal(logits["expanded"])  # they are two


def test_a_cached_token_is_one_row():
    model = our_model(folder("deepseek_v3_dense"))
    c = model.config
    assert c.cache.shapes == ((24 + 8,),) and c.cache.bytes_per_token(torch.bfloat16) == c.num_layers * 32 * 2
    assert dataclasses.replace(c, latent=None).cache.bytes_per_token(torch.bfloat16) > c.cache.bytes_per_token(
        torch.bfloat16
    )


def test_samples_of_one_prompt_copy_its_last_page(monkeypatch: pytest.MonkeyPatch):
    """A page that is not full has one owner, so the others copy it: a row of every layer. With pages of one token nobody must."""
    model, copied = our_model(folder("deepseek_v3_dense")), []
    copy = Runner.copy
    monkeypatch.setattr(Runner, "copy", lambda runner, *pages: copied.append(pages) or copy(runner, *pages))
    outputs = {}
    for page_size in (1, 4):
        engine = Engine(model, page_size=page_size, max_batch_size=3)
        (output,) = engine.generate(list(range(30, 40)), SamplingParams(n=3, seed=5, max_new_tokens=20))
        outputs[page_size] = [completion.token_ids for completion in output.outputs]
        engine.check()
        assert len(copied) == (0 if page_size == 1 else 2)
    assert outputs[1] == outputs[4] and len(set(map(tuple, outputs[1]))) == 3
