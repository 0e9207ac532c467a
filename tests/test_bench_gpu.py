"""bench.gpu without a GPU: every part runs on next to nothing, says what it leaves out, and stops in time.

python -m pytest tests/test_bench_gpu.py
"""

import argparse
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as listing
from bench import gpu, gpu_latent, gpu_parts
from bench.common import Stat
from kernels.latent import latent_decode
from profiling import PARTS
from scheduler.request import SamplingParams, TokenLogprob

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """All parts, tiny: the lines of the file."""
    out = tmp_path_factory.mktemp("gpu") / "out.jsonl"
    torch.set_num_threads(1)
    assert gpu.main(["--tiny", "--out", str(out)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def of(written: list[dict], part: str) -> list[dict]:
    return [record for record in written if record.get("part") == part]


# ---- the parts


def test_every_part_has_records_and_a_share_of_the_time(written):
    assert list(dict.fromkeys(record.get("part") for record in written[1:])) == list(gpu_parts.PARTS)
    assert gpu.SHARES.keys() == gpu_parts.PARTS.keys() and gpu.parse_args([]).budget < 9 * 60
    assert written[0]["bench"] == "gpu" and written[0]["gpu"].startswith("none")
    assert not any("skipped" in record for record in written)


def test_figures_that_only_a_gpu_has_are_left_out_by_name(written):
    (one,) = of(written, "one_user")
    assert {"mbu", "mbu_with_kv", "replays_per_step", "compile_seconds", "peak_memory"} == set(one["only_on_a_gpu"])
    assert all(one[key] is None for key in one["only_on_a_gpu"])
    assert sum("not measured" in line for record in written for line in record.get("goals", ())) == 3


def test_one_user(written):
    (one,) = of(written, "one_user")
    assert one["tokens_per_s"]["median"] > 0 and 0 <= one["idle_share"]["median"] < 1
    assert one["graph_breaks"] == one["compiled_after_warm_up"] == one["captured_after_warm_up"] == 0
    assert sum(one[part] for part in PARTS) == pytest.approx(1, abs=1e-3)
    assert any(part == "matmul" for part, _, _ in one["longest"])


def test_end_to_end_takes_at_least_as_long_as_the_device(written):
    (end,) = of(written, "end_to_end")
    assert end["ratio"]["low"] >= 1 and end["wall_s"]["median"] > 0


def test_batches_are_a_table(written):
    rows = of(written, "batches")
    assert [row["batch"] for row in rows] == [1, 2, 4] and rows[0]["to_batch_1"] == pytest.approx(1, rel=1e-3)
    for row in rows:
        rest = (row["sampling"] + row["other"]) / (1 - row["host"])
        assert row["neither_of_device"] == pytest.approx(rest, rel=1e-2)
    assert all(row["tokens_per_s"]["low"] > 0 and row["matmul"] > 0 and row["attention"] > 0 for row in rows)


def test_latent_has_forms_and_the_load_of_the_experts(written):
    triton, *rows = of(written, "latent")
    assert triton["only_on_a_gpu"] == ["tokens_per_s"] and triton["form"] == "absorbed, Triton"
    forms = ["absorbed, torch"] * 2 + ["expanded, torch"] * 2
    assert [(row["form"], row["batch"]) for row in rows] == list(zip(forms, [1, 3, 1, 3], strict=True))
    for row in rows:
        assert row["tokens_per_s"]["low"] > 0 and row["mbu"] is None
        assert 3 <= row["experts_hit"] <= min(8, 3 * row["batch"])
        assert 1 <= row["busiest_expert"] <= 8 / 3 + 1e-3
    assert rows[0]["experts_hit"] == 3 and rows[0]["busiest_expert"] == pytest.approx(8 / 3, rel=1e-3)
    assert rows[1]["step_bytes"] > rows[0]["step_bytes"]


def test_the_bytes_of_a_step_are_those_of_the_experts_that_are_hit():
    model = gpu_parts.make_model(gpu_latent.TINY, torch.float32, torch.device("cpu"))
    one, all_of_them = (gpu_latent.step_bytes(model, 1, 0, hit) for hit in (3, 8))
    assert one == model.weight_bytes_per_token()
    assert all_of_them == sum(p.numel() * 4 for name, p in model.named_parameters() if name != "embed.weight")
    assert gpu_latent.step_bytes(model, 2, 10, 3) - one == 2 * 10 * 3 * (32 + 16) * 4


def test_expanded_heads_give_what_latents_give():
    torch.manual_seed(0)
    q_nope, q_rope, kv_up = torch.randn(2, 4, 6), torch.randn(2, 4, 8), torch.randn(4, 6 + 5, 16)
    cache, slots, positions = torch.randn(40, 16 + 8), torch.randperm(40)[:24].view(2, 12), torch.tensor([11, 4])
    args = (q_nope, q_rope, kv_up, cache, slots, positions, 0.2)
    torch.testing.assert_close(gpu_latent.expanded_decode(*args), latent_decode(*args), rtol=1e-4, atol=1e-5)


def test_ablation_has_graphs_among_its_techniques(written):
    rows = of(written, "ablation")
    assert {"all on", "no radix tree", "no overlap", "no CUDA graphs"} <= {row["variant"] for row in rows}
    assert all(row["same"] == 1 for row in rows)


def test_outputs_agree_where_they_must(written):
    first, *ids = of(written, "outputs")
    assert first["device_error"] == 0 < first["cpu_bfloat16_error"] < 0.1  # both on the CPU, both float32
    assert [record["dtype"] for record in ids] == ["float32", "bfloat16"] and ids[0]["same_as_eager"] == 1


# ---- figures


def answered(*times: list[float]) -> list[SimpleNamespace]:
    return [SimpleNamespace(outputs=[SimpleNamespace(metrics=SimpleNamespace(token_times=t))]) for t in times]


def test_a_decode_rate_counts_the_time_in_which_all_decode():
    assert gpu_parts.decode_rate(answered([1, 2, 3, 4])) == 1
    assert gpu_parts.decode_rate(answered([0, 1, 2, 3], [1, 2, 3, 4])) == 2  # from 1 to 3
    with pytest.raises(RuntimeError, match="ended before others"):
        gpu_parts.decode_rate(answered([0, 1], [2, 3]))


def test_idle_is_what_no_step_covers():
    assert gpu_parts.idle_share([(0, 1), (2, 3), (2.5, 5)]) == 0.25  # 1 of the 4 after the first one


def test_replays_are_those_of_a_decode_step(monkeypatch):
    """The prompt's step has none here, and each of the others one."""

    class Graph:
        def replay(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    engine = SimpleNamespace(steps=0)

    def generate(prompts: list, params: SamplingParams) -> None:
        engine.steps += params.max_new_tokens
        for _ in range(params.max_new_tokens - 1):
            torch.cuda.CUDAGraph().replay()

    engine.generate = generate
    assert gpu_parts.replays_per_step(engine, [[1]], 8) == 1


def test_a_goal_is_reached_missed_or_not_measured():
    assert gpu_parts.goal("mbu", ">=", 0.85, 0.9) == "mbu >= 0.85: 0.9, reached"
    assert gpu_parts.goal("breaks", "=", 0, 1) == "breaks = 0: 1, MISSED"
    assert gpu_parts.goal("ratio", "<=", 1.05, 1.06).endswith("MISSED")
    assert gpu_parts.goal("mbu", ">=", 0.85, None) == "mbu >= 0.85: not measured"


def test_logprobs_are_compared_up_to_the_first_other_token():
    def output(*tokens: tuple[int, list[tuple[int, float]]]) -> SimpleNamespace:
        logprobs = [TokenLogprob(token, 0.0, 1, top) for token, top in tokens]
        return SimpleNamespace(outputs=[SimpleNamespace(logprobs=logprobs)])

    truth = [output((1, [(1, -0.5), (2, -1.0)]), (5, [(5, -1.0)]), (7, [(7, -1.0)]))]
    ours = [output((1, [(1, -0.6), (3, -9.0)]), (6, [(5, -1.3)]), (7, [(7, -5.0)]))]
    assert gpu_parts.worst_difference(truth, ours) == pytest.approx(0.3)
    with pytest.raises(RuntimeError, match="not finite"):
        gpu_parts.worst_difference(truth, [output((1, [(1, float("nan"))]))] * 1)


def test_rows_after_the_deadline_are_said_to_be_skipped():
    setup = gpu_parts.tiny(None, -1, "default")
    assert [record["skipped"] for record in gpu_parts.batches(setup)] == ["no time is left"] * 3


# ---- processes


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_takes_too_long_is_ended_and_keeps_what_it_has_measured():
    late = 'import time; print(1); print(\'{"part": "x"}\', flush=True); time.sleep(600)'
    assert list(gpu.measure_apart(python(late), "x", 5)) == [
        {"part": "x"},
        {"part": "x", "skipped": "not done after 5 s"},
    ]


def test_a_part_that_fails_is_said_to_have_failed():
    assert list(gpu.measure_apart(python("raise SystemExit(3)"), "x", 30)) == [
        {"part": "x", "skipped": "failed with exit code 3"}
    ]


def test_a_worker_prints_records_and_nothing_else(capsys):
    assert gpu.main(["--tiny", "--worker", "--parts", "ceilings", "--seconds", "30"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["part"] == "ceilings"


def test_time_left_over_goes_to_the_next_part(monkeypatch):
    given = []
    monkeypatch.setattr(gpu, "measure_apart", lambda command, part, seconds: given.append((part, seconds)) or ())
    args = argparse.Namespace(parts=["ceilings", "outputs"], tiny=False, mode="default", copy=None, budget=90.0)
    list(gpu.run(args))
    assert given == [("ceilings", pytest.approx(30, abs=1)), ("outputs", pytest.approx(90, abs=1))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "CUDA" in capsys.readouterr().err


def test_it_is_listed():
    of = {command.name: command for command in listing.commands()}
    assert of["gpu"].needs == "GPU" and "gpu_parts" not in of


def test_what_is_skipped_is_shown():
    text = gpu.show(
        [{"part": "x", "batch": 1, "rate": Stat(1.0, 0.5, 2.0).json()}, {"part": "x", "skipped": "no time"}]
    )
    assert "1 (0.5..2)" in text and "no time" in text
