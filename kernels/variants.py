"""Attention variants: small functions that the kernels are built around, one file for all of them.

A *score mod* changes a score (soft cap, ALiBi). A *mask mod* says which of the earlier keys a query sees (sliding
window), and its *first key* where to begin reading, so that pages out of sight cost nothing. Each is a `triton.jit`
function that a kernel takes as a constant: it is compiled into the inner loop, and plain causal attention pays nothing
for it. The same function also runs on PyTorch tensors (`in_torch`), which is how the CPU path and the tests get it.
(The idea: FlexAttention, Dong et al., 2024; user-defined functors in FlashInfer, Ye et al., 2025.)

A new one is a function and a name. Here scores are clipped, and documents of 512 tokens do not see each other:

    @jit
    def clip(score, query, key, head, args):
        return tl.minimum(tl.maximum(score, -args[0]), args[0])

    @jit
    def same_document(query, key, args):
        return query // args[0] == key // args[0]

    SCORE_MODS["clip"] = clip
    MASK_MODS["document"] = MaskMod(same_document)
    variant = Variant("clip", (30.0,), "document", (512,))

`score` is float32 [M, N], after the softmax scale; `query` [M, 1] and `key` [1, N] are positions in the sequence,
`head` [M, 1] is the query head. `args` are the variant's numbers; a tensor arrives as a pointer, to be read with
`tl.load(args[i] + head)`. Inside, use operators, other such functions, and what `TorchLanguage` lists: that is all that both
sides know.

    python -m pytest tests/test_attention.py tests/test_interpreted.py
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class TorchLanguage:
    """Stands in for `triton.language` inside a mod: the part of it that mods may use."""

    float32, int32, int64 = torch.float32, torch.int32, torch.int64
    where, abs, floor, sqrt, sigmoid = torch.where, torch.abs, torch.floor, torch.sqrt, torch.sigmoid
    exp, exp2, log, log2, cos, sin = torch.exp, torch.exp2, torch.log, torch.log2, torch.cos, torch.sin
    load = staticmethod(lambda pointer: pointer.tensor[pointer.at])

    @staticmethod
    def maximum(a: Any, b: Any) -> Tensor:
        return torch.maximum(*torch.broadcast_tensors(torch.as_tensor(a), torch.as_tensor(b)))

    @staticmethod
    def minimum(a: Any, b: Any) -> Tensor:
        return torch.minimum(*torch.broadcast_tensors(torch.as_tensor(a), torch.as_tensor(b)))


try:
    import triton.language as tl
    from triton import jit
except ImportError:  # where Triton does not exist (macOS) these functions run on PyTorch tensors alone
    tl, jit = TorchLanguage, lambda function: function

# ---- the functions


@jit
def tanh(x):
    """There is none that both the compiler and the interpreter know. Exact at both ends, where exp is 0 or infinite."""
    return 1.0 - 2.0 / (tl.exp(x * 2.0) + 1.0)


@jit
def softcap(score, query, key, head, args):
    """cap * tanh(score / cap), which never leaves (-cap, cap) (Gemma 2, 2024). args: cap."""
    return tanh(score / args[0]) * args[0]


@jit
def alibi(score, query, key, head, args):
    """A penalty that grows with the distance, at each head's own slope (Press et al., 2022). args: slopes [H]."""
    return score + tl.load(args[0] + head).to(tl.float32) * (key - query)


@jit
def sliding_window(query, key, args):
    """The last `window` keys, the query's own included (Mistral, 2023). args: window."""
    return key > query - args[0]


@jit
def sliding_window_first(query, args):
    return query - args[0] + 1


@jit
def chunk(query, key, args):
    """The keys of the query's own chunk: positions 0 ... size - 1, size ... 2 size - 1, and so on (Llama 4, 2025). args: size."""
    return query // args[0] == key // args[0]


@jit
def chunk_first(query, args):
    return query // args[0] * args[0]


@dataclass(frozen=True)
class MaskMod:
    """`sees(query, key, args)` -> bool [M, N]; `first(query, args)` -> the first key that it or a later sees."""

    sees: Callable
    first: Callable | None = None  # None: the beginning


SCORE_MODS: dict[str, Callable] = {"softcap": softcap, "alibi": alibi}
MASK_MODS: dict[str, MaskMod] = {
    "sliding_window": MaskMod(sliding_window, sliding_window_first),
    "chunk": MaskMod(chunk, chunk_first),
}


# ---- what a caller says

Mask = tuple[str, tuple[int, ...]]  # a mask mod and its arguments: layers that agree in it see alike


