"""xgrammar behind the interface of `matcher.py`.

What it does not do as one would expect is put right here, with a test each:

- a root that contains itself ({"$ref": "#"}, or `root` in EBNF) has masks without the tokens that both end an inner root and
  go on in the outer one: a rule is put above it
- a pattern with {n} beyond 128 fails where rules are cached: it is compiled once more, without a cache
- text that is forced up to the middle of a character is an error: it is cut before that character
- its tokenizer information calls a token special only if it is b"" (Vocabulary sees to it), and takes one stop id unless told

Facts: xgrammar 0.2.8.

    python -m pytest tests/test_grammar_backends.py
"""

import json
from typing import Any

import xgrammar
from torch import Tensor

from grammar.matcher import check_matches, one_line, whole_characters
from grammar.normal import normalized
from grammar.spec import Spec
from grammar.subschemas import subschemas
from grammar.vocabulary import Vocabulary

CACHE_BUG = "per_rule_fsm_hashes"  # in the message of what only a compiler with a cache cannot do


class XgrammarMatcher:
    def __init__(self, matcher: xgrammar.GrammarMatcher, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def complete(self) -> bool:
        return self._matcher.is_completed()

    @property
    def ended(self) -> bool:
        return self._matcher.is_terminated()

    def fill(self, bitmask: Tensor, index: int) -> bool:
        if self.ended:
            raise RuntimeError("the text has ended")
        try:
            return self._matcher.fill_next_token_bitmask(bitmask, index)
        except RuntimeError as error:
            raise RuntimeError(one_line(str(error))) from error

    def accept(self, token: int) -> bool:
        return not self.ended and 0 <= token < self._vocab_size and self._matcher.accept_token(token)

    def rollback(self, tokens: int) -> None:
        try:
            if tokens:
                self._matcher.rollback(tokens)
        except RuntimeError as error:
            raise RuntimeError(one_line(str(error))) from error

    def fork(self) -> "XgrammarMatcher":
        return XgrammarMatcher(self._matcher.fork(), self._vocab_size)

    def forced(self) -> bytes:
        if self.ended:
            return b""
        try:
            return self._matcher.find_jump_forward_string().encode()
        except UnicodeDecodeError as error:  # it ends inside a character
            return whole_characters(error.object)


class XgrammarGrammar:
    backend = "xgrammar"

    def __init__(self, compiled: xgrammar.CompiledGrammar, vocabulary: Vocabulary):
        self.compiled, self.vocabulary = compiled, vocabulary

    @property
    def size(self) -> int:
        return self.compiled.memory_size_bytes

    def matcher(self) -> XgrammarMatcher:
        return XgrammarMatcher(xgrammar.GrammarMatcher(self.compiled), self.compiled.tokenizer_info.vocab_size)


class XgrammarBackend:
    """The compiler of one vocabulary. Safe to share between threads."""

    name = "xgrammar"

    def __init__(self, vocabulary: Vocabulary, threads: int = 1, cache_bytes: int = 8 << 20):
        self.vocabulary = vocabulary
        self.info = xgrammar.TokenizerInfo(
            vocabulary.tokens,
            xgrammar.VocabType.RAW,
            vocab_size=len(vocabulary),
            stop_token_ids=vocabulary.stop_ids,
        )
        self._compiler = xgrammar.GrammarCompiler(self.info, max_threads=threads, cache_limit_bytes=cache_bytes)
        self._cacheless = xgrammar.GrammarCompiler(self.info, max_threads=threads, cache_enabled=False)

    def compile(self, spec: Spec) -> XgrammarGrammar:
        """RuntimeError, with xgrammar's words, for what it cannot do, and for a grammar that matches nothing."""
        try:
            compiled = self._compile(spec)
        except RuntimeError as error:
            raise RuntimeError(one_line(str(error))) from error
        grammar = XgrammarGrammar(compiled, self.vocabulary)
        check_matches(grammar, self.info.vocab_size)
        return grammar

    def _compile(self, spec: Spec) -> xgrammar.CompiledGrammar:
        try:
            return _compile(self._compiler, spec)
        except RuntimeError as error:
            if CACHE_BUG not in str(error):
                raise
            return _compile(self._cacheless, spec)


def _compile(compiler: xgrammar.GrammarCompiler, spec: Spec) -> xgrammar.CompiledGrammar:
    match spec.kind:
        case "json_schema":
            schema = below_a_root(json.loads(normalized(spec).text))
            return compiler.compile_json_schema(
                json.dumps(schema, ensure_ascii=False), any_whitespace=spec.any_whitespace, strict_mode=False
            )
        case "regex":
            return compiler.compile_regex(spec.text)
        case "ebnf":
            root = "start"
            while root in spec.text:
                root += "_"
            return compiler.compile_grammar(f"{root} ::= root\n{spec.text}", root_rule_name=root)
        case "choices":
            choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(spec.text))
            return compiler.compile_grammar(f"root ::= {' | '.join(choices)}")
        case "structural_tag":
            return compiler.compile_structural_tag(normalized(spec).text)


def below_a_root(schema: Any) -> Any:
    """A schema that refers to itself as a whole, moved below a root that nothing refers to; any other as it is."""
    references = [(holder, holder["$ref"]) for _, holder in subschemas(schema) if "$ref" in holder]
    if all(reference != "#" for _, reference in references):
        return schema
    for holder, reference in references:
        if reference.startswith("#"):
            holder["$ref"] = "#/$defs/root" + reference[1:]
    return {"$defs": {"root": schema}, "$ref": "#/$defs/root"}
