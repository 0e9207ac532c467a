"""The server under load: time to first token, time between tokens, and what HTTP costs beside the offline engine.

    python -m bench.serve                                  # Poisson arrivals, then all at once beside the offline engine
    python -m bench.serve --shape smollm2-135m --rate 1 --requests 32 --compile
    python -m bench.serve --rate inf --concurrency 16      # closed loop: 16 clients, each asks when it has its answer
    python -m bench.serve --requests 8 --repeats 1         # does the benchmark itself work?

The patterns are those of vLLM's and SGLang's serving benchmarks: requests come at random, --rate a second on average, at most
--concurrency at a time; each has a prompt and an answer of random length, and every prompt is new. Answers stream.

    TTFT   seconds from sending a request to its first event
    TPOT   (last event - first event) / (tokens - 1) of a request
    ITL    between two events of a stream, all streams together

Then the throughput: the same requests all at once, through HTTP (streamed, and whole) and in `Engine.generate` in this
process, taking turns --repeats times. The server, its engine and the clients share the machine's cores; the offline engine has
them alone. A table, then one JSON line.
"""

import argparse
import asyncio
import os
import random
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from bench.checkpoints import NAMES, make_checkpoint
from bench.common import alternate, emit, machine_facts, significant, summarize, table, use_threads
from bench.http_load import Answer, ask, get, offer, server
from engine import Engine, SamplingParams
from engine_args import BUNDLED_MODEL

SHOWN = ("TTFT", "TPOT", "ITL")


class Workload:
    """Requests of random length; each call of `draw` makes new prompts of the same lengths."""

    def __init__(self, args: argparse.Namespace):
        rng = random.Random(args.seed)
        self.lengths = [(rng.randint(*args.prompt), rng.randint(*args.answer)) for _ in range(args.requests)]
        self.gaps = [rng.expovariate(args.rate) if args.rate < float("inf") else 0.0 for _ in self.lengths]
        self._prompts = random.Random(args.seed + 1)

    @property
    def new_tokens(self) -> int:
        return sum(new for _, new in self.lengths)

    def draw(self, vocab_size: int) -> list[tuple[list[int], int]]:
        """-> prompt and new tokens of each."""
        return [([self._prompts.randrange(3, vocab_size) for _ in range(p)], new) for p, new in self.lengths]


def body_of(prompt: list[int], new: int, stream: bool) -> dict[str, Any]:
    params = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": params, "stream": stream}


def through_http(
    url: str, requests: list[tuple[list[int], int]], gaps: list[float], concurrency: int | None, stream: bool = True
) -> tuple[list[Answer], float]:
    """-> the answers, and the seconds that all of them took. RuntimeError if one is not what was asked for."""
    asks = [partial(ask, url, body_of(prompt, new, stream)) for prompt, new in requests]
    start = time.perf_counter()
    answers = asyncio.run(offer(asks, gaps, concurrency))
    seconds = time.perf_counter() - start
    for answer, (_, new) in zip(answers, requests, strict=True):
        if answer.status != 200 or answer.tokens != new:
            raise RuntimeError(f"asked for {new} tokens, got status {answer.status}: {answer.last}")
    return answers, seconds


def offline(engine: Engine, requests: list[tuple[list[int], int]]) -> float:
    """Seconds for all of them."""
    params = [SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True) for _, new in requests]
    start = time.perf_counter()
    engine.generate([prompt for prompt, _ in requests], params)
    return time.perf_counter() - start


def latencies(answers: Sequence[Answer]) -> dict[str, list[float]]:
    return {
        "TTFT": [answer.first for answer in answers],
        "TPOT": [answer.per_token for answer in answers],
        "ITL": [gap for answer in answers for gap in answer.gaps],
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not below this share of all; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def under_load(url: str, workload: Workload, vocab_size: int, args: argparse.Namespace) -> dict[str, Any]:
    answers, seconds = through_http(url, workload.draw(vocab_size), workload.gaps, args.concurrency)
    found = latencies(answers)
    rows = [
        (name, *(f"{quantile(found[name], share) * 1e3:,.1f}" for share in (0.5, 0.9, 0.99)), f"{len(found[name]):,}")
        for name in SHOWN
    ]
    print(table(("ms", "p50", "p90", "p99", "measured"), rows))
    print(f"{len(answers) / seconds:.2f} requests/s, {workload.new_tokens / seconds:,.0f} tokens/s\n")
    record = {name: {f"p{int(q * 100)}": significant(quantile(found[name], q)) for q in (0.5, 0.99)} for name in SHOWN}
    return record | {"tokens_per_second": significant(workload.new_tokens / seconds)}


def beside_the_engine(url: str, workload: Workload, args: argparse.Namespace) -> dict[str, Any]:
    """All at once, in turns: through HTTP, and in an engine of this process."""
    engine = Engine.from_pretrained(
        args.model, dtype=args.dtype, max_batch_size=args.rows, max_model_len=args.max_model_len
    )
    if args.compile:
        for _ in engine.compile():
            pass
    vocab, at_once = engine.model.config.vocab_size, [0.0] * args.requests
    measures = {
        "offline": lambda: offline(engine, workload.draw(vocab)),
        "HTTP, streamed": lambda: through_http(url, workload.draw(vocab), at_once, None)[1],
        "HTTP, whole": lambda: through_http(url, workload.draw(vocab), at_once, None, stream=False)[1],
    }
    for measure in measures.values():
        measure()  # once to get warm
    found = {
        name: summarize(workload.new_tokens / s for s in seconds)
        for name, seconds in alternate(measures, args.repeats).items()
    }
    best = found["offline"].median
    rows = [(name, stat.show(), f"{stat.median / best:.1%}") for name, stat in found.items()]
    print(table((f"{args.requests} requests at once", "tokens/s", "of offline"), rows))
    return {name: stat.json() for name, stat in found.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    use_threads(args.threads)
    if args.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # the server's engine
    flags = ["--model", args.model, "--dtype", args.dtype, "--max-running-requests", str(args.rows)]
    flags += ["--compile"] * args.compile
    flags += ["--max-model-len", str(args.max_model_len)] if args.max_model_len else []
    workload = Workload(args)
    with server(flags, args.port) as (url, _):
        vocab_size = get(url, "/get_model_info")["vocab_size"]
        through_http(url, workload.draw(vocab_size)[:4], [0.0] * 4, None)  # to get warm
        return under_load(url, workload, vocab_size, args) | beside_the_engine(url, workload, args)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Latency and throughput of the server.")
    parser.add_argument("--model", default=str(BUNDLED_MODEL))
    parser.add_argument("--shape", choices=NAMES, help="instead of --model: random weights in this shape")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--rows", type=int, default=16, help="--max-running-requests")
    parser.add_argument("--threads", type=int, help="of torch, in both engines")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second; inf: all at once (default: 4)")
    parser.add_argument("--concurrency", type=int, help="most requests at a time (default: no limit)")
    parser.add_argument("--prompt", type=int, nargs=2, default=(16, 256), metavar=("LEAST", "MOST"))
    parser.add_argument("--answer", type=int, nargs=2, default=(16, 128), metavar=("LEAST", "MOST"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=30111)
    parser.add_argument("--out", help="also write the JSON line to this file")
    args = parser.parse_args(argv)
    if not args.rate > 0:
        parser.error(f"--rate is {args.rate}; it must be above 0")
    if args.shape is not None:
        args.model = str(make_checkpoint(args.shape))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    record = run(args)
    emit({"bench": "serve", **machine_facts(), **vars(args), **record}, args.out)


if __name__ == "__main__":
    main()
