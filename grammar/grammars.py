"""The grammars of one model, made when the first request asks for one: a vocabulary, a compiler, and what a request gets of them.

python -m pytest tests/test_grammar_engine.py
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future

from grammar.compiler import Compiler, CompilerStats
from grammar.constraint import GrammarConstraint
from grammar.finish import Finisher
from grammar.matcher import Grammar
from grammar.spec import Spec
from grammar.vocabulary import Vocabulary
from tokenizer import Tokenizer


class Grammars:
    """Safe to share between threads. backend: "auto", "xgrammar" or "llguidance"."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, stop_ids: Sequence[int], backend: str):
        self._sources, self._backend = (tokenizer, vocab_size, stop_ids), backend
        self._compiler: Compiler | None = None
        self._making = threading.Lock()

    @property
    def compiler(self) -> Compiler:
        """The first caller makes it, and waits half a second if the vocabulary is large. UserError if there is no stop token."""
        with self._making:
            if self._compiler is None:
                vocabulary = Vocabulary.of(*self._sources)
                Finisher(vocabulary, max_new_tokens=1)  # makes tables that the loop must not wait for,
                vocabulary.starting_with(b"")  # and so does this
                self._compiler = Compiler(vocabulary, self._backend)
            return self._compiler

    def compile(self, spec: Spec) -> "Future[Grammar]":
        """As `Compiler.compile`; UserError at once for what need not be compiled to be refused."""
        return self.compiler.compile(spec, self.compiler.check(spec))

    def constrain(self, grammar: Grammar, jump: bool, finish_within: int | None) -> GrammarConstraint:
        """What limits a new request. finish_within: its new tokens, if its text is to be brought to an end in time."""
        finisher = None if finish_within is None else Finisher(grammar.vocabulary, finish_within)
        return GrammarConstraint(grammar.matcher(), grammar.vocabulary, jump, finisher)

    def stats(self) -> CompilerStats | None:
        return self._compiler and self._compiler.stats()
