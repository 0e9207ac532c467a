"""The benchmarks of the engine, on next to nothing: they run, they add up, and they notice what they are there to notice.

pytest tests/test_bench_engine.py
"""

import argparse
import json

import pytest
import torch

from bench import mla, overlap, prefix, soak
from bench.decode import SHAPES
from cache.pages import PagePool
from families import model_config
from mla import LatentSpec
from model import ModelConfig, Transformer
from streams import Stream

pytestmark = pytest.mark.usefixtures("one_thread")


def last_line(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


# ---- overlap


def test_overlap_reports_both_loops(capsys):
    assert overlap.main(["--pairs", "1/0.5", "0.5/1", "--steps", "20", "--repeats", "1"]) == 0
    record = last_line(capsys.readouterr().out)
    for pair in record["pairs"]:
        assert pair["serial"] == 1.5 and pair["ideal"] == 1
        assert pair["normal"]["median"] > 0.99 * pair["serial"]  # never less than there is to do


def test_overlap_end_to_end_on_any_device():
    model = overlap.random_model(model_config(SHAPES["tiny"]), torch.float32, torch.device("cpu"), 48)
    assert model.head.weight is model.embed.weight and model.inv_freq_0.dtype == torch.float32
    args = argparse.Namespace(batch=3, prompt_tokens=40, new_tokens=4, chunk=32, compile=False, repeats=1)
    for result in overlap.measure_engine(model, args).values():
        assert 0 < result["device"].median <= result["wall"].median


def test_time_that_two_spans_share_counts_once():
    assert overlap.covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.0)]) == 4.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_overlap_without_a_gpu_says_so(capsys):
    assert overlap.main(["--gpu"]) == 2
    assert "CUDA" in capsys.readouterr().err


# ---- prefix


def test_prefix_small(capsys):
    prefix.main(["--small", "--repeats", "1", "--threads", "1"])
    record = last_line(capsys.readouterr().out)
    assert record["prefix"]["radix on"]["tokens"] == 3 * 128
    assert {record["prefix"][name]["same"] for name in ("radix on", "radix off", "transformers")} == {4}
    for name in ("chunked", "whole"):
        load = record["load"][name]
        assert 0 < load["p50"]["median"] <= load["p99"]["median"] <= load["max"]["median"]


# ---- mla


def test_mla_small(capsys):
    mla.main(["--batch", "2", "--context", "35", "--layers", "1", "--repeats", "1", "--mebibytes", "4", "--size", "64"])
    record = last_line(capsys.readouterr().out)
    assert (record["cache"]["latent_bytes"], record["cache"]["heads_bytes"]) == (1152, 81920)
    assert record["cache"]["latent_tokens_in_24_gib"] == (24 << 30) // (61 * 1152)
    assert list(record["decode"]) == ["float32", "bfloat16"]
    for dtype, decode in record["decode"].items():
        assert decode["error"] <= mla.TOLERANCE[mla.DTYPES[dtype]]
        assert decode["ways"]["transformers"]["times_faster_than_transformers"] == 1
        assert len(decode["ways"]) == 3 and all(way["seconds"]["median"] > 0 for way in decode["ways"].values())


def test_mla_counts_what_a_decode_must_do():
    """By hand: two heads of 3 + 2 dims, values of 4, a rank of 6; five entries of each of two sequences."""
    shape = dict(hidden_size=8, intermediate_size=8, max_position=16, vocab_size=8)
    heads = dict(num_heads=2, num_kv_heads=2, head_dim=5)
    config = ModelConfig(
        **shape, **heads, num_layers=1, latent=LatentSpec(query_rank=0, rank=6, nope=3, rope=2, value=4)
    )
    (block,) = Transformer(config).blocks
    weights = 8 * 2 * 5 + 8 * (6 + 2) + 6 + 2 * (3 + 4) * 6 + 2 * 4 * 8
    size, operations = mla.floors(config, block.attn, batch=2, context=5, dtype=torch.float32)
    assert size == 4 * (2 * 5 * 8 + weights)
    assert operations == 2 * 5 * 2 * 2 * (8 + 6) + 2 * 2 * weights


# ---- soak

SHORT = ["--minutes", "0.01", "--every", "0.2", "--pause", "0.01", "--askers", "2", "--tasks", "2"]


def test_soak_passes(capsys):
    assert soak.main(SHORT) == 0
    record = last_line(capsys.readouterr().out)
    assert record["passed"] and sum(record["ended"].values()) == record["sequences"] > 0
    assert record["idle_checks"] >= 2


def test_soak_notices_a_lost_page(capsys, monkeypatch):
    free, lost = PagePool.free, []

    def lose_one(pool: PagePool, pages: list[int]) -> None:
        if pages and not lost:
            lost.append(pages[0])
            pages = pages[1:]
        free(pool, pages)

    monkeypatch.setattr(PagePool, "free", lose_one)
    assert soak.main(SHORT) == 1 and len(lost) == 1
    assert not last_line(capsys.readouterr().out)["passed"]


def test_soak_notices_a_reader_that_waits_for_ever(capsys, monkeypatch):
    put = Stream.put
    monkeypatch.setattr(Stream, "put", lambda stream, delta: delta.finish_reason is not None or put(stream, delta))
    monkeypatch.setattr(soak, "SILENCE", 0.5)
    monkeypatch.setattr(soak.faulthandler, "dump_traceback", lambda: None)
    assert soak.main(SHORT) == 1
    assert "no token" in last_line(capsys.readouterr().out)["failures"][0]


def test_slope():
    assert soak.slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == pytest.approx(2)
    assert soak.slope([(1.0, 1.0)]) == 0
