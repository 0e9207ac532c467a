"""Folio beside transformers on the same weights, prompts and threads: decode at batch 1 and 16, prefill of 512 tokens.

    python -m bench.decode                                          # both shapes, all rows: half an hour or so
    python -m bench.decode --shape smollm2-135m --rows b1 --repeats 5
    python -m bench.decode --shape tiny --new-tokens 16             # does the benchmark itself work? a minute

The weights are random, in the shapes of two known models; speed does not depend on what they say. A checkpoint is made
once, under the system's temporary folder, and every engine loads it, in float32:

    folio             the plain step
    folio-compiled    Engine.compile(greedy=True)
    hf                transformers, generate() with its dynamic cache
    hf-compiled       generate() with a static cache and its own torch.compile of the decode step, which on a CPU one has
                      to ask for; the cache is exactly as long as the row needs, each batch size has its own static graph
    hf-frozen         the same with Inductor's freezing: weights become constants that it may pack

A row "b16" decodes 16 prompts at once: tokens/s = 16 N / (t(N + 1 new tokens) - t(1 new token)), measured from outside,
the same way for every engine. "prefill512" is t(1 new token) of one prompt of 512 tokens. Everything is compiled and
warmed up, and its greedy tokens compared, before the clock starts; then the engines take turns.

MBU is bytes of weights / time of a step, as a share of the read bandwidth measured in the same run; MFU is the operations
of the linear layers / time, as a share of the matmul rate. First the ceilings, then a table, then one JSON line.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import ceilings
from bench.checkpoints import SHAPES, make_checkpoint
from bench.common import alternate, emit, machine_facts, progress, seconds, significant, summarize, table, use_threads
from bench.peer_engines import Generator, Row, Tokens
from bench.peer_engines.folio import Folio
from bench.peer_engines.hf import Generate, load_peer
from checkpoint import Checkpoint, load
from model import Transformer
from runner import compiled_graphs

ENGINES = ("folio", "folio-compiled", "hf", "hf-compiled", "hf-frozen")
COMPARE = 32  # greedy tokens of each prompt that are compared before timing


# ---- set up


def load_model(folder: Path, rows: list[Row]) -> Transformer:
    return load(Checkpoint.open(folder), torch.float32, torch.device("cpu"), max(row.longest for row in rows))


def build(folder: Path, names: list[str], rows: list[Row]) -> dict[str, Generator]:
    """The engines asked for. Those of one side share their weights, but for the frozen one."""
    engines: dict[str, Generator] = {}
    shared = load_peer(folder) if {"hf", "hf-compiled"} & set(names) else None
    for name in names:
        if name.startswith("folio"):
            # A model of its own: compiling may lay its weights out anew.
            engines[name] = Folio(load_model(folder, rows), rows, compiled=name == "folio-compiled")
        else:
            model = load_peer(folder) if name == "hf-frozen" else shared
            engines[name] = Generate(model, static=name != "hf", frozen=name == "hf-frozen")
    return engines


def make_prompts(row: Row, vocab: int) -> Tokens:
    generator = torch.Generator().manual_seed(row.batch * 10_000 + row.prompt)
    return torch.randint(0, vocab, (row.batch, row.prompt), generator=generator).tolist()


def parse_row(name: str, prompt: int, new: int) -> Row:
    """ "b16" or "prefill512" -> Row; ValueError otherwise."""
    match = re.fullmatch(r"(b|prefill)([1-9]\d*)", name)
    if match is None:
        raise ValueError(f"row {name!r} is unknown; write b1, b16, prefill512 or the like")
    number = int(match[2])
    return Row(name, number, prompt, new) if match[1] == "b" else Row(name, 1, number, 0)


# ---- measure


def warm_up(engines: dict[str, Generator], row: Row, prompts: Tokens) -> dict[str, str]:
    """Run each engine through the row's shapes. -> how many greedy tokens equal the reference's, e.g. "30/32".

    The reference is eager transformers, or the first engine there is.
    """
    compare = min(COMPARE, row.new + 1)
    tokens = {}
    for name, engine in engines.items():
        progress(f"  {row.name}: warming up {name}")
        graphs = compiled_graphs()
        first = engine.generate(prompts, 1, row)
        tokens[name], again = (engine.generate(prompts, compare, row) for _ in range(2))
        if [len(t) for t in again] != [compare] * row.batch:
            raise RuntimeError(f"{name} does not give the {compare} tokens that it was asked for")
        if again != tokens[name] or [t[:1] for t in again] != first:
            raise RuntimeError(f"{name} does not give the same tokens twice")
        if compiled_graphs() > graphs:
            progress(f"  {row.name}: {name} compiled {compiled_graphs() - graphs} graphs")
    reference = tokens["hf"] if "hf" in tokens else next(iter(tokens.values()))
    flat = [token for sequence in reference for token in sequence]
    progress(f"  {row.name}: {len(set(flat))} different tokens among {len(flat)}")
    return {name: f"{agreeing(t, reference)}/{len(flat)}" for name, t in tokens.items()}


def agreeing(tokens: Tokens, reference: Tokens) -> int:
    """Tokens before the first difference, over all prompts: after it, two texts have nothing to do with each other."""
    total = 0
    for ours, theirs in zip(tokens, reference, strict=True):
        same = [a == b for a, b in zip(ours, theirs, strict=True)]
        total += same.index(False) if False in same else len(same)
    return total


def clock(engine: Generator, row: Row, prompts: Tokens) -> Callable[[], tuple[float, float]]:
    """-> a measure: (seconds to the first token, seconds of the `row.new` steps after it)."""

    def measure() -> tuple[float, float]:
        for _ in range(5):
            first = seconds(lambda: engine.generate(prompts, 1, row))
            if not row.new:
                return first, 0.0
            decode = seconds(lambda: engine.generate(prompts, row.new + 1, row)) - first
            if decode > 0:
                return first, decode
            progress(f"  {row.name}: {row.new + 1} tokens took less time than 1; once more")
        raise RuntimeError("this machine is too busy to measure anything")

    return measure


def measure_row(engines: dict[str, Generator], row: Row, vocab: int, repeats: int) -> dict[str, dict[str, Any]]:
    """-> for each engine: tokens/s, seconds to the first token, agreement."""
    prompts = make_prompts(row, vocab)
    agreement = warm_up(engines, row, prompts)
    graphs = compiled_graphs()
    progress(f"  {row.name}: timing")
    samples = alternate({name: clock(engine, row, prompts) for name, engine in engines.items()}, repeats)
    if compiled_graphs() != graphs:
        progress(f"  {row.name}: WARNING: {compiled_graphs() - graphs} graphs were compiled while the clock ran")
    results = {}
    for name, times in samples.items():
        count = row.batch * (row.new or row.prompt)
        rate = summarize(count / (decode if row.new else first) for first, decode in times)
        results[name] = {"rate": rate, "first": summarize(first for first, _ in times), "agree": agreement[name]}
    return results


# ---- report


def share_of_ceiling(row: Row, model: Transformer, rate: float, read: float, flops: float) -> float:
    """MBU of a decode row, MFU of a prefill row, given tokens/s and the machine's bytes/s and operations/s."""
    if row.new:
        return rate / row.batch * model.weight_bytes_per_token() / read
    head = model.config.vocab_size * model.config.hidden_size  # computed for the last token only
    body = model.weight_bytes_per_token() // model.dtype.itemsize - head
    return 2 * (body + head / row.prompt) * rate / flops


