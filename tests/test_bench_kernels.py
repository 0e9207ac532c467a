"""The benchmark of the kernels without a GPU: all of it in the interpreter on tiny shapes, and its counts by hand.

python -m pytest tests/test_bench_kernels.py
"""

import contextlib
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench import gpu_clock, kernel_cases, kernels
from bench.common import Stat
from bench.kernel_cases import DEEPSEEK, GROUPS, LLAMA_8B, TINY, TINY_LATENT, Built, Case, Goal, Skipped

ROOT = Path(__file__).parent.parent
CEILINGS = {"copy": Stat(4e12, 4e12, 4e12), "matmul": Stat(8e14, 8e14, 8e14)}
RIG = kernel_cases.tiny_rig()


def run(*args: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.kernels", *args]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def last_line(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


# ---- all of it, in the interpreter


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, Path]:
    out = tmp_path_factory.mktemp("kernels") / "tiny.json"
    return run("--tiny", "--out", str(out)), out


def test_tiny_measures_every_case(tiny):
    done, out = tiny
    assert done.returncode == 0, done.stdout + done.stderr
    record = last_line(done.stdout)
    assert json.loads(out.read_text()) == record
    wanted = [(case.group, case.name) for cases in GROUPS.values() for case in cases(True)]
    assert [(row["group"], row["case"]) for row in record["rows"]] == wanted
    for row in record["rows"]:
        assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert 0 <= row["error"] < 2e-3 and row["copies"] == 2
        assert row["share"] == pytest.approx(row["floor"] / row["seconds"]["median"], rel=1e-3)
        assert set(row["left_out"]) <= {"FlashInfer"}
    peers = {group: set() for group in GROUPS}
    for row in record["rows"]:
        peers[row["group"]] |= set(row.get("peers", {}))
    assert {"SDPA flash", "FlexAttention"} <= peers["decode"] and peers["prefill"] == {"SDPA flash"}
    assert peers["mla"] == {"expanded, SDPA", "expanded, SDPA flash"}
    assert peers["write"] == peers["sampling"] == {"compiled PyTorch"}


def test_tiny_says_that_its_times_mean_nothing(tiny):
    done, out = tiny
    assert done.stdout.startswith("interpreter: the times mean nothing")
    text = kernels.markdown(json.loads(out.read_text()))
    assert "interpreter: the times mean nothing" in text.splitlines()[0]


def test_tiny_stays_out_of_the_results():
    done = run("--tiny", "--out", "bench/results/kernels-tiny.json")
    assert done.returncode == 2 and "mean nothing" in done.stderr
    assert not (ROOT / "bench/results/kernels-tiny.json").exists()


