"""What `bench.gpu` measures, part by part: each is a function from a Setup to records, one at a time as they are known.

A record is flat: names to numbers, texts, Stats, or small tables. What was not measured is None; where that is so because there
is no GPU, `only_on_a_gpu` lists it. A goal reads "share of copy bandwidth >= 0.85: reached".

    from bench.gpu_parts import PARTS, full, tiny
"""

import gc
import math
import random
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch

from bench import ablate, overlap
from bench.checkpoints import SHAPES
from bench.common import progress, significant, summarize
from bench.gpu_latent import FORMS, TINY, V2_LITE, counted, form_of_attention, step_bytes
from bench.kernel_cases import gpu_rig, tiny_rig
from bench.kernels import measure_ceilings
from bench.peer_engines.folio import greedy
from bench.prefix import some_tokens, whole_pages
from engine import Engine, SamplingParams
from families import model_config
from model import Transformer
from output import RequestOutput
from profiling import Recorder
from runner import compiled_graphs

Record = dict[str, Any]

LLAMA_8B = overlap.LLAMA_1B | dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    head_dim=128,
    rope_scaling=overlap.LLAMA_1B["rope_scaling"] | dict(factor=8.0),
    tie_word_embeddings=False,
)
SMALL = overlap.LLAMA_1B | dict(
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=4096,
)
LONGEST = 8  # kernels of a profile that a record names


