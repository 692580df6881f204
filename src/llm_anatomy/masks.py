"""Boolean attention masks: True where a query may look at a key. Combine them with `&`.

Dimensions: B batch, T queries, S keys. Every mask broadcasts to (B, H, T, S).
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def causal(
    T: int, S: int | None = None, *, device: torch.device | str | None = None
) -> Bool[Tensor, "1 1 T S"]:
    """Let each query see itself and everything before it.

    Args:
        T: number of queries; they are the last T of the S positions.
        S: number of keys, T unless given. S > T when a cache holds the S - T positions before.
        device: where the mask is made.

    Raises:
        ValueError: T is negative, or there are fewer keys than queries.
    """
    S = T if S is None else S
    if T < 0 or T > S:
        raise ValueError(f"the {T} queries must be the last of the keys, but there are {S} keys")
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]


def padding(keep: Bool[Tensor, "B S"]) -> Bool[Tensor, "B 1 1 S"]:
    """Hide the padded keys from every query.

    Args:
        keep: True at real tokens, False at padding.

    Raises:
        ValueError: `keep` is not a boolean (B, S).
    """
    if keep.dtype != torch.bool or keep.ndim != 2:
        raise ValueError(
            f"keep must be a boolean (B, S), True at real tokens; "
            f"it is {keep.dtype} of shape {tuple(keep.shape)}"
        )
    return keep[:, None, None, :]


def prefix(n_prefix: Int[Tensor, " B"], T: int) -> Bool[Tensor, "B 1 T T"]:
    """Let the first positions see each other both ways, and make the rest causal.

    The mask of a prefix language model (Raffel et al., 2020, arXiv:1910.10683, figure 4). A prefix
    of length 0 or 1 is a causal decoder, a prefix of length T an encoder.

    Args:
        n_prefix: length of each sequence's prefix, between 0 and T.
        T: number of positions.

    Raises:
        ValueError: a prefix is negative or longer than the sequence.
    """
    if n_prefix.numel() and (n_prefix.min() < 0 or n_prefix.max() > T):
        raise ValueError(f"prefix lengths must lie between 0 and {T}, got {n_prefix.tolist()}")
    in_prefix = torch.arange(T, device=n_prefix.device) < n_prefix[:, None]  # (B, T)
    return causal(T, device=n_prefix.device) | in_prefix[:, None, None, :]


def sliding_window(
    T: int, window: int, *, device: torch.device | str | None = None
) -> Bool[Tensor, "1 1 T T"]:
    """Let each query see itself and the `window - 1` positions before it.

    Beltagy et al., 2020 (arXiv:2004.05150), in its causal form. A window of T is `causal(T)`.

    Raises:
        ValueError: the window is smaller than 1.
    """
    if window < 1:
        raise ValueError(f"the window must hold at least the query itself, got {window}")
    near = torch.ones(T, T, dtype=torch.bool, device=device).triu(1 - window)
    return causal(T, device=device) & near
