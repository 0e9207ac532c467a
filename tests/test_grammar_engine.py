"""Structured output through the engine: valid, the same on any road, and nobody else notices.

python -m pytest tests/test_grammar_engine.py
"""

import functools
import itertools
import json
import random
import re
from concurrent.futures import Future
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from pydantic import BaseModel, Field
from test_matrix import preempt_at_random

from bench.checkpoints import BUNDLED
from engine import Engine, SamplingParams
from errors import UserError
from grammar.compiler import Compiler
from grammar.constraint import GrammarConstraint, allow_only
from grammar.spec import Spec
from grammar.vocabulary import Vocabulary
from scheduler.request import State

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "favourite_colour": {"enum": ["red", "green", "deep blue"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "favourite_colour", "tags"],
    "additionalProperties": False,
}
TOOL = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<tool_call>",
        "content": {"type": "json_schema", "json_schema": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                    "required": ["city"], "additionalProperties": False}},
        "end": "</tool_call>",
    },
}  # fmt: skip
KINDS: list[dict[str, Any]] = [
    dict(json_schema=PERSON),
    dict(json_schema=PERSON, disable_any_whitespace=True),
    dict(regex="(ab|cd){2,12}!"),
    dict(choices=["one apple", "one pear", "two pears"]),
    dict(ebnf='root ::= item (", " item){2}\nitem ::= [a-z]+ "=" [0-9]'),
    dict(structural_tag=TOOL),
    {},
]
PROMPTS = ["Once upon a time", "Once upon a time there was a cat. " * 8, "The answer is", "Once upon a"]


def make(model: str = "folio-tiny", **options) -> Engine:
    defaults = dict(dtype="float32", max_batch_size=6, max_model_len=512, max_total_tokens=4096)
    return Engine.from_pretrained(BUNDLED[model], **defaults | options)


def asked(seed: int, temperature: float, **extra) -> tuple[list[str], list[SamplingParams]]:
    """Every kind with every prompt, in an order of its own."""
    each = [(prompt, kind) for prompt in PROMPTS for kind in KINDS]
    random.Random(seed).shuffle(each)
    common = dict(max_new_tokens=40, temperature=temperature, **extra)
    return [prompt for prompt, _ in each], [
        SamplingParams(seed=i, **common, **kind) for i, (_, kind) in enumerate(each)
    ]


def check_valid(text: str, params: SamplingParams) -> None:
    if params.json_schema is not None:
        jsonschema.validate(json.loads(text), PERSON)
    elif params.regex is not None:
        assert re.fullmatch(params.regex, text)
    elif params.choices is not None:
        assert text in params.choices
    elif params.ebnf is not None:
        assert re.fullmatch("[a-z]+=[0-9](, [a-z]+=[0-9]){2}", text)
    elif params.structural_tag is not None:
        assert json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))["city"] in ("Rome", "Oslo")


@functools.cache
def alone(model: str, temperature: float, jump: bool) -> list[list[int]]:
    engine = make(model, overlap=False, radix=False, jump_forward=jump, max_batch_size=1)
    return [engine.generate(p, s)[0].outputs[0].token_ids for p, s in zip(*asked(0, temperature), strict=True)]


# ---- the same tokens on any road


ROADS = list(itertools.product([True, False], [True, False], [16, 512], [1, 16], [True, False]))


@pytest.mark.parametrize("overlap, jump, chunk, page, preempt, temperature, model", [
    *((*road, temperature, "folio-tiny") for i, road in enumerate(ROADS) for temperature in ([0] if i % 3 else [0, 1.5])),
    *((*road, 0, "folio-tiny-mla") for road in ROADS[::11]),  # each switch is on in some, and off in others
])  # fmt: skip
def test_the_same_tokens_on_any_road(
    overlap: bool, jump: bool, chunk: int, page: int, preempt: bool, temperature: float, model: str
):
    engine = make(model, overlap=overlap, jump_forward=jump, chunk_size=chunk, page_size=page)
    if preempt:
        preempt_at_random(engine.scheduler, random.Random())
    prompts, params = asked(0, temperature)
    outputs = [out.outputs[0] for out in engine.generate(prompts, params)]
    assert [o.token_ids for o in outputs] == alone(model, temperature, jump)
    for output, p in zip(outputs, params, strict=True):
        assert output.finish_reason in ("stop", "length")
        if output.finish_reason == "stop":
            check_valid(output.text, p)
    engine.check()
    stats = engine.stats()
    assert (stats.forced_tokens > 20) == jump and (stats.preemptions > 0) == preempt and stats.cached_tokens > 50


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_where_there_is_one_way_only_jumping_changes_nothing(temperature: float):
    only = {"properties": {"a_rather_long_name": {"const": "straße"}, "b": {"const": [1, None]}},
            "type": "object", "required": ["a_rather_long_name", "b"], "additionalProperties": False}  # fmt: skip
    params = SamplingParams(json_schema=only, disable_any_whitespace=True, temperature=temperature, max_new_tokens=60)
    texts, steps = [], []
    for jump in (True, False):
        engine = make(jump_forward=jump)
        out = engine.generate("x", params)[0].outputs[0]
        assert out.finish_reason == "stop"
        texts.append(out.text)
        steps.append(engine.steps)
    assert texts[0] == texts[1] == '{"a_rather_long_name": "straße", "b": [1, null]}'
    assert steps[0] < steps[1] / 3


