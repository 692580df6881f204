"""Masks: who may look at whom."""

import inspect

import pytest
import torch

from llm_anatomy import masks


def loops(T: int, S: int, allowed) -> torch.Tensor:
    """The mask of a rule over absolute positions, by two loops; the queries are the last T."""
    return torch.tensor([[allowed(i, j) for j in range(S)] for i in range(S - T, S)])


@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 5), (3, 7), (1, 6)])
def test_causal_lets_each_query_see_itself_and_the_past(T, S):
    mask = masks.causal(T, S)
    assert mask.shape == (1, 1, T, S)
    assert mask.dtype == torch.bool
    assert torch.equal(mask[0, 0], loops(T, S, lambda i, j: j <= i))


def test_causal_of_one_length_is_square():
    assert torch.equal(masks.causal(4), masks.causal(4, 4))


def test_causal_refuses_more_queries_than_keys():
    with pytest.raises(ValueError, match=r"5 queries .* 3 keys"):
        masks.causal(5, 3)


def test_padding_hides_keys_from_every_query():
    keep = torch.tensor([[True, True, False], [True, False, False]])
    mask = masks.padding(keep)
    assert mask.shape == (2, 1, 1, 3)
    assert torch.equal(mask.expand(2, 4, 5, 3)[:, 2, 3], keep)


@pytest.mark.parametrize("keep", [torch.ones(2, 3), torch.ones(2, dtype=torch.bool)])
def test_padding_refuses_what_is_no_boolean_matrix(keep):
    # The shape checker of the tests would refuse it first: look behind it.
    with pytest.raises(ValueError, match=r"keep must be a boolean \(B, S\)"):
        inspect.unwrap(masks.padding)(keep)


@pytest.mark.parametrize("n", [0, 1, 2, 4, 6])
def test_prefix_is_bidirectional_inside_and_causal_after(n):
    T = 6
    mask = masks.prefix(torch.tensor([n, 3]), T)
    assert mask.shape == (2, 1, T, T)
    assert torch.equal(mask[0, 0], loops(T, T, lambda i, j: j <= i or j < n))
    assert torch.equal(mask[1, 0], loops(T, T, lambda i, j: j <= i or j < 3))


def test_prefix_of_nothing_is_causal_and_of_everything_is_full():
    mask = masks.prefix(torch.tensor([0, 5]), 5)
    assert torch.equal(mask[:1], masks.causal(5))
    assert mask[1].all()


@pytest.mark.parametrize("n", [-1, 5])
def test_prefix_refuses_impossible_lengths(n):
    with pytest.raises(ValueError, match="between 0 and 4"):
        masks.prefix(torch.tensor([n]), 4)


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_sliding_window_sees_itself_and_the_ones_before(window):
    mask = masks.sliding_window(5, window)
    assert torch.equal(mask[0, 0], loops(5, 5, lambda i, j: i - window < j <= i))


def test_sliding_window_of_the_whole_length_is_causal():
    assert torch.equal(masks.sliding_window(5, 5), masks.causal(5))


def test_sliding_window_needs_the_query_itself():
    with pytest.raises(ValueError, match="got 0"):
        masks.sliding_window(3, 0)
