"""The page pool: which pages are free, and the tensors they live in.

A page holds `page_size` consecutive tokens of one sequence, in every layer. Who owns a page is bookkeeping on plain ints;
the device never sees it. Page 0 belongs to nobody: padded rows of a batch write there. (PagedAttention, Kwon et al., 2023.)

    python -m pytest tests/test_pages.py
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError


class PagePool:
    """Free and used pages 1 ... pages - 1. Every page has one owner; giving back what is free raises."""

    def __init__(self, pages: int, page_size: int):
        if pages < 2:
            raise UserError(f"a pool of {pages} pages of {page_size} tokens is too small: page 0 is reserved")
        self.total, self.page_size = pages - 1, page_size
        self._free = list(range(pages - 1, 0, -1))  # a stack, so that a page still in a CPU cache is reused first
        self._is_free = [False] + [True] * (pages - 1)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """`count` pages, or MemoryError and nothing."""
        if count > len(self._free):
            raise MemoryError(f"{count} pages wanted, {len(self._free)} of {self.total} free")
        pages = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        for page in pages:
            self._is_free[page] = False
        return pages

    def free(self, pages: list[int]) -> None:
        """Give pages back. A page that is free already, or not of this pool, raises ValueError and frees nothing."""
        for page in pages:
            if not 0 < page <= self.total or self._is_free[page]:
                raise ValueError(f"page {page} is not in use (pool of {self.total})")
        if len(set(pages)) != len(pages):
            raise ValueError(f"a page occurs twice in {pages}")
        for page in pages:
            self._is_free[page] = True
        self._free.extend(pages)

    def check(self, used: list[int]) -> None:
        """Prove that every page is free or among those `used`, and only once. RuntimeError otherwise."""
        pages = used + self._free
        if not len(pages) == len(set(pages)) == self.total or min(pages) < 1 or max(pages) > self.total:
            raise RuntimeError(f"{len(used)} used and {len(self._free)} free are not all {self.total} pages, each once")


@dataclass(frozen=True)
class CacheLayout:
    """What the cache keeps of a token: in each of `layers` layers, one array of each of these shapes.

    Keys and values of K heads are ((K, D), (K, D)); a latent with its rotated key (MLA) is ((R + rope,),).
    """

    layers: int
    shapes: tuple[tuple[int, ...], ...]

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """In all layers."""
        return self.layers * sum(map(math.prod, self.shapes)) * dtype.itemsize

    def allocate(self, slots: int, dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, ...]]:
        """The memory of a pool: for each layer a tensor [slots, *shape] of each shape, slots = pages * page_size.

        Zeroed, so that page 0, which padding reads before anything was written there, holds numbers.
        """
        return [
            tuple(torch.zeros(slots, *shape, dtype=dtype, device=device) for shape in self.shapes)
            for _ in range(self.layers)
        ]