@dataclass(frozen=True)
class Variant:
    """Which of them, with which arguments. Names and plain values, so that it passes through a `torch.library` op.

    Attention sinks are not a variant but weights, which every kernel takes beside it: `sinks` [H], for each head a score that
    belongs to no key but takes its share of the softmax (Xiao et al., 2024; gpt-oss, 2025).
    """

    score_mod: str = ""
    score_args: tuple[float | Tensor, ...] = ()  # numbers first, tensors last
    mask_mod: str = ""
    mask_args: tuple[int, ...] = ()
    # Both as functions of PyTorch tensors. Made here: torch.compile can call them, but not watch them being made.
    score_in_torch: Callable | None = field(init=False, repr=False, compare=False, default=None)
    sees_in_torch: Callable | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        for name, known in ((self.score_mod, SCORE_MODS), (self.mask_mod, MASK_MODS)):
            if name and name not in known:
                raise ValueError(f"no attention variant {name!r}: known are {', '.join(known)}")
        kinds = [isinstance(a, Tensor) for a in self.score_args]
        if kinds != sorted(kinds):
            raise ValueError("score_args must have the numbers first, then the tensors")
        if self.score_mod:
            object.__setattr__(self, "score_in_torch", in_torch(SCORE_MODS[self.score_mod]))
        if self.mask_mod:
            object.__setattr__(self, "sees_in_torch", in_torch(MASK_MODS[self.mask_mod].sees))

    @property
    def flat(self) -> tuple[str, list[float], list[Tensor], str, list[int]]:
        """As the arguments of a `torch.library` op: score mod, its numbers and tensors, mask mod, its numbers."""
        numbers = [float(a) for a in self.score_args if not isinstance(a, Tensor)]
        tensors = [a for a in self.score_args if isinstance(a, Tensor)]
        return self.score_mod, numbers, tensors, self.mask_mod, list(self.mask_args)

    @property
    def mask(self) -> Mask:
        return self.mask_mod, self.mask_args

    @property
    def has_tensors(self) -> bool:
        """Has its score mod an argument that is a tensor? Dynamo cannot watch it being read in PyTorch."""
        return any(isinstance(a, Tensor) for a in self.score_args)

    @property
    def only_masks(self) -> bool:
        """Is it anything that an additive mask can express?"""
        return not self.score_mod


CAUSAL = Variant()


def model_variant(softcap: float | None, window: int | None, chunk_size: int | None = None) -> Variant:
    """What the fields of a `ModelConfig` ask for; a layer has a window or chunks, not both."""
    score = ("softcap", (softcap,)) if softcap is not None else ("", ())
    mask = ("sliding_window", (window,)) if window is not None else ("", ())
    if chunk_size is not None:
        if window is not None:
            raise ValueError(f"a layer cannot have both a window ({window}) and chunks ({chunk_size})")
        mask = ("chunk", (chunk_size,))
    return Variant(*score, *mask)


# ---- the same functions in PyTorch


@dataclass
class Pointer:
    """What a tensor among the arguments looks like to a mod: `pointer + index`, then `tl.load`."""

    tensor: Tensor
    at: Any = 0

    def __add__(self, index: Any) -> "Pointer":
        return Pointer(self.tensor, self.at + index)


IN_TORCH = {tanh: torch.tanh}  # what PyTorch has a function of its own for


@functools.cache
def in_torch(mod: Callable) -> Callable:
    """A mod, and the `jit` functions that it calls, with PyTorch where they say `tl`."""
    python = getattr(mod, "fn", mod)
    names = {"__builtins__": python.__globals__["__builtins__"]}  # torch.compile asks for them
    for name in python.__code__.co_names:
        value = python.__globals__.get(name)
        if value is tl:
            names[name] = TorchLanguage
        elif isinstance(value, Callable):
            names[name] = IN_TORCH.get(value) or in_torch(value)
        elif value is not None:
            names[name] = getattr(value, "value", value)
    return types.FunctionType(python.__code__, names, python.__name__, python.__defaults__)


def apply_in_torch(variant: Variant, scores: Tensor, query: Tensor, key: Tensor, head: Tensor) -> Tensor:
    """scores [..., H, Q, L], positions query [..., Q, 1], key [L], head [H, 1, 1] -> changed, -inf where not seen.

    Causal: a query sees no later key. Sinks are not a matter of single scores; the softmax has to add them.
    """
    if variant.score_in_torch is not None:
        args = tuple(Pointer(a) if isinstance(a, Tensor) else a for a in variant.score_args)
        scores = variant.score_in_torch(scores, query, key, head, args)
    visible = key <= query
    if variant.sees_in_torch is not None:
        visible = visible & variant.sees_in_torch(query, key, variant.mask_args)
    return scores.masked_fill(~visible, float("-inf"))