@pytest.mark.parametrize("overlap", [True, False])
def test_penalties_count_what_was_forced(overlap: bool):
    """With jump-forward off every token is sampled, and counted by the sampler; with it on the counts must be the same."""
    kind = dict(
        ebnf='root ::= "cats and dogs and " [a-z ]{12} "."',
        temperature=0,
        frequency_penalty=1.5,
        repetition_penalty=1.4,
    )
    engines = [make(overlap=overlap, jump_forward=jump) for jump in (True, False)]
    for prompt in PROMPTS:
        seen = []
        for engine in engines:
            engine.add(prompt, SamplingParams(max_new_tokens=64, **kind))
            row, request = 0, None
            while engine.has_work:
                engine.step()
                request = next(iter(engine._live), request)
                row = request.row or row if request else row
            ids = request.output_ids
            counted = engine.runner.state.seen[row] & (1 << 30) - 1
            seen.append((counted, torch.bincount(torch.tensor(ids), minlength=len(counted))))
        for counted, right in seen:
            assert (counted >= right).all() and (counted - right).sum() <= 1  # the surplus step of an overlapped loop


# ---- how it ends


class Person(BaseModel):
    name: str = Field(pattern="^[A-Z][a-z]{1,8}$")
    age: int = Field(ge=0, le=120)


def test_a_pydantic_model_gives_objects():
    out = make().generate(
        ["Hello", "Bye"], SamplingParams(json_schema=Person, max_new_tokens=100, seed=1, json_finish=True)
    )
    for each in out:
        assert each.outputs[0].finish_reason == "stop" and isinstance(each.outputs[0].parsed, Person)


def test_what_is_not_whole_is_reported_as_length():
    out = make().generate("Hello", SamplingParams(json_schema=PERSON, max_new_tokens=5))[0].outputs[0]
    assert out.finish_reason == "length" and len(out.token_ids) == 5 and out.parsed is None


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("backend", ["xgrammar", "llguidance"])
def test_json_finish_ends_validly(temperature: float, backend: str):
    engine = make(grammar_backend=backend)
    free = {"type": "array", "items": {"type": "object", "properties": {"k": {"type": "string"}}}, "minItems": 1}
    sizes = [16, 20, 30, 60]
    params = [
        SamplingParams(json_schema=free, json_finish=True, max_new_tokens=n, temperature=temperature, seed=n)
        for n in sizes
    ]
    for out, n in zip(engine.generate(["List:"] * len(sizes), params), sizes, strict=True):
        got = out.outputs[0]
        assert got.finish_reason == "stop" and len(got.token_ids) <= n, got
        jsonschema.validate(json.loads(got.text), free)


def test_no_token_is_wasted_on_an_end_that_is_certain():
    out = make().generate("x", SamplingParams(choices=["a"], ignore_eos=True, max_new_tokens=9))[0].outputs[0]
    assert (out.text, out.finish_reason, out.stop_reason, len(out.token_ids)) == ("a", "stop", None, 1)


def test_stop_strings_cut_a_grammar_short():
    params = SamplingParams(json_schema=PERSON, stop=['"age"'], disable_any_whitespace=True, max_new_tokens=60)
    out = make().generate("x", params)[0].outputs[0]
    assert out.finish_reason == "stop" and out.stop_reason == '"age"' and out.text.endswith(", ") and out.parsed is None


def test_samples_of_one_prompt_have_matchers_of_their_own():
    params = SamplingParams(json_schema=PERSON, n=5, seed=3, temperature=1.5, max_new_tokens=80, json_finish=True)
    texts = [out.text for out in make().generate("A person: ", params)[0].outputs]
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(texts)) > 1


# ---- nobody else notices


