"""Folio beside other engines on the same weights, prompts and threads, each in a process of its own.

    python -m bench.peers                                    # all that is installed, SmolLM2-135M's shape
    python -m bench.peers --shape folio-tiny --rows b1,b16   # the bundled model, some rows
    python -m bench.peers --shape tiny --rows b1 --new-tokens 8 --repeats 1      # does the benchmark itself work?
    python -m bench.peers --gpt-fast PATH --vllm http://localhost:8000

    folio, folio-compiled          plain, and after Engine.compile(greedy=True); prefixes are shared
    hf, hf-compiled, hf-batching   transformers: generate(), with a static cache and torch.compile, continuous batching
    llama.cpp, llama.cpp-flash     CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf
    openvino                       pip install openvino openvino-genai
    gpt-fast                       --gpt-fast: a checkout
    vllm                           --vllm: the URL of a server, with threads and a cache of its own

All compute and cache in float32, greedily; bench/peer_engines/ says how each is set up. What is not installed is named,
and what fails is said; the run goes on. Prompts are random, and new each time, so that no cache has seen them; in a
repeat all engines get the same.

    b1, b16       N tokens after the first, of 1 or 16 prompts: 16 N / (t(N + 1 new tokens) - t(1 new token))
    prefill512    one prompt of so many tokens until its first new one
    shared        16 prompts that share 1,024 tokens and have 32 of their own: until all have their first token, and
                  until all have 32
    poisson       100 requests of mixed lengths, arriving at random at --rate a second (else 0.7 of what the first
                  engine does when all are there at once): tokens/s, and p50 and p99 of the time to the first token

Before the clock starts, the first 32 tokens are compared with those of transformers: who computes another model is
no peer. Engines take turns; medians of --repeats, and the range. The column "Folio" says how many times as fast the
fastest Folio is. First the ceilings, then a table a row, then one JSON line; `bench.plot` draws it.
"""

import argparse
import importlib.util
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench import ceilings
from bench.checkpoints import NAMES, make_checkpoint
from bench.common import Stat, alternate, emit, machine_facts, progress, significant, summarize, table, use_threads
from bench.decode import COMPARE, agreeing, parse_row, share_of_ceiling
from bench.peer_engines import Arrival, Row, Served, Tokens
from bench.peer_engines.worker import ENGINES, PeerFailed, Worker
from bench.prefix import share, some_tokens
from checkpoint import Checkpoint, load
from model import Transformer

ROWS = ("b1", "b16", "prefill512", "prefill2048", "shared", "poisson")
LLAMA_CPP = (("llama_cpp", "gguf"), "CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf")
NEEDS = {  # engine -> what it imports, and how to get that; those that are not here come with Folio
    "llama.cpp": LLAMA_CPP,
    "llama.cpp-flash": LLAMA_CPP,
    "openvino": (("openvino", "openvino_genai"), "pip install openvino openvino-genai"),
}
VERSIONS = {"hf": "transformers", "llama.cpp": "llama-cpp-python", "openvino": "openvino-genai"}
SHARE_OF_CAPACITY = 0.7  # requests a second that come, where --rate does not say
AGREE = 0.9  # of the tokens that are compared; below this something is wrong

Figures = dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """In tokens, but for the number of requests. What the rows do not say in their names."""

    shared: int = 1024
    shared_own: int = 32
    shared_new: int = 32
    requests: int = 100
    prompts: tuple[int, int] = (16, 512)
    answers: tuple[int, int] = (16, 128)
    rows: int = 16  # that run together


SMALL = Sizes(shared=64, shared_own=8, shared_new=4, requests=8, prompts=(8, 32), answers=(2, 8), rows=4)


# ---- what is asked


def make_row(name: str, prompt: int, new: int, sizes: Sizes) -> Row:
    """ValueError for a name that is none."""
    if name == "shared":
        return Row(name, sizes.rows, sizes.shared + sizes.shared_own, sizes.shared_new)
    if name == "poisson":
        return Row(name, sizes.rows, sizes.prompts[1], sizes.answers[1])
    return parse_row(name, prompt, new)