def test_sweep_in_the_interpreter():
    done = run("--tiny", "--sweep", "mla", "--cases", "4 heads, 2 x")
    assert done.returncode == 0, done.stderr
    record = last_line(done.stdout)
    assert list(record["cases"]) == ["4 heads, 2 x 40"]
    assert set(record["cases"]["4 heads, 2 x 40"]) == set(record["over_all"])
    assert "as it is" in record["over_all"] and len(record["over_all"]) == 5
    assert min(record["over_all"].values()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert kernels.main([]) == 2
    assert "CUDA" in capsys.readouterr().err


def test_the_interpreter_has_to_be_meant(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    assert kernels.main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert kernels.main(["--tiny"]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


# ---- counts


def cases_of(group: str) -> dict[str, Case]:
    return {case.name: case for case in GROUPS[group](False)}


def test_bytes_and_operations_by_hand():
    decode = cases_of("decode")
    assert len(decode) == 12
    case = decode["64 x 8k"]
    assert case.rotated == 64 * 8192 * 8 * 128 * 2 * 2  # tokens, heads, numbers, key and value, bytes
    assert case.size == case.rotated + 2 * 64 * 32 * 128 * 2 + 64 * 512 * 8
    assert case.flops == 64 * 8192 * 32 * 128 * 2 * 2
    assert [name for name, case in decode.items() if case.goals] == [
        *("16 x 8k", "16 x 32k", "64 x 8k", "64 x 32k", "256 x 1k", "256 x 8k", "256 x 32k")
    ]

    mla = cases_of("mla")
    assert len(mla) == 24
    case = mla["128 heads, 16 x 8k"]
    assert case.rotated == 16 * 8192 * 1152
    assert case.flops == 2 * 128 * (512 + 64 + 512) * 16 * 8192

    assert cases_of("sampling")["greedy, 64 x 128256"].size == 64 * 128256 * 4
    assert cases_of("write")["64 tokens"].size == 64 * (2 * 2 * 128 * (32 + 8 + 8) + 2 * 4 * 64 + 8)


@pytest.mark.parametrize(("new", "prefix"), [(1, 0), (7, 0), (5, 9), (1, 12)])
def test_keys_seen(new, prefix):
    assert kernel_cases.keys_seen(new, prefix) == sum(prefix + i + 1 for i in range(new))


def test_prefill_counts_causal_operations():
    cases = cases_of("prefill")
    assert cases["16k"].flops == 4 * 32 * 128 * 16384 * 16385 // 2
    assert cases["4k behind 4k"].flops == 4 * 32 * 128 * (4096 * 4096 + 4096 * 4097 // 2)
    assert Goal("share", 0.6) in cases["16k"].goals and Goal("share", 0.6) not in cases["8k"].goals
    assert all(Goal("SDPA flash", 0.9) in case.goals for case in cases.values())


def test_the_floor_is_the_larger_of_two():
    cases = cases_of("mla")
    seconds, bound = kernels.floor_of(cases["16 heads, 64 x 8k"], CEILINGS)
    assert bound == "copy" and seconds == cases["16 heads, 64 x 8k"].size / 4e12
    seconds, bound = kernels.floor_of(cases["128 heads, 64 x 8k"], CEILINGS)
    assert bound == "matmul" and seconds == cases["128 heads, 64 x 8k"].flops / 8e14


def test_enough_copies_that_l2_forgets():
    rig = replace(RIG, cold_bytes=150_000_000, most_copies=512)
    assert [rig.copies(size) for size in (1000, 4_194_304, 75_000_000, 75_000_001, 10**10)] == [512, 36, 2, 2, 1]
    assert all(rig.copies(size) * size >= rig.cold_bytes for size in (4_194_304, 75_000_001, 10**10))


# ---- peers agree with plain attention in float64


def plain_attention(q, k, v, scale):
    """q [H, T, D], k and v [K, L, D], the queries being the last of L -> [H, T, D]."""
    k, v = (x.double().repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    scores = q.double() @ k.transpose(1, 2) * scale
    T, L = scores.shape[1:]
    later = torch.arange(L) > torch.arange(L - T, L)[:, None]
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ v


def captured(monkeypatch, name: str) -> list:
    """Instead of the kernel, keep what it is called with."""
    seen = []
    monkeypatch.setattr(kernel_cases, name, lambda *args: seen.append(args))
    return seen


@torch.inference_mode()
def test_decode_peers(monkeypatch):
    seen = captured(monkeypatch, "paged_decode")
    built = kernel_cases.build_decode(RIG, TINY, 2, 43, flex=False)
    by_sdpa = built.peers["SDPA flash"]()
    assert len(by_sdpa) == len(built.calls) == 2
    used = []
    for call, peer in zip(built.calls, by_sdpa, strict=True):
        call()
        q, keys, values, table, lengths, S, scale = seen.pop()
        out = peer()
        for b in range(2):
            slots = (table[b][:, None] * S + torch.arange(S)).flatten()[: lengths[b]]
            wanted = plain_attention(q[b][:, None], *(p[slots].transpose(0, 1) for p in (keys, values)), scale)
            assert kernel_cases.relative_error(out[b], wanted[:, 0]) < 1e-3
            used += slots.tolist()
    assert len(set(used)) == len(used)  # no page is of two sequences, or of two copies


@torch.inference_mode()
def test_prefill_peer(monkeypatch):
    seen = captured(monkeypatch, "paged_prefill")
    sequences = [(12, 0), (4, 13), (1, 7)]
    built = kernel_cases.build_prefill(RIG, TINY, sequences)
    for call, peer in zip(built.calls, built.peers["SDPA flash"](), strict=True):
        call()
        q, keys, values, table, starts, lengths, S, scale = seen.pop()
        assert starts.tolist() == [0, 12, 16, 17] and lengths.tolist() == [12, 17, 8]
        for b, (mine, out) in enumerate(zip(built.project(q), peer(), strict=True)):
            slots = (table[b][:, None] * S + torch.arange(S)).flatten()[: lengths[b]]
            histories = (p[slots].transpose(0, 1) for p in (keys, values))
            wanted = plain_attention(mine.transpose(0, 1), *histories, scale).transpose(0, 1)
            assert kernel_cases.relative_error(out, wanted) < 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_expanded_form_of_mla_is_the_absorbed_one(dtype):
    built = kernel_cases.build_mla(replace(RIG, dtype=dtype), TINY_LATENT, 4, 2, 300)
    for name, make in built.peers.items():
        for copy, peer in enumerate(make()):
            error = kernel_cases.relative_error(peer(), built.project(built.reference(copy)))
            assert 0 < error < (2e-3 if dtype == torch.float16 else 1e-2), name


class FakeWrapper:
    """FlashInfer's wrapper, as far as it is used here, by plain attention."""

    def __init__(self, workspace, layout, use_tensor_cores):
        assert layout == "NHD" and use_tensor_cores

    def plan(self, indptr, indices, in_last, H, K, D, page_size, *, q_data_type, kv_data_type, sm_scale):
        assert indptr.dtype == indices.dtype == in_last.dtype == torch.int32
        self.pages = [indices[a:b].long() for a, b in pairwise(indptr)]
        self.in_last, self.page_size, self.scale = in_last, page_size, sm_scale

    def run(self, q, cache):
        outs = []
        for x, pages, last in zip(q, self.pages, self.in_last, strict=True):
            length = (len(pages) - 1) * self.page_size + int(last)
            k, v = (p[pages].flatten(0, 1)[:length].transpose(0, 1) for p in cache)
            outs.append(plain_attention(x[:, None], k, v, self.scale)[:, 0])
        return torch.stack(outs)


@torch.inference_mode()
def test_flashinfer_is_asked_for_the_same(monkeypatch):
    fake = types.ModuleType("flashinfer")
    fake.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    fake.BatchDecodeWithPagedKVCacheWrapper = FakeWrapper
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    for L in (40, 43):
        built = kernel_cases.build_decode(RIG, TINY, 2, L, flex=False)
        calls = zip(built.peers["FlashInfer"](), built.peers["SDPA flash"](), strict=True)
        assert max(kernel_cases.relative_error(a(), b()) for a, b in calls) < 1e-3


@torch.inference_mode()
def test_a_sampler_that_is_wrong_gets_no_figure(monkeypatch):
    monkeypatch.setattr(kernel_cases.sampler, "sample", kernel_cases.sampling.sample)
    rows = [kernels.measure_case(case, RIG, CEILINGS, 1) for case in GROUPS["sampling"](True)]
    assert [row["error"] for row in rows] == [0, 0, 0]
    assert all(row["bound"] == "copy" and set(row["peers"]) == {"compiled PyTorch"} for row in rows)

    monkeypatch.setattr(kernel_cases.sampler, "sample", lambda logits, *_: logits.argmin(-1))
    row = kernels.measure_case(next(GROUPS["sampling"](True)), RIG, CEILINGS, 1)
    assert row["failed"].startswith("differs by 1.0e+00") and "seconds" not in row


# ---- one case


def case_of(built: Built, *goals: Goal) -> Case:
    return Case("decode", "a case", 4000, 0, 4000, lambda rig: built, goals)


def ones() -> torch.Tensor:
    return torch.ones(4)


def measured(built: Built, *goals: Goal) -> dict:
    return kernels.measure_case(case_of(built, *goals), RIG, CEILINGS, 2)


def test_a_wrong_kernel_gets_no_figure():
    for wrong in (ones() * 1.03, ones() * float("nan"), torch.zeros(4)):
        row = measured(Built([ones, lambda wrong=wrong: wrong], {"peer": lambda: [ones, ones]}))
        assert row["failed"].startswith("differs by") and "seconds" not in row
    row = measured(Built([ones], {"peer": lambda: [ones]}, reference=lambda copy: torch.zeros(4)))
    assert row["failed"].startswith("differs by")


def test_rounding_is_not_wrong():
    assert measured(Built([lambda: ones() * 1.01], {"peer": lambda: [ones]}))["error"] == 0.01


def test_a_wrong_peer_is_left_out():
    row = measured(Built([ones], {"right": lambda: [ones], "wrong": lambda: [lambda: -ones()]}))
    assert set(row["peers"]) == {"right"} and row["left_out"]["wrong"].startswith("differs by 2.0e+00")


def test_a_peer_that_cannot_run_is_left_out_with_its_reason(capsys):
    def no_room():
        raise Skipped("keys and values: 500 GB, and 140 GB are free")

    def broken():
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore lines")

    def fails_later():
        raise ValueError("not on this GPU")

    peers = {"a": no_room, "b": broken, "c": lambda: [ones], "d": lambda: [fails_later]}
    row = measured(Built([ones], peers), Goal("a", 2), Goal("c", 1e-9))
    assert set(row["peers"]) == {"c"}
    assert row["left_out"] == {
        "a": "keys and values: 500 GB, and 140 GB are free",
        "b": "OutOfMemoryError: CUDA out of memory.",
        "d": "ValueError: not on this GPU",
    }
    assert [goal["met"] for goal in row["goals"]] == [None, True]
    assert "a: keys and values: 500 GB" in capsys.readouterr().err


def test_without_anything_to_compare_with_there_is_no_figure():
    assert "nothing to compare with" in measured(Built([ones], {}))["failed"]


def test_a_case_that_fails_is_a_row():
    def skip(rig):
        raise Skipped("no room")

    def fail(rig):
        raise RuntimeError("no such kernel")

    def ptxas():
        raise ValueError("ptxas")

    rows = [kernels.measure_case(replace(case_of(Built([], {})), build=b), RIG, CEILINGS, 1) for b in (skip, fail)]
    assert rows[0]["skipped"] == "no room" and rows[1]["failed"] == "RuntimeError: no such kernel"
    assert measured(Built([ptxas], {"peer": lambda: [ones]}))["failed"] == "ValueError: ptxas"


def test_memory_is_asked_for_before_it_is_taken():
    small = replace(RIG, free=lambda: 140e9)
    small.require(130e9, "the cache")
    with pytest.raises(Skipped, match="the cache: 343 GB, and 140 GB are free"):
        small.require(343e9, "the cache")
    full = replace(RIG, free=lambda: 1e6)
    for group in ("decode", "prefill", "mla"):
        assert "GB are free" in kernels.measure_case(next(GROUPS[group](True)), full, CEILINGS, 1)["skipped"]
    assert LLAMA_8B.kv_bytes(256 * 32768) == pytest.approx(34.4e9, rel=1e-2)
    assert kernel_cases.mla_bytes(DEEPSEEK, 1) == 1152


# ---- goals and tables

ROW = {
    "group": "mla", "case": "16 heads, 64 x 8k", "seconds": {"median": 2e-4, "low": 1.9e-4, "high": 2.2e-4},
    "bytes": 1, "flops": 1, "floor": 1.5e-4, "bound": "copy", "share": 0.75, "error": 0.003, "copies": 1, "cold": True,
    "peers": {"expanded, SDPA": {"median": 4e-3}, "expanded, SDPA flash": {"median": 2e-3}}, "left_out": {},
}  # fmt: skip


def test_goals():
    assert kernels.reached(Goal("share", 0.8), ROW) == {"what": "share", "least": 0.8, "got": 0.75, "met": False}
    assert kernels.reached(Goal("expanded", 7), ROW) == {"what": "expanded", "least": 7, "got": 10, "met": True}
    assert kernels.reached(Goal("FlashInfer", 1), ROW)["met"] is None


def record_with(*rows: dict) -> dict:
    versions = {"torch": "2.11.0", "triton": "3.6.0", "driver": "580.1"}
    facts = {"gpu": "NVIDIA H200", "tiny": False, "date": "2026-01-01", "versions": versions, "repeats": 9}
    ceilings = {"copy": {"median": 4.1e12}, "matmul": {"median": 7.2e14}}
    return {"bench": "kernels", **facts, "ceilings": ceilings, "rows": list(rows)}


def test_markdown():
    goals = [kernels.reached(Goal("share", 0.8), ROW), kernels.reached(Goal("expanded", 7), ROW)]
    failed = {"group": "write", "case": "64 tokens", "failed": "differs by 3.0e-01, at most 0.02 is allowed"}
    text = kernels.markdown(record_with(ROW | {"goals": goals}, ROW | {"goals": [], "cold": False}, failed))
    assert text.startswith("NVIDIA H200, 2026-01-01, torch 2.11.0, triton 3.6.0, driver 580.1: copy 4,100 GB/s, ")
    assert "720 TFLOP/s" in text.splitlines()[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 5 and {line.count("|") for line in lines} == {6}
    assert lines[2] == (
        "| mla 16 heads, 64 x 8k | 200.0 (190.0..220.0) | 75.0% of copy | expanded, SDPA 20.00x, "
        "expanded, SDPA flash 10.00x | 80% missed, expanded 7x met |"
    )
    assert "from L2" in lines[3] and "from L2" not in lines[2]
    assert "failed: differs by 3.0e-01" in lines[4]


def test_the_newest_results_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    assert kernels.main(["--table"]) == 2
    assert "no results" in capsys.readouterr().err
    for age, gpu in enumerate(("NVIDIA H200", "NVIDIA A100")):
        path = tmp_path / f"kernels-{kernels.slug(gpu)}.json"
        path.write_text(json.dumps(record_with() | {"gpu": gpu}))
        os.utime(path, (1000 - age, 1000 - age))
    assert kernels.main(["--table"]) == 0
    assert capsys.readouterr().out.startswith("NVIDIA H200,")
    assert kernels.main(["--table", str(tmp_path / "kernels-nvidia-a100.json")]) == 0
    assert capsys.readouterr().out.startswith("NVIDIA A100,")


# ---- sweep


@dataclass(frozen=True)
class FakeConfig:
    block_n: int
    num_warps: int
    stages: int


def test_a_tile_replaces_what_the_kernel_would_choose(monkeypatch):
    fake = types.SimpleNamespace(config=lambda rows: FakeConfig(rows, 4, 2))
    monkeypatch.setitem(kernels.SWEPT, "mla", fake)
    call = kernels.tiled(lambda: fake.config(16), "mla", {"warps": 8, "stages": 5})
    assert call() == FakeConfig(16, 8, 5) and fake.config(16) == FakeConfig(16, 4, 2)


def test_sweep_leaves_out_tiles_that_do_not_work(monkeypatch):
    fake = types.SimpleNamespace(config=lambda: FakeConfig(16, 4, 2))
    monkeypatch.setitem(kernels.SWEPT, "decode", fake)

    def call():
        if fake.config().stages == 5:
            raise RuntimeError("out of resource: shared memory")
        return torch.full((4,), 1.5 if fake.config().stages == 3 else 1.0)

    built = Built([call], {"peer": lambda: [ones]})
    found = kernels.sweep_case(case_of(built), RIG, [{}, {"stages": 1}, {"stages": 3}, {"stages": 5}], 2)
    assert isinstance(found["as it is"], Stat) and isinstance(found["stages 1"], Stat)
    assert found["stages 3"].startswith("differs by")
    assert found["stages 5"] == "RuntimeError: out of resource: shared memory"


def test_the_best_over_all_cases():
    def stats(**medians):
        return {label: Stat(m, m, m) for label, m in medians.items()}

    means = kernels.over_all({"x": stats(a=1.0, b=2.0, c=1.5), "y": stats(a=8.0, b=2.0), "z": {}})
    assert means == {"b": 1.414, "a": 2.0}
    assert kernels.over_all({}) == {}


# ---- the clock


class FakeCuda:
    """A device on which everything takes a millisecond."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def install(self, monkeypatch):
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.now

            def synchronize(self):
                cuda.log.append("wait")

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def replay(self):
                cuda.now += len(self.calls)
                cuda.log.append("replay")

        @contextlib.contextmanager
        def capture(graph):
            before = len(cuda.log)
            yield
            graph.calls = cuda.log[before:]

        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        for name, value in (("Event", Event), ("CUDAGraph", Graph), ("graph", capture)):
            monkeypatch.setattr(torch.cuda, name, value)


def test_graph_clock(monkeypatch):
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    measure = gpu_clock.graph_clock([lambda: cuda.log.append("a"), lambda: cuda.log.append("b")])
    assert cuda.log[:4] == ["a", "b"] * 2  # once to compile, once into the graph
    assert measure() == pytest.approx(1e-3)
    assert cuda.log[-6:] == ["replay"] * 5 + ["wait"]  # two calls of a millisecond fit 5 times into 10


def test_slug():
    assert kernels.slug("NVIDIA H200") == "nvidia-h200" and kernels.slug("AMD Instinct MI300X (x)") == (
        "amd-instinct-mi300x-x"
    )
