"""Five ways to tell attention where a token stands.

Two are vectors added to the embeddings (sinusoidal, learned), one turns queries and keys (rotary),
two add a bias to the scores (ALiBi, T5). Where T queries meet S keys, the queries are the last T.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def sinusoidal(
    T: int, d_model: int, *, base: float = 10_000.0, interleaved: bool = True
) -> Float[Tensor, "T D"]:
    """Sines and cosines of T positions at D/2 frequencies.

    Vaswani et al., 2017 (arXiv:1706.03762), section 3.5. The frequencies fall geometrically from
    1 to nearly 1/base radians a position.

    Args:
        T: positions 0 to T - 1.
        d_model: width, even.
        base: ratio between the fastest and, nearly, the slowest frequency.
        interleaved: sine and cosine of a frequency stand side by side, as in the paper. False puts
            all sines first and then all cosines, as Marian's checkpoints expect.

    Raises:
        ValueError: the width is odd.
    """
    if d_model % 2:
        raise ValueError(f"each frequency takes a sine and a cosine; d_model ({d_model}) is odd")
    pair = torch.arange(0, d_model, 2, dtype=torch.float64)
    angle = torch.arange(T, dtype=torch.float64)[:, None] / base ** (pair / d_model)  # (T, D/2)
    if interleaved:
        table = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)  # (T, D)
    else:
        table = torch.cat((angle.sin(), angle.cos()), dim=-1)  # (T, D)
    return table.float()


class LearnedPositions(nn.Module):
    """One trained vector per position, up to a fixed length.

    Gehring et al., 2017 (arXiv:1705.03122), section 3.1; BERT and GPT-2 have these. There is no
    vector for a position never trained on, so the length is a hard limit.
    """

    def __init__(self, n_positions: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_positions, d_model).normal_(std=0.02))

    def forward(self, T: int, offset: int = 0) -> Float[Tensor, "T D"]:
        """Vectors of the positions from `offset` to `offset + T - 1`.

        Raises:
            ValueError: a position lies beyond the last trained one.
        """
        if offset < 0 or offset + T > len(self.weight):
            raise ValueError(
                f"positions {offset} to {offset + T - 1} were asked for, "
                f"but the context holds {len(self.weight)} positions"
            )
        return self.weight[offset : offset + T]


def rope_angles(
    positions: Int[Tensor, "*B T"], d_head: int, base: float = 10_000.0
) -> tuple[Float[Tensor, "*B T E"], Float[Tensor, "*B T E"]]:
    """Cosine and sine of position times frequency, for rotary embeddings.

    Su et al., 2021 (arXiv:2104.09864), equation 34. Each of the E/2 frequencies appears twice, in
    both halves, as `rope_rotate` wants it. Positions may differ among the rows of a batch: with
    (B, 1, T) the angles fit (B, H, T, E).

    Raises:
        ValueError: the width of a head is odd.
    """
    if d_head % 2:
        raise ValueError(f"rotary embeddings pair the features up; d_head ({d_head}) is odd")
    pair = torch.arange(0, d_head, 2, device=positions.device).float()
    frequency = 1 / base ** (pair / d_head)  # (E/2,), in radians a position
    angle = positions[..., None].float() * frequency  # (*B, T, E/2)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rope_rotate(
    x: Float[Tensor, "B H T E"], cos: Float[Tensor, "*_ T E"], sin: Float[Tensor, "*_ T E"]
) -> Float[Tensor, "B H T E"]:
    """Rotate the pair (x[i], x[i + E/2]) by its angle: the layout of Hugging Face checkpoints."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def rope_rotate_interleaved(
    x: Float[Tensor, "B H T E"], cos: Float[Tensor, "T E"], sin: Float[Tensor, "T E"]
) -> Float[Tensor, "B H T E"]:
    """Rotate the pair (x[2i], x[2i + 1]) by its angle: the layout of the paper.

    Takes the same `cos` and `sin` as `rope_rotate` and gives the same scores, once the features of
    queries and keys are reordered by `rope_permutation`. Mixing the two layouts breaks both.
    """
    E = x.shape[-1]
    cos, sin = cos[:, : E // 2], sin[:, : E // 2]  # (T, E/2)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def rope_permutation(d_head: int) -> Int[Tensor, " E"]:
    """Order that carries the interleaved layout to the split one.

    With `p = rope_permutation(E)`, `rope_rotate(x[..., p], cos, sin)` equals
    `rope_rotate_interleaved(x, cos, sin)[..., p]`. Applied to the rows of the query and key
    projections, it converts a checkpoint from the paper's layout to that of Hugging Face.

    Raises:
        ValueError: the width of a head is odd.
    """
    if d_head % 2:
        raise ValueError(f"rotary embeddings pair the features up; d_head ({d_head}) is odd")
    return torch.arange(d_head).view(-1, 2).T.flatten()


def alibi_slopes(n_heads: int) -> Float[Tensor, " H"]:
    """How fast each head's score falls with distance, in nats a position.

    Press et al., 2022 (arXiv:2108.12409), section 3: for H = 2^n heads a geometric series from
    2^(-8/H) down to 2^-8. Other numbers of heads take every second slope of the next longer
    series, as in the paper's code.

    Raises:
        ValueError: there is no head.
    """
    if n_heads < 1:
        raise ValueError(f"there must be at least one head, got {n_heads}")
    n = 2 ** math.floor(math.log2(n_heads))
    slopes = 2.0 ** (-8 / n * torch.arange(1, n + 1))
    between = 2.0 ** (-4 / n * torch.arange(1, 2 * (n_heads - n) + 1, 2))
    return torch.cat((slopes, between))


def alibi_bias(n_heads: int, T: int, S: int | None = None) -> Float[Tensor, "1 H T S"]:
    """Minus slope times distance, for keys at or before the query; 0 for keys after it.

    Combine it with a causal mask. Add it to the scores, in nats.

    Raises:
        ValueError: there are fewer keys than queries.
    """
    S = T if S is None else S
    if T > S:
        raise ValueError(f"the {T} queries must be the last of the keys, but there are {S} keys")
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)[None, :]  # (T, S)
    return -alibi_slopes(n_heads)[:, None, None] * distance.clamp(min=0)[None, None]


