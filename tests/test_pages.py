"""The page pool: every page has one owner, whatever is allocated, freed or wrongly freed.

pytest tests/test_pages.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.pages import CacheLayout, PagePool
from errors import UserError


def test_a_pool_hands_out_every_page_but_0_once():
    pool = PagePool(8, 4)
    assert (pool.total, pool.free_pages) == (7, 7)
    pages = pool.allocate(3) + pool.allocate(4)
    assert sorted(pages) == [1, 2, 3, 4, 5, 6, 7]
    assert pool.free_pages == 0
    pool.free(pages)
    assert sorted(pool.allocate(7)) == sorted(pages)


def test_asking_for_too_many_takes_nothing():
    pool = PagePool(4, 4)
    held = pool.allocate(2)
    with pytest.raises(MemoryError, match="2 pages wanted, 1 of 3 free"):
        pool.allocate(2)
    assert pool.free_pages == 1
    assert sorted(held + pool.allocate(1)) == [1, 2, 3]


def test_nothing_is_allocated_for_nothing():
    pool = PagePool(4, 4)
    assert pool.allocate(0) == []
    assert pool.free_pages == 3


@pytest.mark.parametrize("bad", [0, -1, 6, 7], ids=["padding page", "negative", "free page", "beyond the pool"])
@pytest.mark.parametrize("first", [True, False])
def test_a_wrong_free_raises_and_frees_nothing(bad: int, first: bool):
    pool = PagePool(7, 4)
    pages = pool.allocate(6)
    pool.free([6])
    pages.remove(6)
    with pytest.raises(ValueError, match=f"page {bad} is not in use"):
        pool.free([bad, *pages] if first else [*pages, bad])
    assert pool.free_pages == 1
    pool.free(pages)  # they were still in use
    assert pool.free_pages == 6


def test_a_double_free_raises():
    pool = PagePool(7, 4)
    pages = pool.allocate(3)
    with pytest.raises(ValueError, match="twice"):
        pool.free([pages[0], pages[1], pages[0]])
    assert pool.free_pages == 3
    pool.free(pages)
    with pytest.raises(ValueError, match="not in use"):
        pool.free(pages)
    assert pool.free_pages == 6


@pytest.mark.parametrize("tokens, pages", [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (160, 10)])
def test_pages_for(tokens: int, pages: int):
    assert PagePool(2, 16).pages_for(tokens) == pages


@pytest.mark.parametrize("pages", [-1, 0, 1])
def test_a_pool_without_a_usable_page_is_refused(pages: int):
    with pytest.raises(UserError, match=f"{pages} pages of 16 tokens"):
        PagePool(pages, 16)


# a step: allocate so many, or give back one of the allocations that are held
Steps = st.lists(st.one_of(st.integers(0, 12), st.floats(0, 0.999)), max_size=60)


@settings(max_examples=100, derandomize=True)
@given(st.integers(2, 30), Steps)
def test_random_traffic_conserves_pages(size: int, steps: list[int | float]):
    pool, held = PagePool(size, 4), []
    for step in steps:
        if isinstance(step, float):
            if held:
                pool.free(held.pop(int(step * len(held))))
        elif step > pool.free_pages:
            with pytest.raises(MemoryError):
                pool.allocate(step)
        else:
            held.append(pool.allocate(step))
            assert len(held[-1]) == step
        owned = [page for pages in held for page in pages]
        assert len(owned) == len(set(owned)), "a page has two owners"
        assert all(0 < page < size for page in owned)
        assert len(owned) + pool.free_pages == pool.total == size - 1
    for pages in held:
        pool.free(pages)
    assert sorted(pool.allocate(pool.total)) == list(range(1, size))


@pytest.mark.parametrize("shapes", [((2, 5), (2, 5)), ((24,),)], ids=["keys and values", "latent"])
def test_the_cache_is_zeroed_and_each_layer_has_its_own(shapes: tuple):
    cache = CacheLayout(3, shapes).allocate(8, torch.bfloat16, torch.device("cpu"))
    tensors = [t for layer in cache for t in layer]
    assert len(cache) == 3 and len({t.data_ptr() for t in tensors}) == 3 * len(shapes)
    for layer in cache:
        assert [t.shape for t in layer] == [(8, *shape) for shape in shapes]
        assert all(t.dtype == torch.bfloat16 and not t.any() for t in layer)


def test_bytes_per_token():
    assert CacheLayout(3, ((2, 5), (2, 4))).bytes_per_token(torch.float32) == 3 * (10 + 8) * 4
    assert CacheLayout(61, ((512 + 64,),)).bytes_per_token(torch.bfloat16) == 61 * 1152
