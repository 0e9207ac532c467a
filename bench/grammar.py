"""What structured output costs: compiling a grammar, a mask, and the throughput of a batch that is constrained.

    python -m bench.grammar --tokenizer ../shared/data/tokenizers/qwen2.5 \\
        --schemas ../shared/data/jsonschema/maskbench_sample.jsonl        # a real vocabulary, real schemas, 135M shape
    python -m bench.grammar --shape folio-tiny                            # the bundled model and its vocabulary
    python -m bench.grammar --tiny                                        # does the benchmark itself work?

    compile       ms from a schema to a grammar, by each backend and by Folio's choice between them
    mask          us to fill one mask, at every token of the schemas' valid instances (without a file: of a few of our own)
    plain check   the same by asking of every token of the vocabulary whether it may come, as a plain automaton would
    throughput    new tokens a second, all rows constrained beside none of them, with the overlapped loop and without

The constrained rows have endless arrays of several kinds, so that all rows run to the end, and jump-forward is off, so that
both compute as many steps. A prediction: a fill of 10 to 100 us a row hides behind a forward of 20 ms and more. First the
tables, then one JSON line.
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.checkpoints import BUNDLED, NAMES, make_checkpoint
from bench.common import Stat, alternate, emit, machine_facts, progress, significant, summarize, table, use_threads
from bench.peer_engines.folio import let_go
from bench.prefix import share
from checkpoint import Checkpoint, load
from engine import Engine, SamplingParams
from errors import UserError
from grammar import limits, support
from grammar.llguidance_backend import LlguidanceBackend
from grammar.spec import Spec
from grammar.vocabulary import Vocabulary
from grammar.xgrammar_backend import XgrammarBackend
from tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "mail": {"type": "string", "format": "email"},
        "role": {"enum": ["admin", "editor", "guest"]},
    },
    "required": ["name", "age", "mail", "role"],
    "additionalProperties": False,
}
ANN = {"name": "Ann", "age": 41, "mail": "ann@example.org", "role": "editor"}
OWN = [
    (PERSON, [ANN]),
    ({"type": "array", "items": {"type": "number"}}, [[1, 2.5, -3e7, 0]]),
    ({"type": "object"}, [{"a": [1, {"b": None}], "c": "text with some words"}]),
]
ENDLESS = [PERSON, {"type": "integer"}, {"enum": ["north", "east", "south", "west"]}, {"type": "string"}]
CHECKED = 3  # masks that are made by the plain check


# ---- grammars alone


def read_schemas(path: str | None, limit: int) -> list[tuple[Any, list[Any]]]:
    """Schemas, each with valid instances."""
    if path is None:
        return OWN
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][:: max(1, len(lines) // limit)][:limit]
    return [(row["schema"], [test["data"] for test in row["tests"] if test["valid"]]) for row in rows]


def usable(schemas: list[tuple[Any, list[Any]]]) -> Iterator[tuple[Spec, str, list[Any]]]:
    """With Folio's choice of backend; what it refuses is left out."""
    for schema, instances in schemas:
        spec = Spec.json_schema(schema)
        try:
            limits.check(spec)
            yield spec, support.choose(spec, "auto"), instances
        except UserError:
            continue


def grammar_figures(vocabulary: Vocabulary, schemas: list[tuple[Any, list[Any]]]) -> dict[str, dict[str, Any]]:
    """For each backend, and for Folio's choice: Stats in seconds, and how many schemas failed or were too slow to wait for."""
    backends = {b.name: b for b in (XgrammarBackend(vocabulary), LlguidanceBackend(vocabulary))}
    specs = list(usable(schemas))
    measured = {
        name: [measure_grammar(backend, vocabulary, spec, instances) for spec, _, instances in progressing(name, specs)]
        for name, backend in backends.items()
    }
    names = list(measured)
    chosen = [measured[choice][i] for i, (_, choice, _) in enumerate(specs)]
    return {name: collect(each) for name, each in [*((n, measured[n]) for n in names), ("folio: auto", chosen)]}


