"""Programs of generation: prompts, calls, branches and choices as Python that reads from top to bottom.

    from lang import function, gen, set_default_backend

    @function
    def qa(s, question):
        s += "Q: " + question + "\\nA:" + gen("answer", stop="\\n")

    set_default_backend(Engine.from_pretrained("assets/folio-tiny"))
    print(qa.run("What is 2 + 3?")["answer"])

The names are those of SGLang's frontend language (Zheng et al., 2024). docs/lang.md is the language on a page.
"""

from typing import Any

from lang.backend import Backend, BackendError, Cancelled, EngineBackend, Runtime, flush_cache, set_default_backend
from lang.choices import greedy_token_selection, token_length_normalized, unconditional_likelihood_normalized
from lang.graph import Graph
from lang.interpreter import ProgramError, ProgramState
from lang.ir import (
    assistant,
    assistant_begin,
    assistant_end,
    gen,
    gen_int,
    gen_string,
    select,
    separate_reasoning,
    system,
    system_begin,
    system_end,
    user,
    user_begin,
    user_end,
)
from lang.program import Program, function
from lang.remote import Anthropic, LiteLLM, OpenAI, VertexAI

__all__ = [
    "Anthropic", "Backend", "BackendError", "Cancelled", "EngineBackend", "Graph", "LiteLLM", "OpenAI", "Program",
    "ProgramError", "ProgramState", "Runtime", "RuntimeEndpoint", "VertexAI", "assistant", "assistant_begin",
    "assistant_end", "flush_cache", "function", "gen", "gen_int", "gen_string", "greedy_token_selection", "select",
    "separate_reasoning", "set_default_backend", "system", "system_begin", "system_end", "token_length_normalized",
    "unconditional_likelihood_normalized", "user", "user_begin", "user_end",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """RuntimeEndpoint needs httpx, which an engine of this process does not."""
    if name == "RuntimeEndpoint":
        from lang.endpoint import RuntimeEndpoint

        return RuntimeEndpoint
    raise AttributeError(f"module 'lang' has no attribute {name!r}")
