"""Both backends against the interface of grammar/matcher.py, on the same schemas, with every token of the bundled vocabulary.

pytest tests/test_grammar_backends.py
"""

import json
import random
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from grammar_schemas import EXAMPLES, TREE, Example
from hypothesis import given, settings
from hypothesis import strategies as st

from grammar import support
from grammar.llguidance_backend import LlguidanceBackend
from grammar.matcher import Grammar, Matcher, check_matches, one_line, whole_characters
from grammar.spec import Spec
from grammar.vocabulary import Vocabulary
from grammar.xgrammar_backend import XgrammarBackend, below_a_root
from tokenizer import Tokenizer

TINY = Path(__file__).parent.parent / "assets" / "folio-tiny"
VOCAB_SIZE, STOP_IDS = 1024 + 9, [2, 0]  # nine ids more than the tokenizer has
VOCABULARY = Vocabulary.of(Tokenizer.from_pretrained(TINY), VOCAB_SIZE, STOP_IDS)
NAMES = ["xgrammar", "llguidance"]
BACKENDS = {"xgrammar": XgrammarBackend(VOCABULARY), "llguidance": LlguidanceBackend(VOCABULARY)}


def compiled(name: str, spec: Spec) -> Grammar:
    return BACKENDS[name].compile(spec)