@dataclass(frozen=True)
class Setup:
    """What is run, and where. Prompts and new tokens are those of one request."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    mode: str  # of the compiler, for one user
    copy: float | None  # bytes a second, measured by the first part
    deadline: float  # of time.monotonic: no new row after it
    one: dict[str, Any]  # config.json of the model of one user, of many, and of the comparison with a CPU
    many: dict[str, Any]
    small: dict[str, Any]
    latent: dict[str, Any]  # with latents and experts
    one_tokens: tuple[int, int]  # prompt, new
    batches: tuple[int, ...]
    batch_tokens: tuple[int, int]
    latent_batches: tuple[int, ...]
    end_to_end: tuple[int, int, int, int]  # requests, prompt, new, token budget of a step
    workload: ablate.Workload
    prompts: int  # that GPU and CPU answer
    repeats: int

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


def full(copy: float | None, seconds: float, mode: str) -> Setup:
    return Setup(
        *(torch.device("cuda"), torch.bfloat16, True, mode, copy, time.monotonic() + seconds),
        *(LLAMA_8B, overlap.LLAMA_1B, SMALL, V2_LITE),
        one_tokens=(128, 256),
        batches=tuple(2**n for n in range(10)),
        batch_tokens=(128, 64),
        latent_batches=(1, 8, 32, 128),
        end_to_end=(256, 4096, 16, 8192),
        workload=ablate.Workload(users=32, questions=3, chunk=2048),
        prompts=32,
        repeats=3,
    )


def tiny(copy: float | None, seconds: float, mode: str) -> Setup:
    """The same code on a CPU, where only the answers mean something."""
    shape = SHAPES["tiny"]
    return Setup(
        *(torch.device("cpu"), torch.float32, False, mode, copy, time.monotonic() + seconds),
        *(shape, shape, shape, TINY),
        one_tokens=(8, 8),
        batches=(1, 2, 4),
        batch_tokens=(8, 6),
        latent_batches=(1, 3),
        end_to_end=(4, 40, 4, 32),
        workload=replace(ablate.SMALL, users=2, questions=2),
        prompts=4,
        repeats=2,
    )


# ---- the parts


def ceilings(s: Setup) -> Iterator[Record]:
    """Bytes a second of a large copy, read and written; operations a second of a large product."""
    rates = measure_ceilings(gpu_rig() if s.gpu else tiny_rig(), 5 if s.gpu else 2)
    name = torch.cuda.get_device_name() if s.gpu else "a CPU: the rates mean nothing"
    yield {"device": name, "copy_bytes_per_s": rates["copy"], "matmul_operations_per_s": rates["matmul"]}


def one_user(s: Setup) -> Iterator[Record]:
    """Decode at batch 1: speed as a share of the copy bandwidth, and what of the host can be seen in it."""
    prompt_tokens, new = s.one_tokens
    model = random_model(s, s.one, prompt_tokens + new)
    engine, compile_seconds = start_engine(s, model, 1, prompt_tokens + new, mode=s.mode)
    prompts = make_prompts(model, 1, prompt_tokens)
    engine.generate(prompts, greedy(new))
    compiled, captured = compiled_graphs(), engine.stats().captured_graphs
    spans = overlap.record_spans(engine)
    rates, idle = [], []
    for _ in range(s.repeats):
        spans.clear()
        rates.append(decode_rate(engine.generate(prompts, greedy(new))))
        idle.append(idle_share(spans[:new]))
    replays = replays_per_step(engine, prompts, new) if s.gpu else None
    graphs = compiled_graphs() - compiled, engine.stats().captured_graphs - captured
    rate, weights = summarize(rates), model.weight_bytes_per_token()
    keys_and_values = kv_bytes_per_token(model) * (prompt_tokens + new // 2)
    mbu = [s.copy and rate.median * size / s.copy for size in (weights, weights + keys_and_values)]
    record = {
        "layers": model.config.num_layers,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new,
        "tokens_per_s": rate,
        "weight_bytes_per_token": weights,
        "kv_bytes_per_token": keys_and_values,
        "mbu": mbu[0] if s.gpu else None,
        "mbu_with_kv": mbu[1] if s.gpu else None,
        "idle_share": summarize(idle),
        "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        "compiled_after_warm_up": graphs[0],
        "captured_after_warm_up": graphs[1],
        "replays_per_step": replays,
        "compile_seconds": compile_seconds if s.compile else None,
        "peak_memory": torch.cuda.max_memory_allocated() if s.gpu else None,
    }
    goals = [
        goal("share of the copy bandwidth", ">=", 0.85, record["mbu"]),
        goal("graph breaks", "=", 0, record["graph_breaks"]),
        goal("graphs compiled after warm-up", "=", 0, graphs[0]),
        goal("graphs captured after warm-up", "=", 0, graphs[1]),
        goal("graph replays a step", "=", 1, replays),
    ]
    with engine.profile() as profile:
        engine.generate(prompts, greedy(min(new, 64)))
    yield record | divided(profile) | {"longest": longest(profile), "goals": goals} | only_on_a_gpu(record, s)


def batches(s: Setup) -> Iterator[Record]:
    """Decode of more and more requests at once: tokens a second, and how a step divides."""
    prompt_tokens, new = s.batch_tokens
    model = random_model(s, s.many, prompt_tokens + new)
    engine, _ = start_engine(s, model, s.batches[-1], prompt_tokens + new, chunk_size=s.end_to_end[3])
    first = None
    for size in s.batches:
        if time.monotonic() > s.deadline:
            yield {"batch": size, "skipped": "no time is left"}
            continue
        prompts = make_prompts(model, size, prompt_tokens)
        engine.generate(prompts, greedy(4))  # meets all shapes
        rate = summarize(decode_rate(engine.generate(prompts, greedy(new))) for _ in range(s.repeats))
        first = first or rate.median
        with engine.profile() as profile:
            engine.generate(prompts, greedy(16 if s.gpu else 4))
        yield {"batch": size, "tokens_per_s": rate, "to_batch_1": rate.median / first} | divided(profile)


def latent(s: Setup) -> Iterator[Record]:
    """DeepSeek-V2-Lite's shape: decode of more and more requests, attention in three forms, as a share of the copy bandwidth."""
    prompt_tokens, new = s.batch_tokens
    longest = prompt_tokens + new
    model = random_model(s, s.latent, longest)
    loads = {size: expert_load(s, model, size) for size in s.latent_batches}
    for form, backend in FORMS.items():
        if backend == "triton" and not s.gpu:
            yield {"form": form, "only_on_a_gpu": ["tokens_per_s"]}
            continue
        with form_of_attention(form):
            options = dict(attention=backend, chunk_size=s.end_to_end[3])
            engine, _ = start_engine(s, model, s.latent_batches[-1], longest, **options)
            for size in s.latent_batches:
                if time.monotonic() > s.deadline:
                    yield {"form": form, "batch": size, "skipped": "no time is left"}
                    continue
                prompts = make_prompts(model, size, prompt_tokens)
                engine.generate(prompts, greedy(4))  # meets all shapes
                rate = summarize(decode_rate(engine.generate(prompts, greedy(new))) for _ in range(s.repeats))
                read = step_bytes(model, size, prompt_tokens + new // 2, loads[size]["experts_hit"])
                share = rate.median / size * read / s.copy if s.gpu and s.copy else None
                record = {"form": form, "batch": size, "tokens_per_s": rate, "step_bytes": read, "mbu": share}
                yield record | loads[size]


def end_to_end(s: Setup) -> Iterator[Record]:
    """Many long prompts: from the first in to the last token out, beside the time in which the device had a step."""
    batch, prompt_tokens, new, chunk = s.end_to_end
    model = random_model(s, s.many, prompt_tokens + new)
    args = Namespace(batch=batch, prompt_tokens=prompt_tokens, new_tokens=new, chunk=chunk, compile=s.compile)
    engine = overlap.start_engine(model, args, overlap=True)
    runs = [overlap.run(engine, args) for _ in range(s.repeats)]
    wall, device = (summarize(times) for times in zip(*runs, strict=True))
    ratio = summarize(wall / device for wall, device in runs)
    with engine.profile() as profile:
        overlap.run(engine, args)
    yield {
        **{"requests": batch, "prompt_tokens": prompt_tokens, "new_tokens": new, "chunk": chunk},
        **{"wall_s": wall, "device_s": device, "ratio": ratio},
        **divided(profile),
        "longest": longest(profile),
        "goals": [goal("wall / device", "<=", 1.05, ratio.median if s.gpu else None)],
    }


def ablation(s: Setup) -> Iterator[Record]:
    """bench.ablate's workload: everything on, then each technique off."""
    model = random_model(s, s.many, s.workload.longest)
    names = [t.name for t in ablate.TECHNIQUES if s.compile or t.compile]
    which = ablate.variants(names)
    if not s.compile:
        which = {name: replace(technique, compile=False) for name, technique in which.items()}
    results = ablate.measure(model, s.workload, which, s.repeats, seed=0)
    for name, result in results.items():
        ratio = ablate.ratio(results, name, "tokens_per_s")
        yield {"variant": name, "tokens_per_s": result["tokens_per_s"], "ratio": ratio} | {
            metric: result[metric] for metric in ("first_p50", "between_p50", "between_p99", "same")
        }


def outputs(s: Setup) -> Iterator[Record]:
    """The same weights on device and CPU: logprobs within the rounding. Greedy ids with graphs beside those without.

    In bfloat16 a compiled step may round to another token; in float32 the ids must be the same.
    """
    exact = make_model(s.small, torch.float32, torch.device("cpu"))
    params = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True, logprobs=20)
    rng = random.Random(0)
    prompts = [some_tokens(rng, rng.randint(1, 60), exact.config.vocab_size) for _ in range(s.prompts)]

    def answers(
        dtype: torch.dtype, device: torch.device, params: SamplingParams, **options: Any
    ) -> tuple[list[RequestOutput], int]:
        model = make_model(s.small, dtype, device)
        model.load_state_dict(exact.state_dict())
        options = dict(compile=False, graphs=False) | options
        engine, _ = start_engine(s, model, len(prompts), 64 + params.max_new_tokens, **options)
        return engine.generate(prompts, params), engine.stats().captured_graphs

    cpu = torch.device("cpu")
    truth, _ = answers(torch.float32, cpu, params)
    rounding = worst_difference(truth, answers(torch.bfloat16, cpu, params)[0])
    error = worst_difference(truth, answers(s.dtype, s.device, params)[0])
    yield {
        "what": "logprobs, to float32 on the CPU",
        "device_error": error,
        "cpu_bfloat16_error": rounding,
        "goals": [goal("error of the device / error of bfloat16 on the CPU", "<=", 1.5, error / rounding)],
    }
    decode = greedy(32)
    for dtype in (torch.float32, torch.bfloat16):
        eager, _ = answers(dtype, s.device, decode)
        for compile in (False, True) if s.compile else (False,):
            ours, captured = answers(dtype, s.device, decode, graphs=True, compile=compile)
            share = same_share(eager, ours)
            yield {
                "what": "greedy ids, graphs" + " + compile" * compile,
                "dtype": str(dtype).removeprefix("torch."),
                "captured_graphs": captured,
                "same_as_eager": share,
                "goals": [goal("share of answers that equal the eager ones", "=", 1, share)] * (dtype == torch.float32),
            }


