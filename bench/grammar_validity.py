"""Is structured output valid, always, and does it help? The bundled model on real schemas, and on facts it never saw.

    python -m bench.grammar_validity --schemas ../shared/data/jsonschema/maskbench_sample.jsonl
    python -m bench.grammar_validity --n 500                      # only the extraction, against none

    schemas       each asked for greedily and at temperature 1.5, `json_finish` on. Who finished: does the text parse, and does
                  `jsonschema` (formats included) find it valid? Who is cut off for want of tokens is counted apart, and so
                  is what Folio refuses, by the reason; an error of any other kind ends the benchmark.
    extraction    name, age and city of a sentence as JSON (bench.tiny_eval), with the schema of the answer and without;
                  greedily, and at temperature 1, where a free answer strays

Tables, then one JSON line.
"""

import argparse
import json
from collections import Counter
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for

from bench.checkpoints import BUNDLED
from bench.common import emit, machine_facts, progress, table, use_threads
from bench.tiny_eval import Generate, evaluate
from engine import Engine, SamplingParams
from errors import UserError
from examples.tiny_corpus import eval_items

EXTRACTION = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
PROMPT = "An example, as JSON: "
AT_ONCE = 64  # schemas
REFUSALS = ("cannot be compiled", "compiling the grammar")  # by a backend, or for its time or memory


def outcome(schema: Any, text: str, reason: str, detail: Any) -> str:
    """One word for what became of a request. RuntimeError for an error that is nobody's mistake."""
    if reason == "error":
        raise RuntimeError(f"{detail}, for {json.dumps(schema)[:500]}")
    if reason == "length":
        return "cut off"
    try:
        value = exact(text)
    except ValueError:
        return "does not parse"
    return "valid" if judge(schema).is_valid(value) else "invalid"


def exact(text: str) -> Any:
    """JSON with its fractions as they are written: 39.91 as a float is no multiple of 0.01."""
    return json.loads(text, parse_float=Decimal)


def judge(schema: Any) -> Validator:
    """Of the draft that a schema names, else of the newest one that it is a schema of."""
    drafts = [jsonschema.Draft202012Validator, jsonschema.Draft7Validator, jsonschema.Draft4Validator]
    fits = [draft for draft in drafts if draft(draft.META_SCHEMA).is_valid(schema)]
    kind = validator_for(schema, default=[*fits, *drafts][0])
    return kind(exact(json.dumps(schema)), format_checker=kind.FORMAT_CHECKER)


def ask(engine: Engine, schemas: list[Any], temperature: float, tokens: int, seed: int) -> tuple[Counter, Counter]:
    """-> how many schemas had which outcome, and the reasons for those that were refused."""
    outcomes, reasons, taken = Counter(), Counter(), []
    for schema in schemas:
        params = SamplingParams(
            json_schema=schema, json_finish=True, temperature=temperature, max_new_tokens=tokens, seed=seed
        )
        try:
            taken.append((schema, engine.stream(PROMPT, params)))
        except UserError as error:
            outcomes["refused"] += 1
            reasons[str(error)] += 1
    for schema, stream in taken:
        deltas = list(stream)
        last = deltas[-1]
        if last.finish_reason == "error" and any(text in str(last.stop_reason) for text in REFUSALS):
            outcomes["refused"] += 1
            reasons[str(last.stop_reason)] += 1
        else:
            text = "".join(delta.text for delta in deltas)
            outcomes[outcome(schema, text, last.finish_reason, last.stop_reason)] += 1
    engine.check()
    return outcomes, reasons


def generator(engine: Engine, schema: Any, temperature: float) -> Generate:
    """For `evaluate`; no schema: as the model likes."""

    def generate(prompts: list[list[int]], budget: int) -> list[tuple[str, str]]:
        common = dict(temperature=temperature, seed=0, max_new_tokens=budget)
        params = SamplingParams(json_schema=schema, json_finish=schema is not None, **common)
        outputs = [out.outputs[0] for out in engine.generate(prompts, params)]
        return [(out.text, out.finish_reason) for out in outputs]

    return generate


def extraction(engine: Engine, n: int) -> dict[str, dict[str, float]]:
    """With the schema and without: the share of answers that are valid, and of those that are exact."""
    results, validator = {}, jsonschema.Draft202012Validator(EXTRACTION)
    for (name, schema), temperature in product((("free", None), ("with its schema", EXTRACTION)), (0.0, 1.0)):
        texts: list[str] = []
        name, generate = f"{name}, temperature {temperature:g}", generator(engine, schema, temperature)
        scored = evaluate(remembering(generate, texts), engine.tokenizer, "extraction", n)
        valid = sum(validator.is_valid(value) for value in map(parsed, texts))
        results[name] = {"valid": valid / n, "exact": scored["score"]}
    return results


def remembering(generate: Generate, texts: list[str]) -> Generate:
    def also(prompts: list[list[int]], budget: int) -> list[tuple[str, str]]:
        answers = generate(prompts, budget)
        texts.extend(text for text, _ in answers)
        return answers

    return also


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def read(path: str | None, limit: int | None) -> list[Any]:
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
    return [json.loads(line)["schema"] for line in lines][:limit]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Is structured output valid, and does it help?")
    parser.add_argument("--schemas", metavar="FILE", help="JSON lines with a schema each")
    parser.add_argument("--limit", type=int, help="of the schemas, the first so many")
    parser.add_argument("--tokens", type=int, default=512, help="of an answer (default: 512)")
    parser.add_argument("--n", type=int, default=500, help="sentences (default: 500)")
    parser.add_argument("--grammar-backend", default="auto", choices=["auto", "xgrammar", "llguidance"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", help="also write the JSON line to this file")
    args = parser.parse_args(argv)
    use_threads(args.threads)
    engine = Engine.from_pretrained(BUNDLED["folio-tiny"], dtype="float32", grammar_backend=args.grammar_backend)
    schemas, record = read(args.schemas, args.limit), {}
    for name, temperature in (("greedy", 0.0), ("temperature 1.5", 1.5)) if schemas else ():
        outcomes, reasons = Counter(), Counter()
        for i in range(0, len(schemas), AT_ONCE):
            some = ask(engine, schemas[i : i + AT_ONCE], temperature, args.tokens, args.seed)
            outcomes, reasons = outcomes + some[0], reasons + some[1]
            progress(f"  {name}: {min(i + AT_ONCE, len(schemas))} of {len(schemas)} schemas")
        record[name] = dict(outcomes)
        print(table([name, "schemas"], [[kind, str(count)] for kind, count in outcomes.most_common()]), flush=True)
        print("\n".join(f"  {count} x {reason[:160]}" for reason, count in reasons.most_common()), flush=True)
    results = extraction(engine, min(args.n, len(eval_items("extraction", args.n))))
    rows = [[name, f"{r['valid']:.1%}", f"{r['exact']:.1%}"] for name, r in results.items()]
    print(table(["extraction", "valid", "exact"], rows), flush=True)
    facts = {"bench": "grammar_validity", **machine_facts(), "backend": args.grammar_backend, "seed": args.seed}
    emit(facts | {"schemas": record, "extraction": results, "n": args.n}, args.out)


if __name__ == "__main__":
    main()