def allowed(matcher: Matcher) -> set[int]:
    """The ids whose bits are set."""
    bitmask = torch.full((3, (VOCAB_SIZE + 31) // 32), 0x55555555, dtype=torch.int32)
    if not matcher.fill(bitmask, 1):
        return set(range(VOCAB_SIZE))
    assert (bitmask[[0, 2]] == 0x55555555).all()  # nobody else's row
    bits = (bitmask[1][:, None] >> torch.arange(32)) & 1
    return set(bits.flatten()[:VOCAB_SIZE].nonzero().flatten().tolist())


def takes(matcher: Matcher, text: str) -> bool:
    """Does it take all of a text, so that it may end there?"""
    return all(matcher.accept(token) for token in VOCABULARY.encode(text)) and matcher.complete


def accepts(grammar: Grammar, text: str) -> bool:
    return takes(grammar.matcher(), text)


def written(instance: Any) -> str:
    return json.dumps(instance, ensure_ascii=False)


def able(name: str, spec: Spec) -> bool:
    return all(fault.effect == "slow" for fault in support.faults(spec, name))


def both(examples: Iterable[Example]) -> list[Any]:
    """(backend, example) for each backend that means what the example says."""
    return [
        pytest.param(name, example, id=f"{name}-{example.name}")
        for example in examples
        for name in NAMES
        if able(name, Spec.json_schema(example.schema))
    ]


def test_most_examples_are_for_both():
    assert len(EXAMPLES) == len({example.name for example in EXAMPLES}) == 60
    assert len(both(EXAMPLES)) > 100


# ---- the same schemas, the same instances


@pytest.mark.parametrize(("name", "example"), both(EXAMPLES))
def test_instances(name, example):
    grammar = compiled(name, Spec.json_schema(example.schema))
    for instance in example.valid:
        matcher = grammar.matcher()
        for token in VOCABULARY.encode(written(instance)):
            assert token in allowed(matcher), (instance, VOCABULARY.tokens[token])
            assert matcher.accept(token)
        assert matcher.complete and not matcher.ended
        assert allowed(matcher) >= set(STOP_IDS)
        assert matcher.accept(STOP_IDS[0]) and matcher.ended
    for instance in example.invalid:
        assert not accepts(grammar, written(instance)), instance
    assert grammar.backend == name
    assert 0 < grammar.size < 50 << 20


@pytest.mark.parametrize(("name", "example"), both(EXAMPLES[::3]))
def test_masks_say_what_is_accepted(name, example):
    """At random positions of an instance and on random ways off it, for all tokens."""
    rng = random.Random(example.name)
    grammar = compiled(name, Spec.json_schema(example.schema))
    matcher, off = grammar.matcher(), grammar.matcher()
    instance = rng.choice(example.valid)
    for token in VOCABULARY.encode(written(instance)):
        if rng.random() < 0.3:
            check_mask(matcher)
        assert matcher.accept(token)
    check_mask(matcher)
    for _ in range(4):
        ways = sorted(allowed(off) - set(STOP_IDS))
        if not ways:
            break
        assert off.accept(rng.choice(ways))
        check_mask(off)


def check_mask(matcher: Matcher) -> None:
    accepted = {token for token in range(VOCAB_SIZE) if matcher.fork().accept(token)}
    mask = allowed(matcher)
    assert all(VOCABULARY.tokens[token] or token in STOP_IDS for token in accepted)
    assert bool(accepted & set(STOP_IDS)) == matcher.complete
    if mask != accepted:  # llguidance: of forced text the one token that a tokenizer would write
        assert "llguidance" in type(matcher).__module__ and matcher.forced()
        assert len(mask) == 1 and mask < accepted
    assert mask
    if matcher.complete:
        assert matcher.forced() == b""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("any_whitespace", [True, False])
def test_whitespace(name, any_whitespace):
    schema = {"type": "object", "properties": {"a": {"type": "array"}, "b": {}}, "required": ["a"]}
    grammar = compiled(name, Spec.json_schema(schema, any_whitespace=any_whitespace))
    instance = {"a": [1, {"x": None}], "b": {"y": [[]]}}
    assert accepts(grammar, json.dumps(instance))
    assert accepts(grammar, json.dumps(instance, separators=(",", ":"))) == any_whitespace
    assert accepts(grammar, json.dumps(instance, indent=2)) == any_whitespace


# ---- kinds of specs


@pytest.mark.parametrize("name", NAMES)
def test_a_regex_matches_the_whole_text(name):
    for pattern in ("[a-c]+[0-9]{2}", "^[a-c]+[0-9]{2}$"):
        grammar = compiled(name, Spec.regex(pattern))
        assert accepts(grammar, "abc12") and accepts(grammar, "a00")
        assert not any(accepts(grammar, text) for text in ("12", "abc1", "xabc12", "abc123"))
    assert accepts(compiled(name, Spec.regex("(yes|no)/é")), "no/é")
    digits = compiled(name, Spec.regex(r"\d\w\s"))
    assert accepts(digits, "3b ") and not accepts(digits, "٣b ") and not accepts(digits, "3é ")


@pytest.mark.parametrize("name", NAMES)
def test_choices_are_those_texts(name):
    odd = st.sampled_from("ab\\\"'/\n\t\x00\x7f é猫🙂\u2028")
    text = st.text(odd | st.characters(codec="utf-8", exclude_characters="<"), min_size=1)

    @settings(max_examples=60)
    @given(st.lists(text, min_size=1, max_size=6, unique=True), text)
    def exact(choices: list[str], other: str):
        grammar = compiled(name, Spec.choices(choices))
        assert all(accepts(grammar, choice) for choice in choices)
        assert accepts(grammar, other) == (other in choices)

    exact()


def test_ebnf_is_xgrammars():
    spec = Spec.ebnf("root ::= word word digit\nword ::= [a-z]+\ndigit ::= [0-9]")
    assert accepts(compiled("xgrammar", spec), "ab1")
    with pytest.raises(RuntimeError, match="llguidance does not take ebnf"):
        compiled("llguidance", spec)


def test_structural_tags_are_xgrammars():
    schema = {"type": "object", "properties": {"city": {"type": "string", "title": "a city"}}, "required": ["city"]}
    tag = {"begin": "<call>", "content": {"type": "json_schema", "json_schema": schema}, "end": "</call>"}
    tags = {"type": "triggered_tags", "triggers": ["<call>"], "tags": [tag]}
    spec = Spec.structural_tag({"type": "structural_tag", "format": tags})
    grammar = compiled("xgrammar", spec)
    assert accepts(grammar, 'so: <call>{"city": "Bern"}</call> done')
    assert not accepts(grammar, "<call>{}</call>")
    assert not accepts(grammar, '<call>{"city": "Bern", "more": [1]}</call>')  # valid, but never written
    for schema, text in (({"type": "object"}, '{"x": [1]}'), ({"type": "array", "minItems": 1}, "[{}]")):
        part = {"type": "json_schema", "json_schema": schema}
        assert accepts(compiled("xgrammar", Spec.structural_tag({"type": "structural_tag", "format": part})), text)
    with pytest.raises(RuntimeError, match="llguidance does not take structural_tag"):
        compiled("llguidance", spec)


# ---- one matcher


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", [Spec.json_object(), Spec.choices(["ab", "abc"]), Spec.regex("[0-9]{2}")], ids=str)
def test_the_end(name, spec):
    """A stop token is taken exactly where the text is complete; then there is nothing more, until it is taken back."""
    matcher = compiled(name, spec).matcher()
    text = {"json_schema": "{}", "choices": "ab", "regex": "12"}[spec.kind]
    assert not any(matcher.accept(stop) for stop in STOP_IDS) and not matcher.ended
    assert takes(matcher, text)
    before = allowed(matcher)
    for stop in STOP_IDS:
        assert stop in before
        assert matcher.accept(stop)
        assert matcher.ended and matcher.complete
        assert matcher.forced() == b""
        assert not any(matcher.accept(token) for token in (stop, 50, *VOCABULARY.encode("c")))
        with pytest.raises(RuntimeError, match="the text has ended"):
            allowed(matcher)
        assert matcher.fork().ended
        matcher.rollback(1)
        assert not matcher.ended and matcher.complete and allowed(matcher) == before


@pytest.mark.parametrize("name", NAMES)
def test_what_is_refused_changes_nothing(name):
    matcher = compiled(name, Spec.json_schema(TREE)).matcher()
    refused = [-1, VOCAB_SIZE, 1 << 40, VOCAB_SIZE - 1, 1, *STOP_IDS, *VOCABULARY.encode("nonsense")]
    for token in VOCABULARY.encode(written({"value": 1, "children": [{"value": -2}]})):
        mask, forced = allowed(matcher), matcher.forced()
        assert not any(matcher.fork().accept(bad) for bad in refused[:7])
        for bad in refused:
            if not matcher.fork().accept(bad):
                assert not matcher.accept(bad)
        assert (allowed(matcher), matcher.forced(), matcher.ended) == (mask, forced, False)
        assert matcher.accept(token)
    assert matcher.complete


@pytest.mark.parametrize("name", NAMES)
def test_rollback_returns_to_every_earlier_state(name):
    rng = random.Random(3)
    example = next(example for example in EXAMPLES if example.name == "person")
    grammar = compiled(name, Spec.json_schema(example.schema))
    tokens = [*VOCABULARY.encode(written(example.valid[0])), STOP_IDS[1]]
    matcher, states, at = grammar.matcher(), [], 0
    for token in tokens:
        states.append((allowed(matcher), matcher.forced(), matcher.complete))
        assert matcher.accept(token)
    at = len(tokens)
    for _ in range(30):
        back = rng.randint(0, at)
        matcher.rollback(back)
        at -= back
        if at < len(tokens):
            assert (allowed(matcher), matcher.forced(), matcher.complete) == states[at]
        forward = rng.randint(0, len(tokens) - at)
        assert all(matcher.accept(token) for token in tokens[at : at + forward])
        at += forward
        assert matcher.ended == (at == len(tokens))
    with pytest.raises(RuntimeError):
        grammar.matcher().rollback(1)


@pytest.mark.parametrize("name", NAMES)
def test_forks_go_their_own_ways(name):
    matcher = compiled(name, Spec.choices(["left", "right"])).matcher()
    left, right = matcher.fork(), matcher.fork()
    assert takes(left, "left") and takes(right, "right") and takes(matcher, "left")
    right.rollback(len(VOCABULARY.encode("right")))
    assert takes(right, "left") and left.accept(STOP_IDS[0]) and not right.ended and not matcher.ended


@pytest.mark.parametrize("name", NAMES)
def test_threads_share_a_grammar(name):
    grammar = compiled(name, Spec.json_schema(TREE))
    text, failed = written({"value": 1, "children": [{"value": 2}] * 5}), []

    def work() -> None:
        for _ in range(10):
            matcher = grammar.matcher()
            for token in VOCABULARY.encode(text):
                if token not in allowed(matcher) or not matcher.accept(token):
                    failed.append(token)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# ---- forced text


@pytest.mark.parametrize("name", NAMES)
def test_forced_text_is_what_every_continuation_begins_with(name):
    spec = Spec.json_schema({"type": "object", "properties": {"name": {"enum": ["café", "cafè"]}}, "required": ["name"],
                             "additionalProperties": False}, any_whitespace=False)  # fmt: skip
    matcher = compiled(name, spec).matcher()
    assert matcher.forced() == b'{"name": "caf'  # é and è begin with the same byte, which is no character
    assert takes(matcher, '{"name": "cafè"}') and matcher.forced() == b""


@pytest.mark.parametrize("name", NAMES)
def test_what_may_end_forces_nothing(name):
    matcher = compiled(name, Spec.choices(["a", "abc"])).matcher()
    assert matcher.forced() == b"a"
    assert matcher.accept(VOCABULARY.encode("a")[0])
    assert matcher.complete and matcher.forced() == b""


def test_whole_characters():
    assert whole_characters("aé".encode()[:-1]) == b"a"
    assert whole_characters("é猫".encode()) == "é猫".encode()


# ---- what each library does not do as one would expect


RECURSIVE = {
    "a list of itself": Spec.json_schema({"type": "array", "items": {"$ref": "#"}}),
    "an object in itself": Spec.json_schema(
        {"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#"}}}}
    ),
    "ebnf": Spec.ebnf('root ::= "[" (root ("," root)*)? "]"\nstart ::= "x"'),
}


