"""What each technique is worth: one serving workload with all of them, and with each switched off in turn.

    python -m bench.ablate --out ablate.json                       # SmolLM2-135M's shape, float32
    python -m bench.ablate --shape folio-tiny --repeats 5          # the bundled model
    python -m bench.ablate --shape tiny --repeats 1                # does the benchmark itself work? a minute
    python -m bench.ablate --device cuda --dtype bfloat16          # on a GPU
    python -m bench.plot ablate.json ablate.svg                    # a picture of it

Some users at once, each with one question after the other: a prefix that many share, a text of its own, now and then a
long one. Every fourth answer is a form in JSON, whose grammar leaves one way only. Greedy, seeded, answered in full before
the next is asked. Every variant gets the same questions and an empty cache, and must give the same answers; they take
turns. TECHNIQUES is the list: a line adds one.

    tokens/s       new tokens of all users / seconds of the whole run; a form has as many as its text
    first token    ms from a question to its first token, p50 and p99 of all questions
    between        ms between two tokens of an answer that do not come at once, p50 and p99 of all of them

Beside each its ratio to "all on". First what the device can read, then a table, then one JSON line.
"""

import argparse
import json
import random
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch

from bench.checkpoints import BUNDLED, NAMES, make_checkpoint
from bench.common import (
    Stat,
    alternate,
    cpu_model,
    emit,
    machine_facts,
    progress,
    significant,
    summarize,
    table,
    use_threads,
)
from bench.peer_engines.folio import greedy, let_go
from bench.prefix import share, some_tokens, whole_pages
from checkpoint import Checkpoint, load
from engine import Engine, SamplingParams
from machine import pick_device, pick_dtype, read_bandwidth
from model import Transformer
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Technique:
    """How to switch it off: by options of the Engine, or by leaving `compile` out."""

    name: str
    off: dict[str, Any] = field(default_factory=dict)
    compile: bool = True
    gpu: bool = False  # it means something on a GPU only


ALL_ON = Technique("all on")
TECHNIQUES = (
    Technique("radix tree", {"radix": False}),
    Technique("overlap", {"overlap": False}),
    Technique("chunked prefill", {"chunked_prefill": False}),
    Technique("CUDA graphs", {"graphs": False}, gpu=True),
    Technique("jump-forward", {"jump_forward": False}),
    Technique("compile", compile=False),
)
FORM = {"kind": "order confirmation", "currency": "EUR", "lines": [], "note": "thank you for your order", "paid": True}
SCHEMA = {
    "type": "object",
    "properties": {name: {"const": value} for name, value in FORM.items()},
    "required": list(FORM),
    "additionalProperties": False,
}
METRICS = {
    "tokens_per_s": "tokens/s",
    "first_p50": "first token p50",
    "first_p99": "p99",
    "between_p50": "between p50",
    "between_p99": "p99",
}


@dataclass(frozen=True)
class Workload:
    """All in tokens, but for the numbers of users, of questions and of prefixes."""

    users: int = 8
    questions: int = 6  # of each user
    prefixes: int = 4  # there are as many different ones
    shared: int = 512
    own: tuple[int, int] = (32, 256)
    long: int = 1024  # every sixth question
    new: tuple[int, int] = (16, 64)
    chunk: int = 256

    @property
    def longest(self) -> int:
        return whole_pages(self.shared + max(self.long, self.own[1]) + max(self.new[1], len(json.dumps(FORM))))


SMALL = Workload(users=3, questions=3, prefixes=2, shared=64, own=(8, 32), long=128, new=(2, 8), chunk=32)


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    new: int
    form: bool = False


@dataclass
class Answer:
    asked: float  # seconds of time.perf_counter
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    text: str = ""
    form: bool = False


def make_questions(work: Workload, vocab: int, seed: int) -> list[list[Question]]:
    """For each user his questions, in their order."""
    rng = random.Random(seed)
    prefixes = [some_tokens(rng, work.shared, vocab) for _ in range(work.prefixes)]

    def question(number: int) -> Question:
        own = work.long if number % 6 == 5 else rng.randint(*work.own)
        return Question(rng.choice(prefixes) + some_tokens(rng, own, vocab), rng.randint(*work.new), number % 4 == 3)

    return [[question(user + i) for i in range(work.questions)] for user in range(work.users)]