@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_an_abort_in_any_state_gives_all_pages_back(overlap: bool, jump: bool):
    """Before each step one request is taken, so that all states are met: grammar compiling, waiting, prefilling, running."""
    met = set()
    engine = make(overlap=overlap, jump_forward=jump, max_batch_size=2, chunk_size=16)
    for at in range(14):
        prompts, params = asked(at, 1.0)
        ids = [engine.add(prompt, p) for prompt, p in zip(prompts[:6], params[:6], strict=True)]
        for _ in range(at):
            engine.step()
        victim = ids[at % len(ids)]
        states = [r.state for r in engine._groups[victim].requests] if victim in engine._groups else []
        engine.abort(victim)
        for id in ids[1::2]:
            engine.abort(id)
        met.update(states)
        while engine.has_work:
            engine.step()
        engine.check()
        assert not engine._live and not engine._groups
    assert {State.WAITING, State.RUNNING} <= met


def test_a_grammar_that_cannot_be_compiled_ends_its_request_only(monkeypatch):
    engine = make()
    compile_one = type(engine.grammars).compile

    def broken(self, spec):
        future = compile_one(self, spec)
        if spec.kind == "regex":
            future = type(future)()
            future.set_exception(UserError("no such grammar"))
        return future

    monkeypatch.setattr(type(engine.grammars), "compile", broken)
    good, bad = engine.generate(["a", "b"], [SamplingParams(choices=["yes"]), SamplingParams(regex="a")])
    assert good.outputs[0].text == "yes" and bad.outputs[0].finish_reason == "error"
    assert bad.outputs[0].stop_reason == "no such grammar" and bad.outputs[0].token_ids == []
    engine.check()