def relative_position_bucket(
    offset: Int[Tensor, "T S"], *, bidirectional: bool, n_buckets: int = 32, max_distance: int = 128
) -> Int[Tensor, "T S"]:
    """Number the offsets: one bucket each while small, then logarithmically wider ones.

    Raffel et al., 2020 (arXiv:1910.10683), section 2.1, and T5's code.

    Args:
        offset: position of the key minus position of the query.
        bidirectional: half of the buckets are for keys after the query (encoder). Otherwise every
            such key shares the bucket of offset 0, since a causal mask hides it (decoder).
        n_buckets: how many in all.
        max_distance: everything at least this far shares the last bucket.
    """
    after = torch.zeros_like(offset)
    if bidirectional:
        n_buckets //= 2
        after = (offset > 0).long() * n_buckets
        distance = offset.abs()
    else:
        distance = (-offset).clamp(min=0)
    exact = n_buckets // 2
    growth = (distance.float() / exact).clamp(min=1).log() / math.log(max_distance / exact)
    far = (exact + growth * (n_buckets - exact)).long().clamp(max=n_buckets - 1)
    return after + torch.where(distance < exact, distance, far)


class RelativePositionBias(nn.Module):
    """One learned number per bucket and head, added to the scores (T5).

    Raffel et al., 2020 (arXiv:1910.10683), section 2.1. T5 shares one such table among all layers
    of a stack.
    """

    def __init__(
        self, n_heads: int, *, bidirectional: bool, n_buckets: int = 32, max_distance: int = 128
    ) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.n_buckets = n_buckets
        self.max_distance = max_distance
        self.embedding = nn.Embedding(n_buckets, n_heads)

    def forward(self, T: int, S: int) -> Float[Tensor, "1 H T S"]:
        """Bias of S keys for the last T of them as queries, in nats."""
        device = self.embedding.weight.device
        query = torch.arange(S - T, S, device=device)
        offset = torch.arange(S, device=device)[None, :] - query[:, None]  # (T, S)
        bucket = relative_position_bucket(
            offset,
            bidirectional=self.bidirectional,
            n_buckets=self.n_buckets,
            max_distance=self.max_distance,
        )
        return self.embedding(bucket).permute(2, 0, 1)[None]  # (1, H, T, S)