PARTS: dict[str, Callable[[Setup], Iterator[Record]]] = {
    f.__name__: f for f in (ceilings, one_user, end_to_end, batches, ablation, latent, outputs)
}


# ---- engines and prompts


def make_model(shape: dict[str, Any], dtype: torch.dtype, device: torch.device, longest: int = 128) -> Transformer:
    return overlap.random_model(model_config(shape), dtype, device, whole_pages(longest))


def random_model(s: Setup, shape: dict[str, Any], longest: int) -> Transformer:
    progress(f"  making {shape['num_hidden_layers']} layers of {shape['hidden_size']}")
    return make_model(shape, s.dtype, s.device, longest)


def start_engine(
    s: Setup,
    model: Transformer,
    rows: int,
    longest: int,
    compile: bool | None = None,
    mode: str = "default",
    **options: Any,
) -> tuple[Engine, float]:
    """An engine with room for `rows` sequences, and the seconds that compiling and capturing took."""
    row = whole_pages(longest)
    room = rows * whole_pages(longest + 16)  # a page more each: nobody waits for one
    graphs = options.pop("graphs", None if s.gpu else True)  # a CPU goes through the same buffers
    engine = Engine(
        *(model,),
        **{"max_batch_size": rows, "max_model_len": row, "max_total_tokens": room},
        **{"radix": False, "graphs": graphs, **options},
    )
    start = time.perf_counter()
    compiled = s.compile if compile is None else compile
    for name in engine.compile(True, mode, masked=False) if compiled else engine.warm_up(True, masked=False):
        progress(f"  {name}")
    return engine, time.perf_counter() - start


