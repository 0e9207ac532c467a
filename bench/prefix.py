"""What sharing a prefix is worth, and what chunks are worth to those who decode while a long prompt comes in.

    python -m bench.prefix                        # SmolLM2-135M's shape, float32, 2 threads: half an hour or so
    python -m bench.prefix --parts prefix --repeats 1
    python -m bench.prefix --small                # does the benchmark itself work? seconds

prefix  16 prompts of 1,024 tokens that all share and 32 that are their own, 32 new tokens each, all asked for at once and
        with nothing cached: with the radix tree, without it, and in transformers' generate() as one batch. `prefill` is
        the time until all of them have their first token. Goal: 5 times as fast as without.
load    8 requests decode; one after the other, prompts of 1,024 tokens arrive, with 32 steps of peace between. The
        table has the times between two tokens of those 8, from the first arrival until the last long prompt has its
        token, and what the long prompts themselves waited: prompts in chunks of 128, and whole.

All run on the same random weights, warmed up, and take turns; medians of --repeats, and the range.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.common import Stat, alternate, emit, machine_facts, progress, significant, summarize, table, use_threads
from bench.decode import load_peer, make_checkpoint
from checkpoint import Checkpoint, load
from engine import Engine, SamplingParams
from model import Transformer

PAGE = 16
PARTS = ("prefix", "load")


@dataclass(frozen=True)
class Sizes:
    """All in tokens, but for the numbers of requests and of steps."""

    shape: str = "smollm2-135m"
    batch: int = 16
    shared: int = 1024
    own: int = 32
    new: int = 32
    running: int = 8
    long: int = 1024
    arrivals: int = 4
    pause: int = 32
    chunk: int = 128

    @property
    def longest(self) -> int:
        return max(self.shared + self.own + self.new, self.long + 1, PAGE + self.decoded)

    @property
    def decoded(self) -> int:
        """More than each of the running requests can get before the last long prompt is done."""
        return (self.arrivals + 1) * (self.pause + 2 * -(-self.long // (self.chunk - self.running)) + 4)


SMALL = Sizes("tiny", batch=4, shared=128, own=8, new=4, running=2, long=128, arrivals=2, pause=4, chunk=32)


def some_tokens(rng: random.Random, count: int, vocab: int) -> list[int]:
    return [rng.randrange(vocab) for _ in range(count)]


def whole_pages(tokens: int) -> int:
    return -(-tokens // PAGE) * PAGE


# ---- a shared prefix


def prefix_engine(model: Transformer, sizes: Sizes, radix: bool) -> Engine:
    row = whole_pages(sizes.shared + sizes.own + sizes.new)
    room = 2 * sizes.batch * row  # nobody waits for pages
    return Engine(model, max_batch_size=sizes.batch, max_model_len=row, max_total_tokens=room, radix=radix)


def clock_folio(engine: Engine, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """Seconds from an empty cache until all have their first token, and until all are done; and the tokens."""
    engine.flush_cache()
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=new, ignore_eos=True))
    engine.check()
    metrics = [output.outputs[0].metrics for output in outputs]
    start = min(m.queued_at for m in metrics)
    return {
        "prefill": max(m.token_times[0] for m in metrics) - start,
        "total": max(m.token_times[-1] for m in metrics) - start,
        "cached": sum(m.cached_tokens for m in metrics),
        "tokens": [output.outputs[0].token_ids for output in outputs],
    }


def clock_peer(model: Any, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """The same of transformers: a logits processor is called when the logits of a step are there."""
    times: list[float] = []

    def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        times.append(time.perf_counter())
        return scores

    ids = torch.tensor(prompts)
    start = time.perf_counter()
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, logits_processor=[note]
    )
    total = time.perf_counter() - start
    return {"prefill": times[0] - start, "total": total, "cached": 0, "tokens": output[:, ids.shape[1] :].tolist()}


def measure_prefix(folder: Path, model: Transformer, sizes: Sizes, repeats: int) -> dict[str, dict[str, Any]]:
    rng, vocab = random.Random(0), model.config.vocab_size
    shared = some_tokens(rng, sizes.shared, vocab)
    prompts = [shared + some_tokens(rng, sizes.own, vocab) for _ in range(sizes.batch)]
    peer = load_peer(folder)
    measures: dict[str, Callable[[list[list[int]], int], dict[str, Any]]] = {
        "radix on": partial(clock_folio, prefix_engine(model, sizes, True)),
        "radix off": partial(clock_folio, prefix_engine(model, sizes, False)),
        "transformers": partial(clock_peer, peer),
    }
    for name, measure in measures.items():
        progress(f"  prefix: warming up {name}")
        measure([prompt[-sizes.own :] for prompt in prompts], 2)
    progress("  prefix: timing")
    runs = alternate({name: partial(measure, prompts, sizes.new) for name, measure in measures.items()}, repeats)
    expected = (sizes.batch - 1) * (sizes.shared // PAGE * PAGE)
    if {run["cached"] for run in runs["radix on"]} != {expected} or any(run["cached"] for run in runs["radix off"]):
        raise RuntimeError(f"cached: {[run['cached'] for run in runs['radix on']]} tokens, not the {expected} expected")
    reference = runs["transformers"][0]["tokens"]
    return {
        name: {
            "prefill": summarize(run["prefill"] for run in several),
            "total": summarize(run["total"] for run in several),
            "same": sum(a == b for a, b in zip(several[0]["tokens"], reference, strict=True)),
            "tokens": expected if name == "radix on" else 0,
        }
        for name, several in runs.items()
    }


def show_prefix(results: dict[str, dict[str, Any]], sizes: Sizes) -> str:
    off = results["radix off"]
    rows = [
        [
            name,
            r["prefill"].show(2),
            f"{off['prefill'].median / r['prefill'].median:.2f}x",
            r["total"].show(2),
            f"{off['total'].median / r['total'].median:.2f}x",
            f"{r['tokens']:,}",
            f"{r['same']}/{sizes.batch}",
        ]
        for name, r in results.items()
    ]
    asked = f"{sizes.batch} prompts, {sizes.shared:,} tokens shared + {sizes.own} own, {sizes.new} new each"
    headers = ("", "prefill s", "to off", "total s", "to off", "cached tokens", "same texts")
    return f"\n{asked}; goal: prefill 5x\n" + table(headers, rows)


# ---- long prompts while others decode


def load_engine(model: Transformer, sizes: Sizes, chunked: bool) -> Engine:
    running, long = whole_pages(PAGE + sizes.decoded), whole_pages(sizes.long + 1)
    return Engine(
        model,
        max_batch_size=sizes.running + 1,
        max_model_len=max(running, long),
        max_total_tokens=2 * (sizes.running * running + long),  # nobody waits for pages
        chunk_size=sizes.chunk,
        radix=False,
        chunked_prefill=chunked,
    )


def clock_load(engine: Engine, sizes: Sizes, seed: int = 0) -> dict[str, list[float]]:
    """-> seconds between the tokens of those that decode, and from the arrival of each long prompt to its token."""
    rng, vocab = random.Random(seed), engine.model.config.vocab_size
    decode = SamplingParams(temperature=0, max_new_tokens=sizes.decoded, ignore_eos=True)
    ids = [engine.add(some_tokens(rng, PAGE, vocab), decode) for _ in range(sizes.running)]
    while len(engine.scheduler.running) < sizes.running:
        engine.step()
    requests = list(engine.scheduler.running)
    waited, began = [], 0.0
    for _ in range(sizes.arrivals):
        for _ in range(sizes.pause):
            engine.step()
        start = time.perf_counter()
        began = began or start
        long = engine.add(some_tokens(rng, sizes.long, vocab), SamplingParams(temperature=0, max_new_tokens=1))
        while not any(delta.request_id == long for delta in engine.step()):
            pass
        waited.append(time.perf_counter() - start)
    gaps = [b - a for r in requests for a, b in pairwise(r.metrics.token_times) if b > began]
    if any(r.finish_reason is not None for r in requests):
        raise RuntimeError("a request that was to decode all the time has ended")
    for id in ids:
        engine.abort(id)
    while engine.has_work:
        engine.step()
    engine.check()
    return {"gaps": gaps, "waited": waited}


def share(values: list[float], part: float) -> float:
    """The value that `part` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def measure_load(model: Transformer, sizes: Sizes, repeats: int) -> dict[str, dict[str, Stat]]:
    engines = {"chunked": load_engine(model, sizes, True), "whole": load_engine(model, sizes, False)}
    for name, engine in engines.items():
        progress(f"  load: warming up {name}")
        engine.generate([[1] * sizes.chunk, [1] * PAGE], SamplingParams(temperature=0, max_new_tokens=2))
    progress("  load: timing")
    runs = alternate({name: partial(clock_load, engine, sizes) for name, engine in engines.items()}, repeats)
    return {
        name: {
            "p50": summarize(share(run["gaps"], 0.5) for run in several),
            "p99": summarize(share(run["gaps"], 0.99) for run in several),
            "max": summarize(max(run["gaps"]) for run in several),
            "first_token": summarize(share(run["waited"], 0.5) for run in several),
        }
        for name, several in runs.items()
    }


