"""Programs of the language (lang/): what sharing prefixes and running branches at once is worth, beside transformers.

    python -m bench.programs --out programs.json         # SmolLM2-135M's layers, float32, 2 threads
    python -m bench.programs --shape folio-tiny          # the bundled model
    python -m bench.programs --small                     # does the benchmark itself work? a minute

few_shot          64 questions behind the same examples of about 1,000 tokens, each with 8 new tokens
chat              16 chats of 4 turns, 24 new tokens each
tree_of_thought   4 thoughts of 16 tokens, each judged by `select`, 3 levels deep, from the best one on
self_consistency  a question of about 500 tokens, 8 seeded branches of 24 tokens, joined (transformers draws otherwise)
extraction        16 JSON objects, most of whose text the schema forces

Each program runs as it is on four backends: `folio`; `no radix`, the same engine without the radix tree; `one by one`, the engine
as in `folio`, but one call at a time; `transformers`, whose generate() computes each prompt from its beginning, one call at a
time, and keeps to a schema by the masks of llguidance, the engine of Guidance. They take turns, each from an empty cache; medians
of --repeats.

    computed     tokens that went through the model: of prompts, as far as they were not cached, and new ones
    hit rate     tokens of prompts that were found in the cache, and, as `optimum`, those that some call before had in its
                 prompt or its answer, were every token kept for ever

With random weights a text says nothing, and has the length that was asked for. First a table, then one JSON line.
"""

import argparse
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.checkpoints import BUNDLED, make_checkpoint
from bench.common import alternate, emit, machine_facts, progress, seconds, summarize, table, use_threads
from cache.radix import RadixTree, tree_key
from engine import Engine
from lang import EngineBackend, Program, assistant, function, gen, select, user
from lang.backend import Backend, Cancel, Piece, begin_of_choice
from lang.choices import Score
from lang.transcript import Messages, Transcript
from tokenizer import Tokenizer

EXAMPLE = "Text: The little {} went to the forest and met an old friend. They were happy all day.\nMood: happy\n\n"
HEROES = ("dog", "fox", "cat", "otter", "rabbit", "bear", "mouse", "owl")
NOTICE = "This record was written by a program and is to be read by another one. Nothing in it may be changed by hand."


@dataclass(frozen=True)
class Sizes:
    examples: int = 34
    questions: int = 64
    chats: int = 16
    turns: int = 4
    thoughts: int = 4
    depth: int = 3
    context: int = 17  # examples before the question of self_consistency
    branches: int = 8
    records: int = 16
    answer: int = 24


SMALL = Sizes(
    examples=4, questions=3, chats=2, turns=2, thoughts=2, depth=2, context=2, branches=2, records=2, answer=4
)


# ---- the programs


