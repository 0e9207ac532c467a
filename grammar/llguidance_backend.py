"""llguidance behind the interface of `matcher.py`. Facts: llguidance 1.9.1.

python -m pytest tests/test_grammar_backends.py
"""

import json

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from grammar.matcher import whole_characters
from grammar.spec import Spec
from grammar.vocabulary import Vocabulary


class LlguidanceMatcher:
    def __init__(self, matcher: LLMatcher, stop_ids: frozenset[int], ended: bool = False):
        self._matcher, self._stop_ids, self.ended = matcher, stop_ids, ended

    @property
    def complete(self) -> bool:
        return self._matcher.is_accepting()

    def fill(self, bitmask: Tensor, index: int) -> bool:
        if self.ended:
            raise RuntimeError("the text has ended")
        row = bitmask[index]
        self._matcher.unsafe_compute_mask_ptr(row.data_ptr(), row.numel() * row.element_size())
        if self._matcher.is_error():
            raise RuntimeError(self._matcher.get_error())
        return True

    def accept(self, token: int) -> bool:
        if self.ended or self._matcher.try_consume_tokens([token]) == 0:
            return False
        self.ended = token in self._stop_ids
        return True

    def rollback(self, tokens: int) -> None:
        if tokens:
            self.ended = False
            if not self._matcher.rollback(tokens):
                raise RuntimeError(self._matcher.get_error())

    def fork(self) -> "LlguidanceMatcher":
        return LlguidanceMatcher(self._matcher.deep_copy(), self._stop_ids, self.ended)

    def forced(self) -> bytes:
        return b"" if self.ended else whole_characters(self._matcher.compute_ff_bytes())


class LlguidanceGrammar:
    """Its compiled form is a matcher at the beginning, of which each request gets a copy."""

    backend = "llguidance"

    def __init__(self, first: LLMatcher, stop_ids: frozenset[int], size: int):
        self._first, self._stop_ids, self.size = first, stop_ids, size

    def matcher(self) -> LlguidanceMatcher:
        return LlguidanceMatcher(self._first.deep_copy(), self._stop_ids)


class LlguidanceBackend:
    """The compiler of one vocabulary. Safe to share between threads."""

    name = "llguidance"

    def __init__(self, vocabulary: Vocabulary):
        self._stop_ids = frozenset(vocabulary.stop_ids)
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Tokens(vocabulary)), eos_token=vocabulary.stop_ids)

    def compile(self, spec: Spec) -> LlguidanceGrammar:
        """RuntimeError, with llguidance's words, for what it cannot do."""
        grammar = self._grammar(spec)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise RuntimeError(matcher.get_error())
        return LlguidanceGrammar(matcher, self._stop_ids, size=len(grammar))

    def _grammar(self, spec: Spec) -> str:
        match spec.kind:
            case "json_schema":
                fixed = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
                return LLMatcher.grammar_from_json_schema(spec.text, overrides={} if spec.any_whitespace else fixed)
            case "regex":
                return LLMatcher.grammar_from_regex(spec.text)
            case "choices":
                choices = " | ".join(json.dumps(choice) for choice in json.loads(spec.text))
                return LLMatcher.grammar_from_lark(f"start: {choices}")
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