def progressing(name: str, specs: list[Any]) -> Iterator[Any]:
    for i, spec in enumerate(specs):
        if i % 20 == 0:
            progress(f"  {name}: schema {i} of {len(specs)}")
        yield spec


def measure_grammar(
    backend: XgrammarBackend | LlguidanceBackend, vocabulary: Vocabulary, spec: Spec, instances: list[Any]
) -> tuple[float, list[float]] | None:
    """Seconds to compile, and for each mask along the instances; None if the backend refuses the schema."""
    start = time.perf_counter()
    try:
        grammar = backend.compile(spec)
    except RuntimeError:
        return None
    compiled, masks = time.perf_counter() - start, []
    bitmask = torch.zeros(1, -(-len(vocabulary) // 32), dtype=torch.int32)
    for instance in instances[:2]:
        matcher = grammar.matcher()
        for token in vocabulary.encode(json.dumps(instance, ensure_ascii=False)):
            start = time.perf_counter()
            matcher.fill(bitmask, 0)
            masks.append(time.perf_counter() - start)
            if not matcher.accept(token):
                break
    return compiled, masks


def collect(measured: list[tuple[float, list[float]] | None]) -> dict[str, Any]:
    done = [each for each in measured if each is not None]
    compiles, masks = [compiled for compiled, _ in done], [mask for _, each in done for mask in each]
    shares = {"p50": 0.5, "p99": 0.99}
    figures = {f"compile_{name}": share(compiles, at) for name, at in shares.items()}
    return (
        figures | {f"mask_{name}": share(masks, at) for name, at in shares.items()} | {"refused": measured.count(None)}
    )


def plain_check(vocabulary: Vocabulary) -> float:
    """Seconds for one mask, when each token of the vocabulary is tried by itself."""
    matcher = XgrammarBackend(vocabulary).compile(Spec.json_schema(PERSON)).matcher()
    for token in vocabulary.encode('{"name": "A'):
        matcher.accept(token)
    text = [i for i, token in enumerate(vocabulary.tokens) if token]
    start = time.perf_counter()
    for _ in range(CHECKED):
        for token in text:
            if matcher.accept(token):
                matcher.rollback(1)
    return (time.perf_counter() - start) / CHECKED


# ---- throughput


def open_engine(
    folder: Path, tokenizer: Tokenizer, stop_ids: list[int], rows: int, tokens: int, overlap: bool
) -> Engine:
    model = load(Checkpoint.open(folder), torch.float32, torch.device("cpu"), 1024)
    engine = Engine(
        model, tokenizer, stop_ids, max_batch_size=rows, max_model_len=tokens + 64, overlap=overlap, jump_forward=False,
        radix=False,
    )  # fmt: skip
    for shape in engine.compile(greedy=True):
        progress(f"  overlap {'on' if overlap else 'off'}: compiling {shape}")
    return engine


def throughput(engine: Engine, rows: int, new: int, constrained: bool) -> float:
    """New tokens a second."""
    prompts = [[7 + row] * 16 for row in range(rows)]
    schemas = [{"type": "array", "items": item, "minItems": 100_000} for item in ENDLESS]
    params = [
        SamplingParams(
            temperature=0,
            max_new_tokens=new,
            ignore_eos=True,
            json_schema=schemas[i % len(schemas)] if constrained else None,
        )
        for i in range(rows)
    ]
    start = time.perf_counter()
    outputs = engine.generate(prompts, params)
    seconds = time.perf_counter() - start
    let_go(engine)
    if wrong := [o.outputs[0] for o in outputs if len(o.outputs[0].token_ids) != new]:
        raise RuntimeError(f"{len(wrong)} of {rows} rows ended early: {wrong[0].finish_reason}, {wrong[0].stop_reason}")
    return rows * new / seconds


def throughputs(engines: dict[bool, Engine], batches: list[int], new: int, repeats: int) -> dict[str, dict[str, Stat]]:
    results: dict[str, dict[str, Stat]] = {}
    for rows in batches:
        measures = {
            f"{'overlap' if on else 'no overlap'}, {'constrained' if constrained else 'free'}": partial(
                throughput, engine, rows, new, constrained
            )
            for on, engine in engines.items()
            for constrained in (False, True)
        }
        for measure in measures.values():  # once untimed: grammars are compiled
            measure()
        progress(f"  {rows} rows: timing")
        samples = alternate(measures, repeats)
        results[f"{rows} rows"] = {name: summarize(values) for name, values in samples.items()}
        for loop in ("overlap", "no overlap"):
            pairs = zip(samples[f"{loop}, constrained"], samples[f"{loop}, free"], strict=True)
            results[f"{rows} rows"][f"{loop}, ratio"] = summarize(ours / free for ours, free in pairs)
    return results


# ---- report


def show_grammars(figures: dict[str, dict[str, Any]], plain: float) -> str:
    headers = ["", "compile ms p50", "p99", "mask us p50", "p99", "refused"]
    rows = [
        [name, *(f"{f[key] * scale:.1f}" for key, scale in
                 (("compile_p50", 1e3), ("compile_p99", 1e3), ("mask_p50", 1e6), ("mask_p99", 1e6))), str(f["refused"])]
        for name, f in figures.items()
    ]  # fmt: skip
    return table(headers, [*rows, ["plain check", "-", "-", f"{plain * 1e6:.0f}", "-", "-"]])


def show_throughput(results: dict[str, dict[str, Stat]]) -> str:
    names = list(next(iter(results.values())))
    cells = [
        [rows, *(stats[name].show(3 if name.endswith("ratio") else 1) for name in names)]
        for rows, stats in results.items()
    ]
    return table(["tokens/s", *names], cells)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What structured output costs.")
    parser.add_argument("--shape", choices=NAMES, default="smollm2-135m-152k", help="of the throughput's model")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="default: the bundled model's")
    parser.add_argument("--schemas", metavar="FILE", help="JSON lines with schema and tests; default: a few of our own")
    parser.add_argument("--limit", type=int, default=100, help="schemas of the file (default: 100)")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 64])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tiny", action="store_true", help="a small random model, few tokens, one repeat")
    parser.add_argument("--out", help="also write the JSON line to this file")
    args = parser.parse_args(argv)
    if args.tiny:
        args.shape, args.batches, args.new_tokens, args.repeats = "folio-tiny", [1, 3], 8, 1
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    use_threads(args.threads)
    folder = make_checkpoint(args.shape)
    tokenizer = Tokenizer.from_pretrained(args.tokenizer or BUNDLED["folio-tiny"])
    width = Checkpoint.open(folder).config.vocab_size
    stop_ids = sorted(tokenizer.eos_token_ids)
    vocabulary = Vocabulary.of(tokenizer, width, stop_ids)
    grammars = grammar_figures(vocabulary, read_schemas(args.schemas, args.limit))
    plain = plain_check(vocabulary)
    print(show_grammars(grammars, plain), flush=True)
    tokens = args.new_tokens + 16
    engines = {on: open_engine(folder, tokenizer, stop_ids, max(args.batches), tokens, on) for on in (True, False)}
    results = throughputs(engines, args.batches, args.new_tokens, args.repeats)
    print(show_throughput(results), flush=True)
    record = {
        "grammars": {n: {k: significant(v) for k, v in f.items()} for n, f in grammars.items()},
        "plain_check_s": significant(plain),
        "throughput": {rows: {name: stat.json() for name, stat in stats.items()} for rows, stats in results.items()},
    }
    settings = {key: getattr(args, key) for key in ("shape", "new_tokens", "repeats")}
    emit(
        {"bench": "grammar", "dtype": "float32", **machine_facts(), **settings, "vocabulary": width, **record}, args.out
    )


if __name__ == "__main__":
    main()
