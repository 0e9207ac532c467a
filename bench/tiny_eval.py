"""What a bundled model can do, measured through Folio itself: greedy, unconstrained, on facts it never saw.

    python -m bench.tiny_eval                                  # assets/folio-tiny, 500 items a task
    python -m bench.tiny_eval --model assets/folio-tiny-mla    # the other one
    python -m bench.tiny_eval --model out/folio-tiny/model --n 50

The items come from `examples.tiny_corpus.eval_items`: the generator that made the training data, asked for the facts
that training was denied. Each task has one strict score. A JSON answer counts only if the whole answer parses and every
key and value is right; nothing is cut out of the text to help it.

    extraction  name, age and city of a sentence, as JSON, in a chat
    tool        the right tool and the right arguments, out of two to six on offer
    addition    the sum of two numbers below 100
    few_shot    extraction in completion form, after 24 or more examples: a prompt of more than 900 tokens
    story       ends by itself, names its hero in both of its paragraphs, and nobody else but one friend
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from typing import Any

from examples.tiny_corpus import Chat, Item, eval_items
from examples.tiny_stories import BOYS, GIRLS, PET_NAMES

# How many tokens an answer may take; an answer that runs into the limit is wrong or, for a story, has no end.
BUDGET = {"extraction": 64, "tool": 80, "addition": 8, "few_shot": 64, "story": 400}
Generate = Callable[[list[list[int]], int], list[tuple[str, str]]]  # prompts, budget -> (text, finish reason) of each


def parsed(text: str) -> Any:
    """The JSON value of the whole text, or None."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def score_json(item: Item, text: str, reason: str) -> bool:
    return parsed(text) == item.expect


def score_tool(item: Item, text: str, reason: str) -> bool:
    call = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", text.strip(), flags=re.DOTALL)
    return bool(call) and parsed(call[1]) == item.expect


def score_addition(item: Item, text: str, reason: str) -> bool:
    return text.strip() == str(item.expect)


def score_few_shot(item: Item, text: str, reason: str) -> bool:
    """Completion form has no end of turn: the answer is the first line; the model may go on with another example."""
    return parsed(text.strip().split("\n")[0]) == item.expect


def score_story(item: Item, text: str, reason: str) -> bool:
    """Ends by itself; the hero is named in both paragraphs; of the names that we know, at most one other occurs."""
    hero, paragraphs = item.expect.name, text.split("\n\n")
    others = set(re.findall(r"\w+", text)) & {*GIRLS, *BOYS, *PET_NAMES} - {hero}
    return reason == "stop" and len(paragraphs) == 2 and all(hero in part for part in paragraphs) and len(others) <= 1


SCORES = {
    "extraction": score_json,
    "tool": score_tool,
    "addition": score_addition,
    "few_shot": score_few_shot,
    "story": score_story,
}


def encode(tokenizer: Any, item: Item) -> list[int]:
    if isinstance(item.prompt, Chat):
        return tokenizer.apply_chat_template(item.prompt.messages, tools=item.prompt.tools, add_generation_prompt=True)
    return tokenizer.encode(item.prompt)


def evaluate(generate: Generate, tokenizer: Any, task: str, n: int) -> dict[str, Any]:
    """Run one task and return its score in [0, 1], the prompt lengths, the seconds and the first wrong answers."""
    items = eval_items(task, n)
    prompts = [encode(tokenizer, item) for item in items]
    started = time.perf_counter()
    answers = generate(prompts, BUDGET[task])
    seconds = time.perf_counter() - started
    right = [SCORES[task](item, *answer) for item, answer in zip(items, answers, strict=True)]
    wrong = [(item.expect, answer[0]) for item, answer, ok in zip(items, answers, right, strict=True) if not ok]
    lengths = [len(prompt) for prompt in prompts]
    return {
        "score": sum(right) / n,
        "n": n,
        "prompt_tokens": (min(lengths), max(lengths)),
        "seconds": seconds,
        "wrong": wrong,
    }


def folio_generate(engine: Any) -> Generate:
    from scheduler.request import SamplingParams

    def generate(prompts: list[list[int]], budget: int) -> list[tuple[str, str]]:
        outputs = engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=budget))
        return [(out.outputs[0].text, out.outputs[0].finish_reason) for out in outputs]

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a bundled model on held-out items.")
    parser.add_argument("--model", default="assets/folio-tiny")
    parser.add_argument("--n", type=int, default=500, help="items a task; long tasks (few_shot, story) take a tenth")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tasks", nargs="+", choices=SCORES, default=list(SCORES))
    parser.add_argument("--show", type=int, default=3, help="wrong answers to print for each task")
    args = parser.parse_args()

    from engine import Engine

    engine = Engine.from_pretrained(args.model, dtype=args.dtype, max_batch_size=16)
    generate = folio_generate(engine)
    scores = {}
    print(f"{'task':<12}{'items':>6}{'prompt tokens':>16}{'score':>9}{'seconds':>9}")
    for task in args.tasks:
        n = max(1, args.n // 10) if task in ("few_shot", "story") else args.n
        result = evaluate(generate, engine.tokenizer, task, n)
        low, high = result["prompt_tokens"]
        print(f"{task:<12}{n:>6}{f'{low} - {high}':>16}{result['score']:>9.1%}{result['seconds']:>9.1f}")
        for expect, text in result["wrong"][: args.show]:
            print(f"    wanted {expect!r}\n    got    {text!r}")
        scores[task] = {"score": round(result["score"], 4), "n": n}
    print(json.dumps({"bench": "tiny_eval", "model": args.model, "dtype": args.dtype, "scores": scores}))


if __name__ == "__main__":
    main()
