"""Grammars in the decode loop. Knows nothing of HTTP, of files or of a GPU.

spec.py                  what a request asks for: a JSON schema, a regex, EBNF, choices, a structural tag
limits.py                the gate: what is refused before any native code sees it
support.py               which backend means what a schema says
compiler.py              a spec -> a grammar: off the loop, cached, and where it may be slow in a process of its own
worker.py                that process
matcher.py               how far one request is in its grammar: the interface of both backends
xgrammar_backend.py      one of them
llguidance_backend.py    the other
vocabulary.py            the model's tokens as bytes
jump.py                  text that the grammar forces, as tokens
finish.py                the short way to a valid end
"""