def make_prompts(row: Row, sizes: Sizes, vocab: int, seed: int) -> Tokens:
    rng = random.Random(f"{row.name} {seed}")
    shared = some_tokens(rng, sizes.shared if row.name == "shared" else 0, vocab)
    return [shared + some_tokens(rng, row.prompt - len(shared), vocab) for _ in range(row.batch)]


def make_arrivals(sizes: Sizes, vocab: int, seed: int, rate: float | None) -> list[Arrival]:
    """Arrivals of a Poisson process, `rate` a second; None: all are there at the start."""
    rng, at, arrivals = random.Random(f"poisson {seed}"), 0.0, []
    for _ in range(sizes.requests):
        at += rng.expovariate(1.0) / rate if rate else 0.0
        prompt = some_tokens(rng, rng.randint(*sizes.prompts), vocab)
        arrivals.append(Arrival(at, prompt, rng.randint(*sizes.answers)))
    return arrivals


# ---- measuring one engine; each returns a measure, which alternate() calls once a repeat


def decode(worker: Worker, row: Row, fresh: Callable[[int], Tokens]) -> Callable[[], Figures]:
    """A row that decodes, or only prefills."""
    seeds = itertools.count(1)

    def measure() -> Figures:
        for _ in range(5):
            first = timed(worker, fresh(next(seeds)), 1, row)
            if not row.new:
                return {"tokens_per_s": row.prompt / first, "first_s": first}
            steps = timed(worker, fresh(next(seeds)), row.new + 1, row) - first
            if steps > 0:
                return {"tokens_per_s": row.batch * row.new / steps, "first_s": first}
        raise PeerFailed("this machine is too busy: more tokens never took longer than one")

    return measure


def shared(worker: Worker, row: Row, fresh: Callable[[int], Tokens]) -> Callable[[], Figures]:
    seeds = itertools.count(1)

    def measure() -> Figures:
        first = timed(worker, fresh(next(seeds)), 1, row)
        total = timed(worker, fresh(next(seeds)), row.new, row)
        return {"first_s": first, "total_s": total}

    return measure


def poisson(worker: Worker, fresh: Callable[[int], list[Arrival]]) -> Callable[[], Figures]:
    seeds = itertools.count(1)

    def measure() -> Figures:
        arrivals = fresh(next(seeds))
        return serving_figures(arrivals, worker.serve(arrivals))

    return measure


def timed(worker: Worker, prompts: Tokens, new: int, row: Row) -> float:
    outputs = worker.generate(prompts, new, row)
    check_count(outputs, [new] * len(prompts))
    return worker.seconds


def check_count(outputs: Tokens, wanted: list[int]) -> None:
    if [len(output) for output in outputs] != wanted:
        raise PeerFailed(f"gives {[len(output) for output in outputs]} tokens, not the {wanted} asked for")


def serving_figures(arrivals: list[Arrival], served: list[Served]) -> Figures:
    check_count([s.tokens for s in served], [arrival.new for arrival in arrivals])
    waited = [s.times[0] - arrival.at for arrival, s in zip(arrivals, served, strict=True)]
    wall = max(s.times[-1] for s in served) - min(arrival.at for arrival in arrivals)
    rate = sum(arrival.new for arrival in arrivals) / wall
    return {"tokens_per_s": rate, "first_p50_s": share(waited, 0.5), "first_p99_s": share(waited, 0.99)}


# ---- all of them


def missing(name: str, args: argparse.Namespace) -> str | None:
    """Why an engine cannot be asked, or None."""
    if name == "gpt-fast" and args.gpt_fast is None:
        return "not asked for: --gpt-fast PATH of a checkout"
    if name == "vllm" and args.vllm is None:
        return "not asked for: --vllm URL of a server"
    modules, install = NEEDS.get(name, ((), ""))
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"not installed: {install}" if absent else None


