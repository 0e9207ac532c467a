"""llguidance behind the interface of `matcher.py`.

What it does not do as one would expect is put right here, with a test each:

- a token that is no id of its vocabulary puts a matcher into an error for good: it is refused before llguidance sees it
- a matcher that can only end has stopped, and takes no stop token any more: stop tokens are counted here, never passed on
- its lexer is greedy, so that a rule of EBNF may mean less than it says ([a-z]+ [a-z]+ matches nothing): EBNF is refused, and
  with it structural tags, which would be put together from the same rules
- its regexes are Rust's, whose \\d and \\w are Unicode's: they are rewritten to mean ASCII, as in JSON Schema

Where text is forced, its mask has the one token that a tokenizer would write, though `accept` takes every other spelling.
Facts: llguidance 1.9.1.

    python -m pytest tests/test_grammar_backends.py
"""

import json

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
from torch import Tensor

from grammar.dialects import without_anchors
from grammar.matcher import check_matches, one_line, whole_characters
from grammar.normal import normalized
from grammar.spec import Spec
from grammar.vocabulary import Vocabulary

LIMITS = dict(
    max_items_in_row=20_000,  # with 2,000, one real schema of 297 could not be followed to its end
    initial_lexer_fuel=1_000_000,  # about 20 ms
    step_lexer_fuel=200_000,  # a mask: about 15 ms
    step_max_items=50_000,  # a mask: about 3 ms
    max_lexer_states=250_000,  # about 400 MB
    max_grammar_size=500_000,
    precompute_large_lexemes=True,
    verbose_errors=False,  # they would show one user's schema in another's log
)
BYTES, BYTES_PER_CHARACTER = 32 << 10, 110  # of a grammar's text, compiled: resident memory measured over sixty schemas


class LlguidanceMatcher:
    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, ended: bool = False):
        self._matcher, self._vocabulary, self.ended = matcher, vocabulary, ended

    @property
    def complete(self) -> bool:
        return self._matcher.is_accepting()

    def fill(self, bitmask: Tensor, index: int) -> bool:
        if self.ended:
            raise RuntimeError("the text has ended")
        row = bitmask[index]
        self._matcher.unsafe_compute_mask_ptr(row.data_ptr(), row.numel() * row.element_size())
        self._raise_error()
        return True

    def accept(self, token: int) -> bool:
        if self.ended or not 0 <= token < len(self._vocabulary):
            return False
        if token in self._vocabulary.stop_ids:
            self.ended = self.complete
            return self.ended
        if self._matcher.try_consume_tokens([token]) == 1:
            return True
        self._raise_error()  # then not the token is wrong: the parser has met one of its limits
        return False

    def rollback(self, tokens: int) -> None:
        if tokens and self.ended:
            self.ended, tokens = False, tokens - 1
        if tokens and not self._matcher.rollback(tokens):
            self._raise_error()

    def fork(self) -> "LlguidanceMatcher":
        return LlguidanceMatcher(self._matcher.deep_copy(), self._vocabulary, self.ended)

    def forced(self) -> bytes:
        return b"" if self.ended else whole_characters(self._matcher.compute_ff_bytes())

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(one_line(self._matcher.get_error()))


class LlguidanceGrammar:
    """Its compiled form is a matcher at the beginning, of which each request gets a copy."""

    backend = "llguidance"

    def __init__(self, first: LLMatcher, vocabulary: Vocabulary, characters: int):
        self._first, self.vocabulary, self._characters = first, vocabulary, characters

    @property
    def size(self) -> int:
        """An estimate, from the length of the grammar: llguidance does not say. Its lexer grows to about twice that in use."""
        return BYTES + self._characters * BYTES_PER_CHARACTER

    def matcher(self) -> LlguidanceMatcher:
        return LlguidanceMatcher(self._first.deep_copy(), self.vocabulary)


class LlguidanceBackend:
    """The compiler of one vocabulary. Safe to share between threads."""

    name = "llguidance"

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Tokens(vocabulary)), eos_token=vocabulary.stop_ids)

    def compile(self, spec: Spec) -> LlguidanceGrammar:
        """RuntimeError, with llguidance's words, for what it cannot do, and for a grammar that matches nothing."""
        text = _grammar(spec)
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise RuntimeError(one_line(matcher.get_error()))
        grammar = LlguidanceGrammar(matcher, self._vocabulary, len(text))
        check_matches(grammar, len(self._vocabulary))
        return grammar


def _grammar(spec: Spec) -> str:
    """A spec in llguidance's own notation."""
    match spec.kind:
        case "json_schema":
            fixed = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
            options = {"lenient": False, "coerce_one_of": False} | ({} if spec.any_whitespace else fixed)
            schema = normalized(spec).text
            if schema in ("true", "false"):  # it wants an object
                schema = f'{{"allOf": [{schema}]}}'
            return LLMatcher.grammar_from_json_schema(schema, overrides=options)
        case "regex":
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(without_anchors(spec.text), 'dw')}/")
        case "choices":
            choices = (json.dumps(choice).replace("\x7f", r"\u007f") for choice in json.loads(spec.text))
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(choices)}")
        case _:
            raise RuntimeError(f"llguidance does not take {spec.kind}")


class _Tokens:
    """A vocabulary, as LLTokenizer wants to see it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary):
        self.eos_token_id = vocabulary.stop_ids[0]
        self.tokens = vocabulary.tokens
        self.special_token_ids = [i for i, token in enumerate(vocabulary.tokens) if not token]
        self._encode = vocabulary.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode())