# ---- one run


def build(model: Transformer, work: Workload, name: str, without: Technique) -> Engine:
    tokenizer = Tokenizer.from_pretrained(BUNDLED["folio-tiny"])  # spells the forms; larger ids it does not know
    engine = Engine(
        model,
        tokenizer,
        sorted(tokenizer.eos_token_ids),
        max_batch_size=work.users,
        max_model_len=work.longest,
        max_total_tokens=2 * work.users * work.longest,  # nobody waits for pages, and prefixes may stay
        chunk_size=work.chunk,
        **without.off,
    )
    for shape in engine.compile(greedy=True) if without.compile else engine.warm_up(greedy=True):
        progress(f"  {name}: compiling {shape}")
    return engine


def serve(engine: Engine, questions: list[list[Question]]) -> list[list[Answer]]:
    """Ask everything, from an empty cache. -> the answers, in the order of the questions."""
    engine.flush_cache()
    waiting = [list(reversed(of_user)) for of_user in questions]
    answers: list[list[Answer]] = [[] for _ in questions]
    asking: dict[str, int] = {}  # request id -> user

    def ask(user: int) -> None:
        if waiting[user]:
            question = waiting[user].pop()
            answers[user].append(Answer(time.perf_counter(), form=question.form))
            asking[engine.add(question.prompt, params(question))] = user

    for user in range(len(questions)):
        ask(user)
    while engine.has_work:
        deltas, now = engine.step(), time.perf_counter()
        for delta in deltas:
            answer = answers[asking[delta.request_id]][-1]
            answer.text += delta.text
            answer.tokens += delta.token_ids
            answer.times += [now] * len(delta.token_ids)
            if delta.finish_reason is not None:
                ask(asking[delta.request_id])
    engine.check()
    let_go(engine)
    return answers


def params(question: Question) -> SamplingParams:
    if question.form:
        return SamplingParams(temperature=0, json_schema=SCHEMA, disable_any_whitespace=True)
    return greedy(question.new)


def figures(answers: list[list[Answer]]) -> dict[str, float]:
    """Of one run: METRICS, times in ms."""
    each = [answer for of_user in answers for answer in of_user]
    first = [1e3 * (a.times[0] - a.asked) for a in each]
    between = [1e3 * (b - a) for answer in each for a, b in pairwise(sorted(set(answer.times)))]
    wall = max(a.times[-1] for a in each) - min(a.asked for a in each)
    return {
        "tokens_per_s": sum(form_tokens() if a.form else len(a.tokens) for a in each) / wall,
        "first_p50": share(first, 0.5),
        "first_p99": share(first, 0.99),
        "between_p50": share(between, 0.5),
        "between_p99": share(between, 0.99),
    }


@cache
def form_tokens() -> int:
    """Of a form, as the tokenizer writes it; a model that is not forced may take it in smaller pieces."""
    return len(Tokenizer.from_pretrained(BUNDLED["folio-tiny"]).encode(json.dumps(FORM)))


# ---- all of them


def variants(names: Iterable[str]) -> dict[str, Technique]:
    """ "all on", and "no ..." for each technique of these names."""
    return {ALL_ON.name: ALL_ON} | {f"no {t.name}": t for t in TECHNIQUES if t.name in names}


def measure(
    model: Transformer, work: Workload, which: dict[str, Technique], repeats: int, seed: int
) -> dict[str, dict[str, Any]]:
    """-> for each variant a Stat of each metric, and the share of tokens that are those of "all on"."""
    vocab = model.config.vocab_size
    questions = make_questions(work, vocab, seed)
    engines = {name: build(model, work, name, without) for name, without in which.items()}
    for name, engine in engines.items():
        progress(f"  warming up {name}")
        serve(engine, make_questions(work, vocab, seed + 1)[:1])
    progress("  timing")
    runs = alternate({name: partial(serve, engine, questions) for name, engine in engines.items()}, repeats)
    reference = said(runs[ALL_ON.name][0])
    results: dict[str, dict[str, Any]] = {}
    for name, several in runs.items():
        each = [figures(answers) for answers in several]
        results[name] = {metric: summarize(f[metric] for f in each) for metric in METRICS}
        results[name]["same"] = min(same_share(said(answers), reference) for answers in several)
    return results


