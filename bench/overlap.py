"""What overlap is worth: time of a step, plain and overlapped, when the device needs d ms and the host h ms.

    python -m bench.overlap              # a stand-in for the device, the real scheduler and the real loops: 15 s
    python -m bench.overlap --gpu        # a GPU: end to end beside the time of the device alone

The stand-in takes steps in order and d ms for each: a step ends d after it was launched, or after the one before it has ended.
The host spends h ms on a step, half of it in plan and half in commit, the scheduler's own work included; it is busy, it does
not sleep. Then a step should take d + h in the normal loop and max(d, h) in the overlapped one. Both take turns.

With --gpu: random weights in the shape of Llama 3.2 1B, 256 prompts of 4,096 tokens, 16 new tokens each. `device` is
the time in which at least one step ran, as CUDA's events tell it; what is left of `wall` is time in which the device
waited for the host. Between the kernels of one step that counts for the device: a step that is not in a CUDA graph may
itself wait for the host. Goal: wall <= 1.05 device with overlap.
"""

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from bench.common import Stat, alternate, emit, machine_facts, progress, significant, summarize, table
from bench.peer_engines.folio import greedy
from cache.pages import PagePool
from engine import Engine, SamplingParams
from families import model_config
from model import ModelConfig, Transformer
from runner import StepResults
from scheduler.batch import Batch
from scheduler.loop import Masks, normal_loop, overlap_loop
from scheduler.request import Request
from scheduler.scheduler import Scheduler