def open_workers(folder: Path, rows: list[Row], args: argparse.Namespace) -> tuple[dict[str, Worker], dict[str, str]]:
    """-> those that work, and of the others why not."""
    options: dict[str, dict[str, Any]] = {
        "llama.cpp": {"threads": args.threads},
        "llama.cpp-flash": {"threads": args.threads},
        "openvino": {"threads": args.threads},
        "gpt-fast": {"checkout": str(args.gpt_fast and Path(args.gpt_fast).resolve())},
        "vllm": {"url": args.vllm},
    }
    workers, absent = {}, {}
    for name in args.engines:
        reason = missing(name, args)
        if reason is None:
            progress(f"{name}: loading")
            try:
                workers[name] = Worker(name, folder, rows, args.threads, options.get(name))
            except PeerFailed as error:
                reason = f"failed: {error}"
        if reason is not None:
            absent[name] = reason
    return workers, absent


class Bench:
    """The workers, and what is asked of them."""

    def __init__(self, workers: dict[str, Worker], vocab: int, sizes: Sizes, repeats: int, rate: float | None):
        self.workers, self.vocab, self.sizes, self.repeats, self.rate = workers, vocab, sizes, repeats, rate
        self.failed: dict[str, str] = {}  # of the row: engine -> why

    def run(self, row: Row) -> dict[str, dict[str, Any]]:
        """-> for each engine that can: a Stat of each figure, and "agree". `failed` has the others."""
        self.failed = {}
        measures, agreement = self._poisson() if row.name == "poisson" else self._generate(row)
        progress(f"  {row.name}: timing")
        watched = {name: partial(self._watch, name, measure) for name, measure in measures.items()}
        samples = alternate(watched, self.repeats)
        results = {}
        for name, each in samples.items():
            if name not in self.failed:
                results[name] = {key: summarize(figures[key] for figures in each) for key in each[0]}
                results[name]["agree"] = agreement[name]
        return results

    def _generate(self, row: Row) -> tuple[dict[str, Callable[[], Figures]], dict[str, float]]:
        def fresh(seed: int) -> Tokens:
            return make_prompts(row, self.sizes, self.vocab, seed)

        compare, tokens = min(COMPARE, row.new + 1), {}
        for name in self.workers:
            progress(f"  {row.name}: warming up {name}")
            tokens[name] = self._try(name, lambda worker: self._warm_up(worker, row, fresh(0), compare))
        kind = shared if row.name == "shared" else decode
        measures = {name: kind(self.workers[name], row, fresh) for name in tokens if name not in self.failed}
        return measures, self._agreement({name: tokens[name] for name in measures})

    @staticmethod
    def _warm_up(worker: Worker, row: Row, prompts: Tokens, compare: int) -> Tokens:
        worker.generate(prompts, 1, row)
        outputs = worker.generate(prompts, compare, row)
        check_count(outputs, [compare] * row.batch)
        return outputs

    def _poisson(self) -> tuple[dict[str, Callable[[], Figures]], dict[str, float]]:
        able = [name for name, worker in self.workers.items() if worker.serves]
        self.failed |= {name: "takes no requests as they come" for name in self.workers if name not in able}
        at_once, tokens = make_arrivals(self.sizes, self.vocab, 0, None), {}
        for name in able:
            progress(f"  poisson: warming up {name}")
            served = self._try(name, lambda worker: worker.serve(at_once))
            if served is not None:
                tokens[name] = [s.tokens[:COMPARE] for s in served]
                self.rate = self.rate or SHARE_OF_CAPACITY * len(served) / max(s.times[-1] for s in served)
        if tokens:
            progress(f"  poisson: {self.rate:.2f} requests/s")
        return {name: poisson(self.workers[name], self._arrivals) for name in tokens}, self._agreement(tokens)

    def _arrivals(self, seed: int) -> list[Arrival]:
        return make_arrivals(self.sizes, self.vocab, seed, self.rate)

    def _try(self, name: str, work: Callable[[Worker], Any]) -> Any:
        """What it returns, or None: then `failed` says why."""
        if name in self.failed:
            return None
        try:
            return work(self.workers[name])
        except PeerFailed as error:
            self.failed[name] = str(error)
            return None

    def _watch(self, name: str, measure: Callable[[], Figures]) -> Figures | None:
        """Measure, and say who of the others has not kept still."""
        others = [worker for other, worker in self.workers.items() if other != name]
        before = [worker.cpu_seconds() for worker in others]
        figures = self._try(name, lambda _: measure())
        for worker, used in zip(others, before, strict=True):
            if (busy := worker.cpu_seconds() - used) > 0.05:
                progress(f"  WARNING: {worker.name} used {busy:.2f} s of CPU while {name} was measured")
        return figures

    @staticmethod
    def _agreement(tokens: dict[str, Tokens]) -> dict[str, float]:
        """The share of tokens before the first difference from transformers', or else from the first engine's."""
        reference = tokens.get("hf") or next(iter(tokens.values()), [])
        count = max(1, sum(map(len, reference)))
        agreement = {name: agreeing(ours, reference) / count for name, ours in tokens.items()}
        for name, part in agreement.items():
            if part < AGREE:
                progress(f"  WARNING: {name} chooses other tokens: {part:.0%} agree. Does it compute this model?")
        return agreement


