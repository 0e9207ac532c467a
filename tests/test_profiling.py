"""Profiles: names belong to parts, the parts add up to the wall time, the file is what a viewer reads.

python -m pytest tests/test_profiling.py
"""

import gzip
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_engine import ids_of, make
from test_generate import GREEDY, run
from torch import Tensor
from waiting import HANG, until

from device import Pending
from engine import Engine, SamplingParams
from errors import UserError
from figures import breakdown_line
from profiling import PARTS, Event, Recorder, divide, part_of

BUNDLED = Path(__file__).parent.parent / "assets" / "folio-tiny"
PARAMS = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)


# ---- names

KERNELS = {
    # ours, on a GPU
    "decode_kernel": "attention",
    "merge_kernel": "attention",
    "prefill_kernel": "attention",
    "mla_kernel": "attention",
    "mla_merge_kernel": "attention",
    "edit_kernel": "sampling",
    "survey_kernel": "sampling",
    "settle_kernel": "sampling",
    "rope_and_write_kernel": None,
    "write_kernel": None,
    # libraries'
    "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80": "attention",
    "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": "matmul",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1": "matmul",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>": "matmul",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, float, 128, 16, 4, 4, false>": "matmul",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": "matmul",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>": "sampling",
    "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>": "sampling",
    "void cub::DeviceRadixSortOnesweepKernel<cub::DeviceRadixSortPolicy>": "sampling",
    "void cub::detail::merge_sort::DeviceMergeSortMergeKernel<cub::Policy>": "sampling",
    "void (anonymous namespace)::cunn_SoftMaxForward<4, float, LogSoftMaxForwardEpilogue>": "sampling",
    "Memcpy DtoH (Device -> Pinned)": None,
    "Memset (Device)": None,
    "void at::native::vectorized_elementwise_kernel<4, at::native::AddOp>": None,
    # the compiler's
    "triton_tem_fused_addmm_mm_3": "matmul",
    "triton_mm": "matmul",
    "triton_red_fused_mm_7": "matmul",
    "triton_tem_fused_flex_attention_0": "attention",
    "triton_poi_fused_mm_mul_silu_split_2": None,
    "triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_1": None,
    "triton_red_fused_amax_argmax_isfinite_9": "sampling",
    "graph_0_cpp_fused_add_mul_sum_0": "matmul",
    "graph_0_cpp_fused_add_amax_argmax_mean_mul_pow_rsqrt_silu_split_sum_2": "matmul",
    "graph_1_cpp_fused_add_mean_mul_packed_linear_pow_rsqrt_5": None,
    "graph_1_cpp_fused_mul_packed_linear_silu_split_3": None,
    "graph_0_cpp_fused_add_amax_clamp_cos_div_exp_gather_index_index_put_masked_fill_mul_sum_0": "attention",
    "graph_1_cpp_fused_abs_amax_argmax_eq_index_put_mul_ne_7": "sampling",
    "graph_2_cpp_fused___rshift___argmax_bitwise_xor_log_mul_neg_sum_3": "sampling",
    # operators on a CPU
    "aten::mm": "matmul",
    "aten::addmm": "matmul",
    "mkldnn::_linear_pointwise": "matmul",
    "folio::packed_linear": "matmul",
    "folio::paged_sdpa": "attention",
    "folio::paged_reference": "attention",
    "folio::latent_decode": "attention",
    "folio::latent_extend": "attention",
    "folio::mla_step": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "folio::cutoff": "sampling",
    "aten::_log_softmax": "sampling",
    "aten::argmax": "sampling",
    "aten::mul": None,
    "aten::softmax": None,
    "aten::index_put_": None,
    "Torch-Compiled Region: 0/0": None,
}


@pytest.mark.parametrize(("name", "part"), KERNELS.items())
def test_a_name_belongs_to_a_part(name: str, part: str | None):
    assert part_of(name) == part


# ---- times


