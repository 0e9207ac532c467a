"""Grammars in the decode loop. Knows nothing of HTTP, of files or of a GPU.

spec.py                  what a request asks for: a JSON schema, a regex, EBNF, choices, a structural tag

limits.py                the gate: what is refused before any native code sees it. It reads with
json_text.py             ... JSON,
schema.py                ... a JSON schema,
pattern.py               ... a regular expression,
ebnf.py                  ... EBNF,
tag.py                   ... a structural tag
emptiness.py             what no finite text fits
cost.py                  how long xgrammar needs, roughly

support.py               which backend means what a spec says
normal.py                a JSON schema in one form, which both can be asked about
subschemas.py            the schemas inside a schema
references.py            where a reference leads
exclusion.py             which alternatives exclude each other
dialects.py              what each makes of a regular expression
compiler.py              a spec -> a grammar: off the loop, cached, and where it may be slow in a process of its own
worker.py                that process
stats.py                 what the compiler counts

matcher.py               how far one request is in its grammar: the interface of both backends
xgrammar_backend.py      one of them
llguidance_backend.py    the other
vocabulary.py            the model's tokens as bytes

tools.py                 tool calls in a model's own notation, as a structural tag
harmony.py               ... in that of gpt-oss, whose thoughts and answers have a notation, too
grammars.py              the grammars of one model: vocabulary, compiler, constraints
constraint.py            what limits one request, as the loop sees it
masks.py                 the mask step
jump.py                  text that the grammar forces, as tokens
finish.py                the short way to a valid end
"""