# ---- report


def speed(result: dict[str, Any]) -> float:
    """What engines are compared by: tokens a second, or all first tokens a second."""
    return result["tokens_per_s"].median if "tokens_per_s" in result else 1 / result["first_s"].median


def folio_speed(results: dict[str, dict[str, Any]]) -> float | None:
    return max((speed(result) for name, result in results.items() if name.startswith("folio")), default=None)


LABELS = {
    "tokens_per_s": ("tokens/s", 1, 1.0),
    "first_s": ("first token ms", 1, 1e3),
    "total_s": ("total ms", 1, 1e3),
    "first_p50_s": ("first token p50 ms", 1, 1e3),
    "first_p99_s": ("p99 ms", 1, 1e3),
}


def show(row: Row, results: dict[str, dict[str, Any]], failed: dict[str, str], shares: dict[str, float]) -> str:
    figures = [key for key in LABELS if any(key in result for result in results.values())]
    headers = [row.name, *(LABELS[key][0] for key in figures), "MBU / MFU", "Folio", "same tokens"]
    best, lines = folio_speed(results), []
    for name, result in results.items():
        cells = [result[key].show(*LABELS[key][1:]) for key in figures]
        ratio = f"{best / speed(result):.2f}x" if best else "-"
        lines.append([name, *cells, f"{shares[name]:.1%}" if name in shares else "-", ratio, f"{result['agree']:.0%}"])
    return "\n".join(["", table(headers, lines), *(f"{name}: {reason}" for name, reason in failed.items())])


def as_json(results: dict[str, dict[str, Any]], failed: dict[str, str], shares: dict[str, float]) -> dict[str, Any]:
    best, record = folio_speed(results), {}
    for name, result in results.items():
        figures = {key: value.json() for key, value in result.items() if isinstance(value, Stat)}
        record[name] = figures | {"agree": significant(result["agree"])}
        record[name] |= {"folio": significant(best / speed(result))} if best else {}
        record[name] |= {"of_ceiling": significant(shares[name])} if name in shares else {}
    return record | {name: {"failed": reason} for name, reason in failed.items()}


