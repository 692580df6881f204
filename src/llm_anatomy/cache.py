"""Keys and values already computed, so that a decoder reads one new token at a time."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


class KVCache:
    """The keys and values of one attention layer, from the first position to the last one seen.

    Without a capacity the cache grows by concatenation, which autograd can follow; this is what
    prefix tuning needs. With a capacity, memory for that many positions is taken once and then
    written in place: no copying as the sequence grows, for inference only.

    Args:
        capacity: positions that fit, or None for no limit.

    Raises:
        ValueError: the capacity is not positive.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"a cache needs room for at least one position, got {capacity}")
        self.capacity = capacity
        self.length = 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def __len__(self) -> int:
        return self.length

    def held(self) -> tuple[Float[Tensor, "B G S E"], Float[Tensor, "B G S M"]]:
        """All keys and values so far, of a cache that is not empty."""
        return self.k.narrow(2, 0, self.length), self.v.narrow(2, 0, self.length)

    def append(
        self, k: Float[Tensor, "B G T E"], v: Float[Tensor, "B G T M"]
    ) -> tuple[Float[Tensor, "B G S E"], Float[Tensor, "B G S M"]]:
        """Add T positions and return all S of them.

        Raises:
            ValueError: the positions do not fit, or their batch, heads or width differ from those
                that the cache holds. The cache is unchanged then.
        """
        T = k.shape[2]
        if self.k is not None:
            for name, new, held in (("keys", k, self.k), ("values", v, self.v)):
                B, G, _, E = held.shape
                if new.shape != (B, G, T, E):
                    raise ValueError(
                        f"the cache holds {name} of batch {B}, {G} heads and width {E}, "
                        f"but got shape {tuple(new.shape)}"
                    )
            if T == 0:  # cross-attention, after its first step: nothing to copy
                return self.held()
        if self.capacity is None:
            self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
            self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
            self.length += T
            return self.k, self.v
        if self.length + T > self.capacity:
            raise ValueError(
                f"the cache is full: {self.length} of {self.capacity} positions are taken, "
                f"{T} more do not fit"
            )
        if self.k is None:
            self.k = k.new_empty(*k.shape[:2], self.capacity, k.shape[3])
            self.v = v.new_empty(*v.shape[:2], self.capacity, v.shape[3])
        self.k.narrow(2, self.length, T).copy_(k)
        self.v.narrow(2, self.length, T).copy_(v)
        self.length += T
        return self.held()

    def reorder(self, rows: Int[Tensor, " K"]) -> None:
        """Go on with these rows of the batch, in this order; a row may be taken twice.

        This is what beam search does to a cache when it drops one beginning for another.
        """
        if self.k is not None:
            self.k, self.v = self.k[rows], self.v[rows]