def parts(events: list[Event], *periods: tuple[float, float], nested: bool = True) -> dict[str, float]:
    totals = dict.fromkeys(PARTS, 0.0)
    for (part, _), seconds in divide(events, periods, nested).items():
        totals[part] += seconds
    assert sum(totals.values()) == pytest.approx(sum(end - start for start, end in periods))
    return {part: seconds for part, seconds in totals.items() if seconds}


def test_the_innermost_event_owns_the_time_and_inherits_its_part():
    events = [
        Event("folio::paged_sdpa", 1, 5),  # 1 of its own, 2 of the copy it makes, 1 of its product
        Event("aten::copy_", 1, 3),
        Event("aten::mm", 4, 5),
        Event("aten::add", 6, 7),
        Event("folio::packed_linear", 8, 9),
        Event("aten::argmax", 8, 8.5),  # a part of its own
    ]
    assert parts(events, (0, 10)) == {"attention": 4, "matmul": 0.5, "sampling": 0.5, "other": 1, "host": 4}


def test_kernels_at_once_count_once_and_inherit_nothing():
    events = [Event("nvjet_tst", 0, 4), Event("Memcpy DtoH", 3, 6), Event("decode_kernel", 5, 6)]
    assert parts(events, (0, 8), nested=False) == {"matmul": 3, "other": 2, "attention": 1, "host": 2}


def test_a_longer_event_goes_on_when_the_one_in_it_has_ended():
    assert parts([Event("aten::mm", 0, 10), Event("aten::argmax", 2, 3)], (0, 10)) == {"matmul": 9, "sampling": 1}


def test_only_what_lies_in_a_period_counts():
    events = [Event("aten::mm", 0, 2), Event("aten::mm", 4, 8), Event("aten::add", 20, 21)]
    assert parts(events, (1, 3), (5, 6), (30, 31)) == {"matmul": 2, "host": 2}
    assert parts([], (0, 1)) == {"host": 1}


