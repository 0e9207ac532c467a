"""Whom Folio is measured beside, each behind the same two methods, each in a file of its own.

    folio.py        Folio, plain and compiled
    hf.py           transformers: generate(), the same with a static cache and torch.compile, continuous batching
    llama_cpp.py    llama.cpp, through llama-cpp-python; gguf_file.py writes the weights for it
    openvino.py     OpenVINO GenAI; openvino_graph.py writes the model for it
    gpt_fast.py     a checkout of gpt-fast
    vllm.py         a server that speaks the OpenAI API
    worker.py       a process of its own for each, and what is said between it and the benchmark

What they share is here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Tokens = list[list[int]]
PAGE = 16  # tokens of a page of the cache, where there are pages


@dataclass(frozen=True)
class Row:
    """What is measured: `new` tokens decoded after the first one, for each prompt; 0 = only the prefill."""

    name: str
    batch: int
    prompt: int
    new: int

    @property
    def longest(self) -> int:
        return self.prompt + self.new + 1


@dataclass(frozen=True)
class Arrival:
    """A request of a server's day: when it comes, in seconds from the start, and how many tokens it wants."""

    at: float
    prompt: list[int]
    new: int


@dataclass
class Served:
    """What became of one: its tokens, and when each was there, in seconds from the start."""

    tokens: list[int]
    times: list[float]


def shared_prefix(prompts: Tokens) -> int:
    """How many tokens all prompts begin with alike, the last token of none among them; 0 if that fills no page."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    same = min(same, min(map(len, prompts)) - 1)
    return same if same >= PAGE else 0


class Generator(Protocol):
    """Greedy, and exactly as many tokens as were asked for."""

    def generate(self, prompts: Tokens, new: int, row: Row) -> Tokens:
        """`new` tokens after each prompt; caches have the size that `row` needs."""


class Server(Generator, Protocol):
    """One that takes requests as they come."""

    def serve(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """All of them, in the order of `at`, each no earlier than it comes."""