def make_prompts(model: Transformer, count: int, tokens: int) -> list[list[int]]:
    rng = random.Random(0)
    return [some_tokens(rng, tokens, model.config.vocab_size) for _ in range(count)]


# ---- figures


def expert_load(s: Setup, model: Transformer, rows: int) -> dict[str, float]:
    """Of a few decodes of so many rows; see `counted`."""
    prompt_tokens, new = s.batch_tokens[0], 4
    engine, _ = start_engine(s, model, rows, prompt_tokens + new, compile=False, graphs=False)
    with counted(model, rows) as found:
        engine.generate(make_prompts(model, rows, prompt_tokens), greedy(new))
    return found


def decode_rate(outputs: list[RequestOutput]) -> float:
    """Tokens a second from when all have their first token to when the first one ends."""
    times = [completion.metrics.token_times for output in outputs for completion in output.outputs]
    start, end = max(t[0] for t in times), min(t[-1] for t in times)
    if end <= start:
        raise RuntimeError("some requests have ended before others began")
    return sum(start < at <= end for t in times for at in t) / (end - start)


def replays_per_step(engine: Engine, prompts: list[list[int]], new: int) -> float:
    """CUDA graphs that a decode step replays: what `new` tokens replay more than one token does, which is the prompt's step."""
    replays, steps = [], []
    replay = torch.cuda.CUDAGraph.replay
    for tokens in (1, new):
        before = engine.steps
        with patch.object(torch.cuda.CUDAGraph, "replay", autospec=True, side_effect=replay) as counted:
            engine.generate(prompts, greedy(tokens))
        replays.append(counted.call_count)
        steps.append(engine.steps - before)
    return (replays[1] - replays[0]) / (steps[1] - steps[0])


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Of the time from the end of the first step to the end of the last: in which no step ran."""
    wall = spans[-1][1] - spans[0][1]
    return sum(max(0.0, after[0] - before[1]) for before, after in pairwise(spans)) / wall


def kv_bytes_per_token(model: Transformer) -> int:
    """What the cache keeps of one token, in all layers."""
    return model.config.cache.bytes_per_token(model.dtype)


def divided(profile: Recorder) -> Record:
    """The breakdown of a step: milliseconds, the share of each part; of the device's time what is neither attention nor matmul."""
    if profile.breakdown is None:
        raise RuntimeError("the profiler has seen nothing of the device")
    step = sum(profile.breakdown.values())
    shares = {part: seconds / step for part, seconds in profile.breakdown.items()}
    rest = (shares["sampling"] + shares["other"]) / (1 - shares["host"])
    return {"step_ms": 1e3 * step, **shares, "neither_of_device": rest}


def longest(profile: Recorder) -> list[tuple[str, str, float]]:
    """(part, name, ms a step) of what takes longest, so that a name in the wrong part is seen."""
    return [(part, name[:80], significant(1e3 * seconds)) for part, name, seconds in profile.kernels[:LONGEST]]


def worst_difference(truth: list[RequestOutput], ours: list[RequestOutput]) -> float:
    """Of the logprobs of the tokens that both list, up to the first token in which an answer differs."""
    worst = 0.0
    for wanted, got in zip(truth, ours, strict=True):
        for a, b in zip(wanted.outputs[0].logprobs, got.outputs[0].logprobs, strict=True):
            theirs = dict(b.top)
            worst = max([worst, *(abs(value - theirs[i]) for i, value in a.top if i in theirs)])
            if not all(math.isfinite(value) for value in theirs.values()):
                raise RuntimeError("a logprob is not finite")
            if a.token_id != b.token_id:
                break
    return worst


def same_share(ours: list[RequestOutput], theirs: list[RequestOutput]) -> float:
    ids = [[output.outputs[0].token_ids for output in each] for each in (ours, theirs)]
    return ablate.same_share(*ids)


def goal(what: str, sign: str, limit: float, got: float | None) -> str:
    """One line: the goal, and whether it is met. None: it could not be measured."""
    if got is None:
        return f"{what} {sign} {limit:g}: not measured"
    met = {">=": got >= limit, "<=": got <= limit, "=": got == limit}[sign]
    return f"{what} {sign} {limit:g}: {got:.4g}, {'reached' if met else 'MISSED'}"


def only_on_a_gpu(record: Record, s: Setup) -> Record:
    """What this record leaves out, for want of a GPU."""
    return {} if s.gpu else {"only_on_a_gpu": [key for key, value in record.items() if value is None]}


def clean_up() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