PAIRS = ("4/0.5", "4/2", "4/4", "2/4")  # d/h in ms
WARM_UP = 5  # steps: the prompts, and until the loop is in its stride
LLAMA_1B: dict[str, Any] = dict(
    model_type="llama",
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling=dict(
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    tie_word_embeddings=True,
)


# ---- a device and a host that take as long as they are told


def spin_until(deadline: float) -> None:
    while time.perf_counter() < deadline:
        pass


class TimedStep:
    def __init__(self, end: float, rows: int):
        self._end, self._rows = end, rows

    def sample(self, masks: Masks) -> None:
        raise NotImplementedError("nobody here asks for masks")

    def wait(self) -> int:
        """-> how many rows the step had. Sleeps, but for the last bit, for which a sleep is too coarse."""
        left = self._end - time.perf_counter() - 0.0005
        if left > 0:
            time.sleep(left)
        spin_until(self._end)
        return self._rows


class TimedDevice:
    """Takes `seconds` for each step, one after the other, whatever the host does meanwhile: as a GPU would."""

    def __init__(self, seconds: float):
        self._seconds, self._free_at = seconds, 0.0

    def launch(self, batch: Batch) -> TimedStep:
        self._free_at = max(self._free_at, time.perf_counter()) + self._seconds
        return TimedStep(self._free_at, len(batch.requests))


class TimedHost:
    """Commits to the real scheduler. Plan and commit take half of `seconds` each, or longer if the scheduler does."""

    def __init__(self, scheduler: Scheduler, seconds: float):
        self._scheduler, self._plan, self._half = scheduler, scheduler.plan, seconds / 2
        scheduler.plan = self.plan

    def plan(self) -> Batch | None:
        start = time.perf_counter()
        batch = self._plan()
        spin_until(start + self._half)
        return batch

    def commit(self, batch: Batch, results: int) -> None:
        start = time.perf_counter()
        self._scheduler.commit(batch, [1] * results, [True] * results)
        spin_until(start + self._half)

    def masks(self, batch: Batch) -> Masks:
        raise NotImplementedError("nobody here asks for masks")


def seconds_per_step(loop: Callable, device: float, host: float, steps: int, rows: int) -> float:
    """Wall time of a step: decodes of `rows` requests, none of which ends."""
    new = steps + WARM_UP + 8
    scheduler = Scheduler(PagePool(1 + rows * (2 + new // 16), 16), rows, chunk_size=2048)
    for i in range(rows):
        scheduler.add(Request([i] * 8, SamplingParams(temperature=0), frozenset(), new, 0))
    turns = loop(scheduler, TimedDevice(device), TimedHost(scheduler, host))
    for _ in range(WARM_UP):
        next(turns)
    start = time.perf_counter()
    for _ in range(steps):
        next(turns)
    taken = (time.perf_counter() - start) / steps
    scheduler.check()
    if len(scheduler.running) != rows:
        raise RuntimeError(f"{len(scheduler.running)} of {rows} requests run: not as it was set up")
    return taken


def measure_pair(device: float, host: float, steps: int, rows: int, repeats: int) -> dict[str, Any]:
    """device, host: seconds of a step. -> a record in ms."""
    each = dict(device=device, host=host, steps=steps, rows=rows)
    loops = {
        "normal": partial(seconds_per_step, normal_loop, **each),
        "overlap": partial(seconds_per_step, overlap_loop, **each),
    }
    stats = {name: summarize(t * 1e3 for t in times) for name, times in alternate(loops, repeats).items()}
    serial, ideal = (device + host) * 1e3, max(device, host) * 1e3
    return {
        "device": device * 1e3, "host": host * 1e3, "normal": stats["normal"], "overlap": stats["overlap"],
        "serial": serial, "ideal": ideal,
        "normal_ratio": stats["normal"].median / serial, "overlap_ratio": stats["overlap"].median / ideal,
    }  # fmt: skip


HEADERS = ("d", "h", "normal", "d + h", "ratio", "overlap", "max(d, h)", "ratio", "gained")


def pair_row(r: dict[str, Any]) -> list[str]:
    return [
        f"{r['device']:g}", f"{r['host']:g}",
        r["normal"].show(2), f"{r['serial']:g}", f"{r['normal_ratio']:.3f}",
        r["overlap"].show(2), f"{r['ideal']:g}", f"{r['overlap_ratio']:.3f}",
        f"{r['normal'].median / r['overlap'].median:.2f}x",
    ]  # fmt: skip


def bench_pairs(args: argparse.Namespace) -> dict[str, Any]:
    records = []
    for device, host in args.pairs:
        progress(f"device {device:g} ms, host {host:g} ms")
        records.append(measure_pair(device / 1e3, host / 1e3, args.steps, args.rows, args.repeats))
    print(
        f"ms a step, {args.rows} requests decode; median of {args.repeats} runs of {args.steps} steps; goal: ratio 1.05"
    )
    print(table(HEADERS, map(pair_row, records)))
    return {"steps": args.steps, "rows": args.rows, "pairs": [as_json(r) for r in records]}


# ---- a whole engine


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device, max_model_len: int) -> Transformer:
    """A model whose weights are made on the device; speed does not depend on what they say."""
    with torch.device("meta"):
        model = Transformer(config, max_model_len)
    inverse_frequencies = {name: tensor for name, tensor in model.named_buffers() if tensor.device.type != "meta"}
    model = model.to(dtype).to_empty(device=device)
    for name, tensor in inverse_frequencies.items():
        setattr(model, name, tensor.to(device))
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02)
        else:
            parameter.fill_(1)  # a norm
    return model.eval()


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one of the spans ran: the next step may begin while results of this one are fetched."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def record_spans(engine: Engine) -> list[tuple[float, float]]:
    """Re-bind the engine's commit, so that the list it returns fills with the device's time for each step."""
    spans: list[tuple[float, float]] = []
    commit = engine.commit

    def recorded(batch: Batch, results: StepResults) -> None:
        spans.append(results.span)
        commit(batch, results)

    engine.commit = recorded
    return spans


def start_engine(model: Transformer, args: argparse.Namespace, overlap: bool) -> Engine:
    """An engine with room for all prompts, compiled if asked to, and warm."""
    row = -(-(args.prompt_tokens + args.new_tokens) // 16) * 16
    engine = Engine(
        model,
        max_batch_size=args.batch,
        max_model_len=row,
        max_total_tokens=args.batch * (row + 16),  # a page more each: nobody waits for one
        chunk_size=args.chunk,
        radix=False,
        overlap=overlap,
    )
    for name in engine.compile(True, masked=False) if args.compile else engine.warm_up(True, masked=False):
        progress(f"  {name}")
    engine.generate([[1] * args.prompt_tokens] * 2, greedy(args.new_tokens))  # warms up what there is to warm
    return engine


def run(engine: Engine, args: argparse.Namespace) -> tuple[float, float]:
    """-> seconds from the first prompt in to the last token out, and those in which the device had a step."""
    rng = random.Random(0)
    vocab = engine.model.config.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(args.prompt_tokens)] for _ in range(args.batch)]
    commit, spans = engine.commit, record_spans(engine)
    start = time.perf_counter()
    outputs = engine.generate(prompts, greedy(args.new_tokens))
    wall = time.perf_counter() - start
    engine.commit = commit
    wrong = {c.finish_reason for output in outputs for c in output.outputs} - {"length"}
    if wrong:
        raise RuntimeError(f"requests ended with {wrong}: {outputs[0].outputs[0].stop_reason}")
    return wall, covered(spans)


def measure_engine(model: Transformer, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """End to end without and with overlap, in turns. One engine at a time, because the pages are most of the memory."""

    def measure(overlap: bool) -> tuple[float, float]:
        progress(f"  overlap {'on' if overlap else 'off'}")
        taken = run(start_engine(model, args, overlap), args)
        gc.collect()  # engine and loop refer to each other
        if model.norm.weight.device.type == "cuda":
            torch.cuda.empty_cache()
        return taken

    runs = alternate({"overlap off": partial(measure, False), "overlap on": partial(measure, True)}, args.repeats)
    return {
        name: {
            "wall": summarize(wall for wall, _ in pairs),
            "device": summarize(device for _, device in pairs),
            "ratio": summarize(wall / device for wall, device in pairs),
        }
        for name, pairs in runs.items()
    }


def bench_gpu(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    model = random_model(
        model_config(LLAMA_1B), torch.bfloat16, device, -(-(args.prompt_tokens + args.new_tokens) // 16) * 16
    )
    results = measure_engine(model, args)
    print(
        f"{name}: {args.batch} prompts of {args.prompt_tokens:,} tokens, {args.new_tokens} new each; goal: ratio 1.05"
    )
    rows = ([key, r["wall"].show(3), r["device"].show(3), r["ratio"].show(3)] for key, r in results.items())
    print(table(("", "wall s", "device s", "ratio"), rows))
    settings = {key: getattr(args, key) for key in ("batch", "prompt_tokens", "new_tokens", "chunk", "compile")}
    return {"gpu": name, **settings, "results": {key: as_json(r) for key, r in results.items()}}


# ---- all of it


def as_json(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value.json() if isinstance(value, Stat) else significant(value) for key, value in record.items()}


def pair(text: str) -> tuple[float, float]:
    """ "4/0.5" -> (4.0, 0.5)"""
    device, host = map(float, text.split("/"))
    return device, host


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What overlapping host and device is worth.")
    parser.add_argument("--pairs", nargs="+", type=pair, default=[pair(text) for text in PAIRS], help="ms, d/h each")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=8, help="requests that decode")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpu", action="store_true", help="a 1B model on a GPU, end to end, instead")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=8192, help="token budget of a step")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step of the GPU run")
    parser.add_argument("--out", help="also write the JSON line to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.gpu and not torch.cuda.is_available():
        print("--gpu needs a CUDA device, and torch finds none here", file=sys.stderr)
        return 2
    record = bench_gpu(args) if args.gpu else bench_pairs(args)
    emit({"bench": "overlap", **machine_facts(), "repeats": args.repeats, **record}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