def show_load(results: dict[str, dict[str, Stat]], sizes: Sizes) -> str:
    rows = ([name, *(stat.show(1, 1e3) for stat in r.values())] for name, r in results.items())
    asked = (
        f"{sizes.running} decode, {sizes.arrivals} prompts of {sizes.long:,} tokens come in; chunks of {sizes.chunk}"
    )
    return f"\n{asked}; ms between tokens\n" + table(("", "p50", "p99", "max", "long: first token"), rows)


# ---- all of it


def as_json(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        name: {key: value.json() if isinstance(value, Stat) else value for key, value in r.items()}
        for name, r in results.items()
    }


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print the parts asked for -> their figures for the JSON line."""
    sizes = SMALL if args.small else Sizes()
    folder = make_checkpoint(sizes.shape)
    model = load(Checkpoint.open(folder), torch.float32, torch.device("cpu"), sizes.longest)
    record: dict[str, Any] = {"shape": sizes.shape}
    if "prefix" in args.parts:
        results = measure_prefix(folder, model, sizes, args.repeats)
        print(show_prefix(results, sizes), flush=True)
        ratio = results["radix off"]["prefill"].median / results["radix on"]["prefill"].median
        record["prefix"] = as_json(results) | {"prefill_to_off": significant(ratio)}
    if "load" in args.parts:
        loads = measure_load(model, sizes, args.repeats)
        print(show_load(loads, sizes), flush=True)
        record["load"] = as_json(loads)
    return record


def main(argv: list[str] | None = None) -> None:
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description="A shared prefix, and long prompts among decodes, on this CPU.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="a tiny shape and short prompts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="also write the JSON line to this file")
    args = parser.parse_args(argv)
    use_threads(args.threads)
    logging.disable_progress_bar()
    record = bench(args)
    emit({"bench": "prefix", **machine_facts(), "repeats": args.repeats, **record}, args.out)


if __name__ == "__main__":
    main()