# ---- an engine


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Of the steps that a recorder has been told of."""
    told, add = [], Recorder.add

    def listen(recorder: Recorder, span: tuple[float, float], idle: bool) -> None:
        told.append(span)
        add(recorder, span, idle)

    monkeypatch.setattr(Recorder, "add", listen)
    return told


def test_the_breakdown_adds_up_to_the_wall_time_and_the_file_has_the_operators(tmp_path: Path, spans):
    engine = Engine.from_pretrained(BUNDLED, dtype="float32", device="cpu", overlap=False)
    engine.generate("Once", PARAMS)
    assert engine.stats().breakdown is None
    before = engine.steps
    with engine.profile(tmp_path / "trace.json"):
        start = time.perf_counter()
        engine.generate("Once upon a time", PARAMS)
        wall = time.perf_counter() - start
    breakdown = engine.stats().breakdown
    assert list(breakdown) == list(PARTS) and all(seconds > 0 for seconds in breakdown.values())
    total = sum(breakdown.values()) * (engine.steps - before)
    assert len(spans) == engine.steps - before and total == pytest.approx(spans[-1][1] - spans[0][0])
    assert total <= wall  # what is missing: before the first step, after the last
    assert breakdown["matmul"] > 0.05 * sum(breakdown.values())
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [e.get("name") for e in events]
    assert names.count("folio::paged_sdpa") == engine.model.config.num_layers * (engine.steps - before)


def sleep(seconds: float) -> float:
    """-> how long it was: on a busy machine much longer."""
    start = time.perf_counter()
    time.sleep(seconds)
    return time.perf_counter() - start


def test_time_is_found_where_it_belongs(monkeypatch: pytest.MonkeyPatch, spans):
    """Every step sleeps, on the device in the name of a product, and once more between two steps."""
    engine, nap = make(overlap=False), 0.02
    submit, commit, product_naps, host_naps = engine.runner.stream.submit, engine.commit, [], []

    def slow(work: Callable) -> Pending:
        def late() -> list[Tensor]:
            with torch.profiler.record_function("aten::bmm"):
                product_naps.append(sleep(nap))
            return work()

        return submit(late)

    monkeypatch.setattr(engine.runner.stream, "submit", slow)
    monkeypatch.setattr(engine, "commit", lambda *args: (host_naps.append(sleep(2 * nap)), commit(*args)))
    with engine.profile() as profile:
        engine.generate([[1, 2, 3]], PARAMS)
    assert profile.steps == len(host_naps) == 8 and profile.breakdown == engine.stats().breakdown
    spent = {part: 8 * seconds for part, seconds in profile.breakdown.items()}
    product_naps = product_naps[1:-1]  # the first and the last lie around the steps: they start and stop the profile
    assert len(product_naps) == 8 and spent["matmul"] > 0.99 * sum(product_naps)  # two clocks
    assert spent["host"] > 0.99 * sum(host_naps[:-1])  # not behind the last one
    assert sum(spent.values()) == pytest.approx(
        spans[-1][1] - spans[0][0]
    )  # so no part has too much, if none too little
    part, name, seconds = profile.kernels[0]
    assert (part, name) == ("matmul", "aten::bmm") and 0.99 * sum(product_naps) < 8 * seconds <= spent["matmul"]


def test_time_in_which_nobody_asks_is_nobodys_waiting():
    engine, asked = make(), 0.0
    with engine.profile() as profile:
        for _ in range(2):
            start = time.perf_counter()
            engine.generate([[1, 2, 3]], PARAMS)
            asked += time.perf_counter() - start
            nap = sleep(0.3)
    assert sum(profile.breakdown.values()) * profile.steps < asked + nap / 2


def test_a_profile_changes_no_token_and_may_be_taken_while_others_are_served():
    engine, outputs = make(), []
    endless = SamplingParams(temperature=0, max_new_tokens=100, ignore_eos=True)
    thread = threading.Thread(target=lambda: outputs.extend(engine.generate([[1, 2, 3]], endless)))
    thread.start()
    until(lambda: engine.steps >= 3)
    with engine.profile() as profile, pytest.raises(UserError, match="being taken already"), engine.profile():
        pass
    with engine.profile() as profile:
        time.sleep(0.02)
    thread.join(HANG)
    assert ids_of(outputs) == ids_of(make().generate([[1, 2, 3]], endless))
    assert profile.steps == 0 or profile.breakdown["matmul"] > 0
    engine.check()


def test_a_profile_of_nothing_has_no_breakdown():
    engine = make()
    with engine.profile() as profile:
        pass
    assert profile.breakdown is engine.stats().breakdown is None
    assert breakdown_line(None).startswith("no breakdown")


def test_a_line_for_people():
    line = breakdown_line({"attention": 0.001, "matmul": 0.0025, "sampling": 0.0, "other": 0.0, "host": 0.0005})
    assert line == "step 4.00 ms: attention 25.0%, matmul 62.5%, sampling 0.0%, other 0.0%, host 12.5%"


@pytest.mark.parametrize("where", ["no/such/folder/t.json", "."])
def test_a_profile_that_cannot_be_written_is_refused_before_anything_is_recorded(tmp_path: Path, where: str):
    engine = make()
    with pytest.raises(UserError, match="cannot write the profile"), engine.profile(tmp_path / where):
        raise AssertionError("not reached")
    with pytest.raises(UserError):
        Recorder(engine.runner.stream, engine.runner.device, tmp_path / where)


# ---- the command line


def test_generate_writes_a_profile_and_says_where_the_time_goes(tmp_path: Path):
    path = tmp_path / "trace.json.gz"
    result = run("--prompt", "Once upon a time", *GREEDY, "--profile", str(path), "--json")
    assert result.returncode == 0
    line = result.stderr.splitlines()[-1]
    assert line.startswith("step ") and all(f"{part} " in line for part in PARTS)
    breakdown = json.loads(result.stdout.splitlines()[-1])["figures"]["breakdown"]
    assert breakdown["matmul"] > 0 and breakdown["attention"] > 0
    with gzip.open(path) as file:
        assert len(json.load(file)["traceEvents"]) > 1000


def test_a_bad_path_is_one_line_and_exit_code_2_before_the_model_is_looked_for():
    result = run("--prompt", "x", "--model", "no/such/model", "--profile", "no/such/folder/t.json")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [result.stderr.strip()] and "cannot write the profile" in result.stderr
