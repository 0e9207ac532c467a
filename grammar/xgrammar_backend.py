"""xgrammar behind the interface of `matcher.py`.

What it does not do as one would expect is put right here, with a test each. Facts: xgrammar 0.2.8.

    python -m pytest tests/test_grammar_backends.py
"""

import json
from typing import Any

import xgrammar
from torch import Tensor

from grammar.matcher import whole_characters
from grammar.spec import Spec
from grammar.vocabulary import Vocabulary


class XgrammarMatcher:
    def __init__(self, matcher: xgrammar.GrammarMatcher):
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        return self._matcher.is_completed()

    @property
    def ended(self) -> bool:
        return self._matcher.is_terminated()

    def fill(self, bitmask: Tensor, index: int) -> bool:
        return self._matcher.fill_next_token_bitmask(bitmask, index)

    def accept(self, token: int) -> bool:
        return self._matcher.accept_token(token)

    def rollback(self, tokens: int) -> None:
        self._matcher.rollback(tokens)

    def fork(self) -> "XgrammarMatcher":
        return XgrammarMatcher(self._matcher.fork())

    def forced(self) -> bytes:
        if self._matcher.is_terminated():
            return b""
        try:
            return self._matcher.find_jump_forward_string().encode()
        except UnicodeDecodeError as error:  # it ends inside a character
            return whole_characters(error.object)


class XgrammarGrammar:
    backend = "xgrammar"

    def __init__(self, compiled: xgrammar.CompiledGrammar):
        self.compiled = compiled

    @property
    def size(self) -> int:
        return self.compiled.memory_size_bytes

    def matcher(self) -> XgrammarMatcher:
        return XgrammarMatcher(xgrammar.GrammarMatcher(self.compiled))


class XgrammarBackend:
    """The compiler of one vocabulary. Safe to share between threads."""

    name = "xgrammar"

    def __init__(self, vocabulary: Vocabulary, threads: int = 1, cache_bytes: int = 64 << 20):
        self.info = xgrammar.TokenizerInfo(
            vocabulary.tokens,
            xgrammar.VocabType.RAW,
            vocab_size=len(vocabulary),
            stop_token_ids=vocabulary.stop_ids,
        )
        self._compiler = xgrammar.GrammarCompiler(self.info, max_threads=threads, cache_limit_bytes=cache_bytes)

    def compile(self, spec: Spec) -> XgrammarGrammar:
        """RuntimeError, with xgrammar's words, for what it cannot do."""
        return XgrammarGrammar(self._compile(spec))

    def _compile(self, spec: Spec) -> xgrammar.CompiledGrammar:
        match spec.kind:
            case "json_schema":
                options: dict[str, Any] = dict(any_whitespace=spec.any_whitespace, strict_mode=False)
                return self._compiler.compile_json_schema(spec.text, **options)
            case "regex":
                return self._compiler.compile_regex(spec.text)
            case "ebnf":
                return self._compiler.compile_grammar(spec.text)
            case "choices":
                choices = " | ".join(json.dumps(choice) for choice in json.loads(spec.text))
                return self._compiler.compile_grammar(f"root ::= {choices}")
            case "structural_tag":
                return self._compiler.compile_structural_tag(spec.text)
