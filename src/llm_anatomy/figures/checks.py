"""What a figure refuses to draw, and how it says so."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def check_finite(values: Sequence[float] | Tensor, name: str) -> Tensor:
    """Return the values as a detached float tensor.

    Raises:
        ValueError: there are none, or one is NaN or infinite.
    """
    tensor = torch.as_tensor(values).detach().cpu().double()
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty: its shape is {tuple(tensor.shape)}")
    wrong = (~tensor.isfinite()).nonzero()
    if len(wrong):
        where = tuple(wrong[0].tolist())
        raise ValueError(
            f"{name} must be finite, but at index {where} it is {tensor[where].item()}"
        )
    return tensor


def check_weights(weights: Float[Tensor, "*axes"], name: str) -> Tensor:
    """Return attention weights as a detached tensor once each row is known to be a distribution.

    A row that sees nothing is all zeros, which is allowed.

    Raises:
        ValueError: empty, not finite, negative, or a row that sums neither to 1 nor to 0.
    """
    tensor = check_finite(weights, name)
    if tensor.min() < 0:
        raise ValueError(f"{name} must not be negative, the smallest is {tensor.min().item():.3g}")
    sums = tensor.sum(dim=-1)
    wrong = ((sums - 1).abs().minimum(sums.abs()) > 1e-3).nonzero()
    if len(wrong):
        where = tuple(wrong[0].tolist())
        raise ValueError(
            f"each row of {name} must sum to 1 (or to 0 where it sees nothing), "
            f"but row {where} sums to {sums[where].item():.3f}"
        )
    return tensor


def check_tokens(tokens: Sequence[str], n: int, name: str) -> list[str]:
    """Return the tokens as a list.

    Raises:
        ValueError: their number is not `n`.
    """
    if len(tokens) != n:
        raise ValueError(f"{name} has {len(tokens)} tokens for {n} positions")
    return list(tokens)