def examples(count: int) -> str:
    return "".join(EXAMPLE.format(HEROES[i % len(HEROES)] + "s" * (i // len(HEROES))) for i in range(count))


@function
def few_shot(s, sizes, number):
    s += examples(sizes.examples)
    s += f"Text: The {number}. drum fell down and broke.\nMood:" + gen("mood", max_tokens=8)


@function
def chat(s, sizes, number):
    for turn in range(sizes.turns):
        s += user(f"Chat {number}, question {turn}: what is {number} + {turn}, and why do you think so?")
        s += assistant(gen(f"answer_{turn}", max_tokens=sizes.answer))


@function
def tree_of_thought(s, sizes):
    s += examples(sizes.context) + "Let us think step by step.\n"
    for level in range(sizes.depth):
        thoughts = s.fork(sizes.thoughts)
        thoughts += lambda i, level=level: f"Step {level}, idea {i}:" + gen("idea", max_tokens=16)
        marks = []
        for thought in thoughts:
            with thought.copy() as judge:
                judge += "\nThis is" + select("verdict", [" good", " bad"])
            marks.append(thought)
        best = max(range(len(marks)), key=lambda i: marks[i].get_meta_info("verdict")[0]["scores"][0])
        s += f"Step {level}, idea {best}:" + thoughts[best]["idea"] + "\n"


@function
def self_consistency(s, sizes):
    s += examples(sizes.context) + "Question: how many of them were happy?\n"
    forks = s.fork(sizes.branches)
    forks += lambda i: gen("answer", max_tokens=sizes.answer, temperature=0.8, seed=i)
    forks.join("concate_and_append")


def record(number: int) -> dict[str, Any]:
    fixed = {"notice": {"const": NOTICE}, "source": {"const": f"https://example.com/records/{number}"}}
    free = {"mood": {"enum": ["happy", "sad", "unknown"]}, "checked": {"type": "boolean"}}
    properties = fixed | free | {"licence": {"const": "This text may be copied by anybody, in whole or in part."}}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


@function
def extraction(s, number):
    s += EXAMPLE.format(HEROES[number % len(HEROES)]) + "As JSON: "
    s += gen("record", max_tokens=200, json_schema=record(number), disable_any_whitespace=True)


def workloads(sizes: Sizes) -> dict[str, tuple[Program, list[dict[str, Any]]]]:
    """Each program, and the arguments of its runs."""

    def numbered(count: int) -> list[dict[str, Any]]:
        return [{"number": i} for i in range(count)]

    return {
        "few_shot": (few_shot.bind(sizes=sizes), numbered(sizes.questions)),
        "chat": (chat.bind(sizes=sizes), numbered(sizes.chats)),
        "tree_of_thought": (tree_of_thought.bind(sizes=sizes), [{}]),
        "self_consistency": (self_consistency.bind(sizes=sizes), [{}]),
        "extraction": (extraction, numbered(sizes.records)),
    }


# ---- the backends


@dataclass
class Ledger:
    """What was asked, in tokens."""

    calls: list[tuple[list[int], list[int]]] = field(default_factory=list)  # a prompt, and the prompt with its answer

    @property
    def prompts(self) -> int:
        return sum(len(prompt) for prompt, _ in self.calls)

    @property
    def new(self) -> int:
        return sum(len(whole) - len(prompt) for prompt, whole in self.calls)

    def optimum(self) -> int:
        """Tokens of prompts that a call before had, in order of their ends."""
        tree, hits = RadixTree(page_size=1), 0
        for prompt, whole in self.calls:
            hits += len(tree.match(tree_key(prompt)).pages)
            tree.insert(tree_key(whole), [1] * len(whole))
        return hits


class Recording(EngineBackend):
    """An engine, all at once or one call at a time."""

    def __init__(self, engine: Engine, one_by_one: bool = False):
        super().__init__(engine)
        self.ledger = Ledger()
        self._turn: AbstractContextManager = threading.Lock() if one_by_one else nullcontext()

    def begin(self) -> None:
        self.engine.flush_cache()
        self.ledger, self._before = Ledger(), self.engine.stats()

    def computed(self) -> tuple[int, int]:
        """-> prompt tokens since `begin`, and those of them that were cached."""
        now = self.engine.stats()
        return now.prompt_tokens - self._before.prompt_tokens, now.cached_tokens - self._before.cached_tokens

    def generate(self, prompt: Transcript, params: dict[str, Any], stream: bool, cancel: Cancel) -> Iterator[Piece]:
        ids = self._encode(prompt)
        with self._turn:
            pieces = list(super().generate(prompt, params, stream, cancel))
        self.ledger.calls.append((ids, ids + pieces[0].meta["output_ids"]))
        yield from pieces

    def score(self, prompt: Transcript, choices: Sequence[str], unconditional: bool) -> list[Score]:
        with self._turn:
            scores = super().score(prompt, choices, unconditional)
        for choice in choices:
            ids = self._encode(prompt, choice)
            self.ledger.calls.append((ids, ids))
        return scores

    def hold(self, prompt: Transcript) -> AbstractContextManager[int]:
        ids = self._encode(prompt)
        self.ledger.calls.append((ids, ids))
        return super().hold(prompt)


class Transformers(Backend):
    """generate(), one prompt at a time."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        from transformers import AutoModelForCausalLM

        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer, self._turn = tokenizer, threading.Lock()
        self.ledger = Ledger()

    def begin(self) -> None:
        self.ledger = Ledger()

    def computed(self) -> tuple[int, int]:
        return self.ledger.prompts, 0

    def render(self, messages: Messages, open_assistant: bool) -> str:
        return self.tokenizer.render_chat(messages, add_generation_prompt=open_assistant)

    def generate(self, prompt: Transcript, params: dict[str, Any], stream: bool, cancel: Cancel) -> Iterator[Piece]:
        ids = self._encode(prompt)
        sampled = params.get("temperature", 1.0) > 0
        how = dict(do_sample=True, temperature=params["temperature"], top_k=0) if sampled else dict(do_sample=False)
        if "json_schema" in params:
            how["logits_processor"] = [Masked(params["json_schema"], self.tokenizer, len(ids))]
        with self._turn, torch.inference_mode():
            torch.manual_seed(params.get("seed", 0))
            tokens = self.model.generate(
                torch.tensor([ids]),
                max_new_tokens=params["max_new_tokens"],
                eos_token_id=self.ends,
                pad_token_id=0,
                **how,
            )[0].tolist()
        self.ledger.calls.append((ids, tokens))
        yield Piece(self.tokenizer.decode(tokens[len(ids) :]), {})

    @property
    def ends(self) -> int:
        return next(iter(self.tokenizer.eos_token_ids))

    def score(self, prompt: Transcript, choices: Sequence[str], unconditional: bool) -> list[Score]:
        before, scores = self._encode(prompt), []
        for choice in choices:
            ids = self._encode(prompt, choice)
            at = begin_of_choice(before, ids)
            with self._turn, torch.inference_mode():
                rows = self.model(torch.tensor([ids]), logits_to_keep=len(ids) - at + 1).logits[0].log_softmax(-1)
            scores.append(Score([(float(row[id]), id, None) for row, id in zip(rows, ids[at:], strict=False)]))
            self.ledger.calls.append((ids, ids))
        return scores

    def _encode(self, prompt: Transcript, more: str = "") -> list[int]:
        return self.tokenizer.encode(prompt.text + more, add_special_tokens=not prompt.is_chat)


class Masked:
    """What llguidance allows, as a logits processor of transformers."""

    def __init__(self, schema: str, tokenizer: Tokenizer, prompt: int):
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, eos_token="<|im_end|>")
        layout = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as in lang's run
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(json.loads(schema) | {"x-guidance": layout}))
        self._matcher = LLMatcher(from_tokenizer(fast), grammar)
        self._seen = prompt

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        from llguidance import torch as masks

        for token in ids[0, self._seen :].tolist():
            self._matcher.consume_token(token)
        self._seen = ids.shape[1]
        mask = masks.allocate_token_bitmask(1, logits.shape[-1])
        masks.fill_next_token_bitmask(self._matcher, mask, 0)
        masks.apply_token_bitmask_inplace(logits, mask)
        return logits


# ---- all of it


def checkpoint_of(shape: str) -> Path:
    """Weights of a shape, with the bundled tokenizer beside them."""
    folder = make_checkpoint(shape)
    if shape not in BUNDLED:
        for file in BUNDLED["folio-tiny"].glob("tokenizer*.json"):
            shutil.copy(file, folder)
    return folder


def clock(backend: Recording | Transformers, program: Program, batch: list[dict[str, Any]]) -> dict[str, Any]:
    """One run, from an empty cache."""
    backend.begin()
    states: list[Any] = []
    took = seconds(lambda: states.extend(program.run_batch(batch, backend=backend, temperature=0, num_threads=64)))
    for state in states:
        if (error := state.error()) is not None:
            raise error
    prompts, cached = backend.computed()
    optimum = backend.ledger.optimum() / max(1, backend.ledger.prompts)
    computed = prompts - cached + backend.ledger.new
    texts = [state.text() for state in states]
    return dict(seconds=took, computed=computed, hit_rate=cached / max(1, prompts), optimum=optimum, texts=texts)


def measure(backends: dict[str, Any], program: Program, batch: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    runs = alternate({name: partial(clock, b, program, batch) for name, b in backends.items()}, repeats)
    reference = runs["folio"][0]["texts"]
    return {
        name: {
            "seconds": summarize(run["seconds"] for run in several).json(),
            "same": sum(a == b for a, b in zip(several[0]["texts"], reference, strict=True)) / len(reference),
            **{key: several[0][key] for key in ("computed", "hit_rate", "optimum")},
        }
        for name, several in runs.items()
    }


def bench(args: argparse.Namespace) -> dict[str, Any]:
    folder = checkpoint_of(args.shape)
    tokenizer = Tokenizer.from_pretrained(folder)
    options = dict(dtype="float32", max_batch_size=64, max_total_tokens=81920, max_model_len=2048)
    engine = Engine.from_pretrained(folder, **options)
    backends = {
        "folio": Recording(engine),
        "no radix": Recording(Engine.from_pretrained(folder, radix=False, **options)),
        "one by one": Recording(engine, one_by_one=True),
        "transformers": Transformers(folder, tokenizer),
    }
    results = {}
    for name, (program, batch) in workloads(SMALL if args.small else Sizes()).items():
        if name not in args.programs:
            continue
        progress(f"  {name}: warming up")
        for backend in backends.values():
            clock(backend, program, batch[:1])
        progress(f"  {name}: timing")
        results[name] = measure(backends, program, batch, args.repeats)
        print(show(name, results[name]), flush=True)
    return results


def show(name: str, result: dict[str, Any]) -> str:
    best = result["folio"]["seconds"]["median"]
    rows = [
        [
            backend,
            f"{r['seconds']['median']:.2f} ({r['seconds']['low']:.2f}..{r['seconds']['high']:.2f})",
            f"{r['seconds']['median'] / best:.2f}x",
            f"{r['computed']:,}",
            f"{r['hit_rate']:.1%}",
            f"{r['optimum']:.1%}",
            f"{r['same']:.0%}",
        ]
        for backend, r in result.items()
    ]
    return f"\n{table((name, 'seconds', 'to folio', 'computed', 'hit rate', 'optimum', 'same texts'), rows)}"


def main(argv: list[str] | None = None) -> None:
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description="Programs of generation: Folio, and the same calls elsewhere.")
    parser.add_argument("--shape", default="smollm2-135m-1k", choices=["smollm2-135m-1k", "tiny", *BUNDLED])
    parser.add_argument("--programs", nargs="+", default=list(workloads(SMALL)), choices=list(workloads(SMALL)))
    parser.add_argument("--small", action="store_true", help="a few short programs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="also write the JSON line to this file")
    args = parser.parse_args(argv)
    use_threads(args.threads)
    logging.disable_progress_bar()
    emit(
        {"bench": "programs", "shape": args.shape, **machine_facts(), "repeats": args.repeats, **bench(args)}, args.out
    )


if __name__ == "__main__":
    main()