def bench(args: argparse.Namespace, measured: dict[str, dict[str, Stat]]) -> dict[str, Any]:
    """Measure and print -> its part of the JSON line."""
    sizes = SMALL if args.shape == "tiny" else Sizes()
    rows = [make_row(name, args.prompt_tokens, args.new_tokens, sizes) for name in args.rows]
    folder = make_checkpoint(args.shape)
    model = load(Checkpoint.open(folder), torch.float32, torch.device("cpu"))
    for row in [row for row in rows if row.longest > model.config.max_position]:
        progress(f"{row.name}: left out, {args.shape} has {model.config.max_position} positions")
        rows.remove(row)
    if not rows:
        raise ValueError(f"no row is left for {args.shape}")
    workers, absent = open_workers(folder, rows, args)
    print(f"\n{args.shape} in {folder}, {args.threads} threads each")
    print("\n".join(f"{name}: {reason}" for name, reason in absent.items()), flush=True)
    record: dict[str, Any] = {}
    try:
        runs = Bench(workers, model.config.vocab_size, sizes, args.repeats, args.rate)
        for row in rows:
            results = runs.run(row)
            shares = shares_of_ceiling(row, model, results, measured)
            print(show(row, results, runs.failed, shares), flush=True)
            record[row.name] = as_json(results, runs.failed, shares)
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "shape": args.shape,
        "rate": runs.rate,
        "versions": {name: version(VERSIONS[name]) for name in workers if name in VERSIONS},
        "absent": absent,
        "rows": record,
    }


def shares_of_ceiling(
    row: Row, model: Transformer, results: dict[str, dict[str, Any]], measured: dict[str, dict[str, Stat]]
) -> dict[str, float]:
    """MBU or MFU, where a row has one."""
    if row.name in ("shared", "poisson"):
        return {}
    read, flops = ceilings.ceiling(measured, "read"), ceilings.ceiling(measured, "float32")
    return {name: share_of_ceiling(row, model, speed(result), read, flops) for name, result in results.items()}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    def listed(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    parser = argparse.ArgumentParser(description="Compare Folio with other engines on this CPU.")
    parser.add_argument("--shape", choices=NAMES, default="smollm2-135m")
    parser.add_argument("--rows", type=listed, default=list(ROWS), help=f"default: {','.join(ROWS)}")
    parser.add_argument("--engines", type=listed, default=list(ENGINES), help=f"of {','.join(ENGINES)}")
    parser.add_argument("--gpt-fast", metavar="PATH", help="a checkout")
    parser.add_argument("--vllm", metavar="URL", help="a server of these very weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each prompt of a decode row")
    parser.add_argument("--new-tokens", type=int, default=128, help="decoded after the first one")
    parser.add_argument("--rate", type=float, help="requests a second of the row poisson")
    parser.add_argument("--threads", type=int, help="of each engine; default: what torch takes by itself, one a core")
    parser.add_argument("--out", help="also write the JSON line to this file")
    args = parser.parse_args(argv)
    if not args.engines or (unknown := set(args.engines) - set(ENGINES)):
        parser.error(f"--engines: choose of {','.join(ENGINES)}, not {','.join(sorted(unknown)) or 'nothing'}")
    for option in ("repeats", "prompt_tokens", "new_tokens"):
        if getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1")
    if args.rate is not None and args.rate <= 0:
        parser.error("--rate must be above 0")
    try:
        for name in args.rows:
            make_row(name, args.prompt_tokens, args.new_tokens, Sizes())
    except ValueError as error:
        parser.error(f"--rows: {error}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.threads = use_threads(args.threads)
    tiny = dict(mebibytes=32, size=256, repeats=1) if args.shape == "tiny" else {}
    measured = ceilings.measure(**tiny)
    print(ceilings.show(measured), flush=True)
    record = bench(args, measured)
    settings = {key: getattr(args, key) for key in ("repeats", "prompt_tokens", "new_tokens")}
    facts = {"bench": "peers", "dtype": "float32", **machine_facts(), **settings}
    emit(facts | {"ceilings": ceilings.as_json(measured)} | record, args.out)


if __name__ == "__main__":
    main()