def floor_lines(shape: str, model: Transformer, rows: list[Row], read: float) -> Iterator[str]:
    size = model.weight_bytes_per_token()
    yield f"{shape}: {size / 1e6:,.1f} MB of weights a step; at {read / 1e9:.1f} GB/s a step takes {size / read * 1e3:.2f} ms"
    for row in rows:
        if row.new:
            yield f"  {row.name}: at most {read / size * row.batch:,.1f} tokens/s (attention's keys and values not counted)"


def report(
    row: Row, results: dict[str, dict[str, Any]], share: Callable[[float], float]
) -> tuple[list[list[str]], dict[str, Any]]:
    """A row's results as lines of the table and as JSON."""
    peers = [r["rate"].median for name, r in results.items() if name.startswith("hf")]
    lines, record = [], {}
    for name, result in results.items():
        rate, first = result["rate"], result["first"]
        ratio = rate.median / max(peers) if peers else None
        step = 1e3 * row.batch / rate.median if row.new else None
        lines.append(
            [
                row.name,
                name,
                rate.show(1),
                f"{step:.2f}" if step else "-",
                first.show(1, 1e3),
                f"{share(rate.median):.1%}",
                f"{ratio:.2f}x" if ratio else "-",
                result["agree"],
            ]
        )
        record[name] = {
            "tokens_per_s": rate.json(),
            "first_token_s": first.json(),
            "mbu" if row.new else "mfu": significant(share(rate.median), 4),
            "to_best_hf": ratio and significant(ratio, 4),
            "agree": result["agree"],
        }
    return lines, record


