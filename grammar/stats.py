"""What the compiler of grammars counts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CompilerStats:
    hits: int  # asked for when it was in the cache, refusals included
    misses: int
    joined: int  # asked for while another was waiting for the same; neither of the above
    compiling: int  # specs on their way, in a queue or in work
    refused: int  # by the gate, by the choice of a backend or by the backend
    timeouts: int
    crashes: int
    cached_grammars: int
    cached_bytes: int  # of grammars and of their specs
    cached_refusals: int