FAULTS = {  # of a matcher's method, and what the request ends with
    "fill raises": ("fill", lambda self, *args: 1 / 0, "ZeroDivisionError"),
    "accept refuses": ("accept", lambda self, token: False, "which the grammar refuses"),
    "accept raises": ("accept", lambda self, token: 1 / 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_matcher_that_fails_ends_its_request_only(fault: str, overlap: bool, monkeypatch):
    engine = make(overlap=overlap, jump_forward=False, grammar_backend="xgrammar")
    prompts, params = asked(1, 0)
    right = [o.outputs[0].token_ids for o in engine.generate(prompts, params)]
    constrain, mine = engine.grammars.constrain, []
    target = engine.grammars.compile(Spec.regex("[a-z]{20}")).result()

    def broken(grammar, *args):
        constraint = constrain(grammar, *args)
        if grammar is target:
            mine.append(constraint)
        if grammar is target and len(mine) == 2:
            monkeypatch.setattr(constraint, "matcher", Faulty(constraint.matcher, fault, after=3))
        return constraint

    monkeypatch.setattr(engine.grammars, "constrain", broken)
    two = SamplingParams(regex="[a-z]{20}", n=2, temperature=0, max_new_tokens=30)
    outputs = engine.generate([*prompts, "x"], [*params, two])
    assert [o.outputs[0].token_ids for o in outputs[:-1]] == right
    fine, failed = outputs[-1].outputs
    assert fine.finish_reason == "stop" and failed.finish_reason == "error" and 0 < len(failed.token_ids) < 6
    assert FAULTS[fault][2] in failed.stop_reason
    engine.check()


class Faulty:
    """A matcher one of whose methods fails from some call on."""

    def __init__(self, matcher, fault: str, after: int):
        self.matcher, self.left = matcher, after
        self.method, self.fault, _ = FAULTS[fault]

    def __getattr__(self, name: str):
        if name == self.method:
            self.left -= 1
            if self.left < 0:
                return functools.partial(self.fault, self)
        return getattr(self.matcher, name)


def test_a_grammar_that_is_too_slow_is_given_up(monkeypatch):
    clock = itertools.count(0, 1.0)
    monkeypatch.setattr("grammar.constraint.time.thread_time", lambda: next(clock))
    out = make().generate("x", SamplingParams(regex="[a-z]{90}", max_new_tokens=100))[0].outputs[0]
    assert out.finish_reason == "error" and "too slow" in out.stop_reason and len(out.token_ids) == 20


def test_requests_without_a_grammar_do_not_wait_for_one_that_compiles():
    engine = make()
    compiled: list = []
    held = engine.grammars.compile(Spec.choices(["late"])).result()
    never: Future = Future()
    engine.grammars.compile = lambda spec: compiled.append(spec) or never
    engine.add("x", SamplingParams(choices=["late"]), request_id="late")
    engine.add("x", SamplingParams(max_new_tokens=3), request_id="free")
    seen = []
    while not any(d.finish_reason for d in seen):
        seen += engine.step()
    assert {d.request_id for d in seen} == {"free"} and compiled and engine.has_work
    never.set_result(held)
    while engine.has_work:
        seen += engine.step()
    assert "".join(d.text for d in seen if d.request_id == "late") == "late"


HOSTILE = [
    dict(json_schema=functools.reduce(lambda inner, _: {"type": "array", "items": inner}, range(900), {})),
    dict(json_schema={"properties": {f"p{i}": {"type": "string"} for i in range(3000)}}),
    dict(json_schema={"enum": [f"value {i}" for i in range(100_000)]}),
    dict(json_schema={"const": "x" * 1_000_000}),
    dict(json_schema={"type": "string", "pattern": "(" * 50_000 + ")" * 50_000}),
    dict(json_schema={"$ref": "#"}),
    dict(json_schema={"type": "string", "maxLength": 50}, temperature=1.5),
    dict(regex="((a+)+)+b"),
    dict(ebnf="root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(50_000))),
    dict(ebnf='root ::= root root | "a"'),
    dict(choices=["\0", "b"]),
]


@pytest.mark.parametrize("overlap", [True, False])
def test_grammars_that_are_made_to_harm_leave_the_others_alone(overlap: bool):
    """Each is refused or served; the tokens of all others are those that they have alone."""
    engine = make(overlap=overlap)
    prompts, params = asked(0, 0)
    ids = [engine.add(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    refused, deltas = 0, []
    for hostile in HOSTILE:
        try:
            engine.add("x", SamplingParams(max_new_tokens=20, **hostile))
        except UserError:
            refused += 1
        deltas += engine.step()
    while engine.has_work:
        deltas += engine.step()
    said = [[t for d in deltas if d.request_id == id for t in d.token_ids] for id in ids]
    assert said == alone("folio-tiny", 0, True) and refused >= 7
    ended = [d for d in deltas if d.finish_reason is not None]
    assert len(ended) == len(ids) + len(HOSTILE) - refused
    engine.check()


# ---- what is refused


@pytest.mark.parametrize(
    "params, message",
    [
        (dict(regex="a", choices=["b"]), "regex and choices are given"),
        (dict(json_object=True, allowed_tokens_fn=lambda ids: [1]), "json_object and allowed_tokens_fn are given"),
        (dict(json_finish=True), "json_finish is given, but nothing"),
        (dict(json_schema="{"), "json_schema is not valid JSON"),
        (dict(json_schema=int), "no pydantic model"),
        (dict(choices=[]), "choices is empty"),
        (dict(json_schema={"type": "strin"}), "strin"),
    ],
)
def test_bad_requests_are_refused_at_once(params: dict, message: str):
    engine = make()
    with pytest.raises(UserError, match=re.escape(message)):
        engine.generate("x", SamplingParams(**params))
    assert not engine.has_work
    engine.check()


def test_an_engine_without_a_tokenizer_says_so():
    engine = make()
    engine.intake.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer to spell it with"):
        engine.generate([5, 6], SamplingParams(regex="a"))


# ---- compiled and recorded


@pytest.mark.parametrize("graphs, model", [(True, "folio-tiny"), (False, "folio-tiny"), (True, "folio-tiny-mla")])
def test_padded_replays_give_the_same(graphs: bool, model: str):
    engine = make(model, graphs=graphs)
    for _ in engine.warm_up():
        pass
    before = engine.stats()
    prompts, params = asked(2, 0)
    outputs = [out.outputs[0].token_ids for out in engine.generate(prompts, params)]
    after = engine.stats()
    assert outputs == [make_one(model, prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    assert (after.steps_replayed > before.steps_replayed) == graphs and after.captured_graphs == before.captured_graphs


@functools.cache
def lone_engine(model: str) -> Engine:
    return make(model, max_batch_size=1, overlap=False, radix=False)


def make_one(model: str, prompt: str, params: SamplingParams) -> list[int]:
    return lone_engine(model).generate(prompt, params)[0].outputs[0].token_ids


def test_allow_only_sets_one_bit():
    words = np.full(8, -1, dtype=np.int32)
    for token in (0, 31, 32, 255):
        allow_only(words, token)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        assert bits.nonzero()[0].tolist() == [token]


@pytest.mark.parametrize("backend", ["xgrammar", "llguidance"])
def test_a_constraint_says_when_nothing_may_follow(backend: str):
    whole = make().grammars.compiler.vocabulary
    vocabulary = Vocabulary(whole.tokens[:1001], whole.stop_ids, whole.encode)  # and bits of nobody behind them
    with Compiler(vocabulary, backend) as compiler:
        grammar = compiler.compile(Spec.regex("ab?")).result()
    constraint = GrammarConstraint(grammar.matcher(), vocabulary, jump=False, finisher=None)
    a, b = (vocabulary.encode(text)[0] for text in "ab")
    words = np.zeros(-(-len(vocabulary) // 32), dtype=np.int32)
    assert constraint.next([], 9, words) == [] and not constraint.whole and constraint.accept(a)
    assert constraint.next([a], 8, words) == [] and not constraint.whole and constraint.accept(b)
    assert constraint.whole and constraint.next([a, b], 7, words) is None