HEADERS = ["row", "engine", "tokens/s", "ms/step", "first token ms", "MBU / MFU", "to best hf", "same tokens"]


def bench_shape(shape: str, args: argparse.Namespace, read: float, flops: float) -> dict[str, Any]:
    """Measure and print one shape -> its part of the JSON line. The models go when it returns."""
    rows = [parse_row(name, args.prompt_tokens, args.new_tokens) for name in args.rows]
    folder = make_checkpoint(shape)
    progress(f"{shape}: loading")
    folio_model = load_model(folder, rows)  # of which only the sizes are asked
    engines = build(folder, args.engines, rows)
    lines, record = [], {}
    for row in rows:
        results = measure_row(engines, row, folio_model.config.vocab_size, args.repeats)
        more, record[row.name] = report(
            row, results, lambda rate, row=row: share_of_ceiling(row, folio_model, rate, read, flops)
        )
        lines += more
    print("\n" + "\n".join(floor_lines(shape, folio_model, rows, read)) + "\n")
    print(table(HEADERS, lines), flush=True)
    return {"weight_bytes_per_step": folio_model.weight_bytes_per_token(), "rows": record}


def parse_args() -> argparse.Namespace:
    def listed(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    parser = argparse.ArgumentParser(description="Compare Folio with transformers: decode and prefill on this CPU.")
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all", help="all: the two real ones")
    parser.add_argument("--rows", type=listed, default=["b1", "b16", "prefill512"], help="e.g. b1,b16,prefill512")
    parser.add_argument("--engines", type=listed, default=list(ENGINES), help=f"of {','.join(ENGINES)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each prompt of a decode row")
    parser.add_argument("--new-tokens", type=int, default=128, help="decoded after the first one")
    parser.add_argument("--threads", type=int, help="default: what torch takes by itself")
    parser.add_argument("--out", help="also write the JSON line to this file")
    args = parser.parse_args()
    unknown = set(args.engines) - set(ENGINES)
    if unknown or not args.engines:
        parser.error(f"--engines: choose of {','.join(ENGINES)}, not {','.join(sorted(unknown)) or 'nothing'}")
    for option in ("repeats", "prompt_tokens", "new_tokens"):
        if getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1")
    try:
        for name in args.rows:
            parse_row(name, args.prompt_tokens, args.new_tokens)
    except ValueError as error:
        parser.error(f"--rows: {error}")
    return args


def main() -> None:
    from transformers.utils import logging

    args = parse_args()
    use_threads(args.threads)
    logging.disable_progress_bar()
    measured = ceilings.measure()
    print(ceilings.show(measured), flush=True)
    read, flops = ceilings.ceiling(measured, "read"), ceilings.ceiling(measured, "float32")
    shapes = ["smollm2-135m", "qwen2.5-0.5b"] if args.shape == "all" else [args.shape]
    results = {shape: bench_shape(shape, args, read, flops) for shape in shapes}
    settings = {key: getattr(args, key) for key in ("repeats", "prompt_tokens", "new_tokens")}
    record = {"bench": "decode", "dtype": "float32", **machine_facts(), **settings}
    emit(record | {"ceilings": ceilings.as_json(measured), "shapes": results}, args.out)


if __name__ == "__main__":
    main()