@pytest.mark.parametrize("name", RECURSIVE)
def test_recursive_roots_have_whole_masks(name):
    """xgrammar alone leaves out the tokens that end an inner root and go on in the outer one."""
    merged = [b"]]", b"],", b"],[", b"[[", b"}]", b"}]}", b"}],", b'{"a"', b'":[']
    tokens = [*(bytes([i]) for i in range(256)), *merged]
    matcher = XgrammarBackend(Vocabulary([*tokens, b""], [len(tokens)], list)).compile(RECURSIVE[name]).matcher()
    for byte in b'{"a":[{"a":[{}]},{}]}' if name == "an object in itself" else b"[[],[[]]]":
        bitmask = torch.zeros(1, (len(tokens) + 32) // 32, dtype=torch.int32)
        assert matcher.fill(bitmask, 0)
        bits = (bitmask[0][:, None] >> torch.arange(32)).flatten() & 1
        assert [i for i in range(len(tokens)) if bits[i]] == [i for i in range(len(tokens)) if matcher.fork().accept(i)]
        assert matcher.accept(byte)
    assert matcher.complete


def test_a_root_is_moved_with_its_references_and_not_its_data():
    schema = {
        "$defs": {"a": {"$ref": "#"}},
        "properties": {"x": {"$ref": "#/$defs/a"}, "$ref": {"const": {"$ref": "#"}}},
    }
    assert below_a_root(schema) == {
        "$ref": "#/$defs/root",
        "$defs": {
            "root": {
                "$defs": {"a": {"$ref": "#/$defs/root"}},
                "properties": {"x": {"$ref": "#/$defs/root/$defs/a"}, "$ref": {"const": {"$ref": "#"}}},
            }
        },
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", [r"^[^\n\r]{1,129}$", "^.{0,200}$", "^[a-z]{1,300}$"])
def test_long_repeats(name, pattern):
    """They fail in xgrammar's compiler with a cache."""
    grammar = compiled(name, Spec.json_schema({"type": "string", "pattern": pattern}))
    assert accepts(grammar, '"' + "ab" * 64 + '"')
    assert not accepts(grammar, '"' + "ab" * 200 + '"')


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_are_never_allowed(name):
    grammar = compiled(name, Spec.json_schema({"type": "string"}))
    matcher = grammar.matcher()
    assert matcher.accept(VOCABULARY.encode('"')[0])
    mask = allowed(matcher)
    assert all(VOCABULARY.tokens[token] for token in mask)
    assert not any(matcher.fork().accept(token) for token in range(VOCAB_SIZE) if not VOCABULARY.tokens[token])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "spec",
    [
        Spec.json_schema({"$ref": "#"}),
        Spec.json_schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        Spec.json_schema({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}),
        Spec.json_schema(False),
        Spec.ebnf("root ::= root"),  # llguidance takes no EBNF at all
    ],
    ids=str,
)  # fmt: skip
def test_languages_without_texts(name, spec):
    with pytest.raises(RuntimeError):
        compiled(name, spec)


def test_the_check_for_an_empty_language():
    class Stuck:
        def __init__(self, bits: int, any_token: bool = False):
            self.bits, self.any_token = bits, any_token

        def matcher(self):
            return self

        def fill(self, bitmask, index):
            bitmask[index, 1] = self.bits
            return not self.any_token

    check_matches(Stuck(4), 60)
    check_matches(Stuck(0, any_token=True), 60)
    with pytest.raises(RuntimeError, match="matches nothing"):
        check_matches(Stuck(0), 60)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "spec",
    [
        Spec.json_schema({"type": "string", "pattern": "(a"}),
        Spec.json_schema({"type": "string", "pattern": r"(a)\1"}),
        Spec.json_schema({"type": "integer", "minimum": 5, "maximum": 1}),
        Spec.regex("(a"),
        Spec.regex("[z-a]"),
        Spec.ebnf("root ::= missing"),
        Spec.ebnf("nothing"),
        Spec.structural_tag({"type": "structural_tag", "format": {"type": "none of these"}}),
    ],
    ids=str,
)
def test_errors_are_one_readable_line(name, spec):
    with pytest.raises(RuntimeError) as caught:
        compiled(name, spec)
    message = str(caught.value)
    assert 5 < len(message) < 400 and "\n" not in message
    assert not any(noise in message for noise in ("backtrace", ".cc:", ".rs:", "Check failed", "0x", "<state>"))


def test_one_line():
    assert (
        one_line("[17:35:01] /project/cpp/a.cc:12: Check failed: (rule != -1) is false: no rule: \n x\n")
        == "no rule: x"
    )
    assert one_line("at 1(8): bad\n   1 | start\n\n<backtrace>\n0: x") == "at 1(8): bad 1 | start"
    assert one_line("<backtrace>\n0: x") == "it gives no reason"


def test_llguidance_takes_no_orders_from_a_schema():
    grammar = compiled("llguidance", Spec.json_schema({"x-guidance": {"whitespace_flexible": False}, "type": "array"}))
    assert accepts(grammar, "[ 1 ]")
