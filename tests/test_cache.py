"""The cache returns what was put in, in order, and refuses what does not fit."""

import pytest
import torch

from llm_anatomy.cache import KVCache

B, G, E, M = 2, 3, 5, 7


def some(T: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, G, T, E), torch.randn(B, G, T, M)


@pytest.mark.parametrize("capacity", [None, 6, 10])
@pytest.mark.parametrize("pieces", [(6,), (1, 1, 4), (2, 0, 3, 1)])
def test_pieces_come_back_as_one(capacity, pieces):
    cache = KVCache(capacity)
    k, v = some(6)
    at = 0
    for n in pieces:
        all_k, all_v = cache.append(k[:, :, at : at + n], v[:, :, at : at + n])
        at += n
        assert len(cache) == at
        assert torch.equal(all_k, k[:, :, :at])
        assert torch.equal(all_v, v[:, :, :at])


def test_capacity_writes_in_place():
    cache = KVCache(4)
    first, _ = cache.append(*some(1))
    second, _ = cache.append(*some(2))
    assert first.data_ptr() == second.data_ptr()


def test_growing_cache_carries_gradients():
    cache = KVCache()
    k, v = some(2)
    k.requires_grad_()
    cache.append(k, v)
    all_k, _ = cache.append(*some(3))
    all_k.sum().backward()
    assert torch.equal(k.grad, torch.ones_like(k))


@pytest.mark.parametrize("capacity", [None, 9])
def test_held_is_what_was_appended_last(capacity):
    cache = KVCache(capacity)
    for T in (4, 1):
        added = cache.append(torch.randn(2, 3, T, 5), torch.randn(2, 3, T, 7))
        for a, b in zip(added, cache.held(), strict=True):
            assert torch.equal(a, b) and a.data_ptr() == b.data_ptr()


def test_full_cache_refuses_and_keeps_what_it_has():
    cache = KVCache(3)
    k, v = some(2)
    cache.append(k, v)
    with pytest.raises(ValueError, match="full: 2 of 3 positions are taken, 2 more"):
        cache.append(*some(2))
    assert len(cache) == 2
    assert torch.equal(cache.append(*some(1))[0][:, :, :2], k)


@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("shape", [(B + 1, G, 1, E), (B, G + 1, 1, E), (B, G, 1, E + 1)])
def test_other_shapes_are_refused(capacity, shape):
    cache = KVCache(capacity)
    cache.append(*some(2))
    with pytest.raises(ValueError, match="the cache holds keys of batch 2, 3 heads and width 5"):
        cache.append(torch.randn(shape), torch.randn(*shape[:3], M))
    assert len(cache) == 2


@pytest.mark.parametrize("capacity", [0, -1])
def test_capacity_must_be_positive(capacity):
    with pytest.raises(ValueError, match="at least one position"):
        KVCache(capacity)


@pytest.mark.parametrize("capacity", [None, 9])
def test_adding_nothing_copies_nothing(capacity):
    """Cross-attention adds nothing for each new token, to a memory that may be long."""
    cache = KVCache(capacity)
    first, _ = cache.append(*some(4))
    again, values = cache.append(*some(0))
    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(again, first) and values.shape == (B, G, 4, M) and len(cache) == 4