def said(answers: list[list[Answer]]) -> list[Any]:
    """The tokens of each answer, and of a form its text: there is more than one way to spell that."""
    return [answer.text if answer.form else answer.tokens for of_user in answers for answer in of_user]


def same_share(ours: list[Any], theirs: list[Any]) -> float:
    """The share of answers that are equal."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(theirs)


def check_same(results: dict[str, dict[str, Any]]) -> None:
    """RuntimeError unless all variants gave the same answers."""
    wrong = {name: f"{r['same']:.1%}" for name, r in results.items() if r["same"] < 1}
    if wrong:
        raise RuntimeError(f"switching a technique off has changed what was answered; answers that are equal: {wrong}")


# ---- report


def ratio(results: dict[str, dict[str, Any]], name: str, metric: str) -> float:
    return results[name][metric].median / results[ALL_ON.name][metric].median


def show(results: dict[str, dict[str, Any]]) -> str:
    headers = ["ms but for tokens/s"]
    for label in METRICS.values():
        headers += [label, "ratio"]
    lines = []
    for name, result in results.items():
        line = [name]
        for metric in METRICS:
            value = result[metric]
            line += [value.show(1) if metric == "tokens_per_s" else f"{value.median:,.1f}"]
            line += [f"{ratio(results, name, metric):.2f}x"]
        lines.append([*line, f"{result['same']:.0%}"])
    return table([*headers, "same answers"], lines)


def as_json(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        name: {key: value.json() if isinstance(value, Stat) else value for key, value in result.items()}
        | {"ratio": {metric: significant(ratio(results, name, metric)) for metric in METRICS}}
        for name, result in results.items()
    }


def floor_line(model: Transformer, work: Workload, read: float) -> str:
    size = model.weight_bytes_per_token()
    return (
        f"reads {read / 1e9:,.1f} GB/s: a step takes at least {size / read * 1e3:.2f} ms for {size / 1e6:,.1f} MB of "
        f"weights, and {work.users} users get at most {work.users * read / size:,.0f} tokens/s"
    )


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print -> its part of the JSON line."""
    work = SMALL if args.shape == "tiny" else Workload()
    device, folder = pick_device(args.device), make_checkpoint(args.shape)
    checkpoint = Checkpoint.open(folder)
    model = load(checkpoint, pick_dtype(args.dtype, checkpoint.dtype, device), device, work.longest)
    name = cpu_model() if device.type == "cpu" else torch.cuda.get_device_name(device)
    read = read_bandwidth(device)
    print(f"{name} {floor_line(model, work, read)}\n", flush=True)
    without = args.without or [t.name for t in TECHNIQUES if device.type == "cuda" or not t.gpu]
    results = measure(model, work, variants(without), args.repeats, args.seed)
    print(show(results), flush=True)
    if args.dtype == "float32":  # in others a batch of another size may round to another token
        check_same(results)
    settings = {"shape": args.shape, "device": name, "dtype": args.dtype, "workload": asdict(work), "seed": args.seed}
    return settings | {"read_bandwidth": significant(read), "variants": as_json(results)}


def main(argv: list[str] | None = None) -> None:
    names = [technique.name for technique in TECHNIQUES]
    parser = argparse.ArgumentParser(description="What each technique is worth, switched off in turn.")
    parser.add_argument("--shape", choices=NAMES, default="smollm2-135m")
    parser.add_argument("--without", nargs="+", choices=names, help="switch off these (default: each)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: what torch takes by itself")
    parser.add_argument("--out", help="also write the JSON line to this file")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    use_threads(args.threads)
    record = bench(args)
    emit({"bench": "ablate", **machine_facts(), "repeats": args.repeats, **record}, args.out)


if __name__ == "__main__":
    main()
