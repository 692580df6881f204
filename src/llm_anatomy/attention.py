"""Scaled dot-product and multi-head attention.

Dimensions, here and in every module of the package:

    B  batch            H  query heads        D  model width (d_model)
    T  query positions  G  key/value heads    E  width of one head (d_head)
    S  key positions    V  vocabulary         F  feed-forward width (d_ff)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llm_anatomy.cache import KVCache

Rotate = Callable[[Tensor], Tensor]


def scaled_dot_product_attention(
    q: Float[Tensor, "B H T E"],
    k: Float[Tensor, "B H S E"],
    v: Float[Tensor, "B H S M"],
    mask: Bool[Tensor, "#B #H #T #S"] | None = None,
    bias: Float[Tensor, "#B #H #T #S"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H T M"], Float[Tensor, "B H T S"]]:
    """Average the values, weighted by how well each key matches the query.

    Vaswani et al., 2017 (arXiv:1706.03762), equation 1, extended by an additive bias. This is the
    function the course derives, and the reference for the fused kernel in `MultiHeadAttention`.

    Args:
        q: queries.
        k: keys, as wide as the queries.
        v: values; they may have a width of their own.
        mask: True where a query may look at a key.
        bias: added to the scores before the softmax, in nats (ALiBi, T5's relative bias).
        scale: multiplies the scores; 1/sqrt(E) unless given. T5 passes 1.0.

    Returns:
        The output, and the weights, whose rows sum to 1, or to 0 where the mask forbids every key.

    Raises:
        ValueError: the shapes do not fit together, or the mask is not boolean.
    """
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"queries have width {q.shape[-1]}, keys {k.shape[-1]}: they must agree")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"there are {k.shape[-2]} keys but {v.shape[-2]} values")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"the mask must be boolean, True = may look; it is {mask.dtype}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.mT * scale  # (B, H, T, S)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)  # a row of -inf softmaxes to nan
    return weights @ v, weights


class MultiHeadAttention(nn.Module):
    """Attention in H subspaces at once, with G <= H key/value heads.

    G = H is multi-head (Vaswani et al., 2017, arXiv:1706.03762), G = 1 multi-query (Shazeer, 2019,
    arXiv:1911.02150), anything between grouped-query attention (Ainslie et al., 2023,
    arXiv:2305.13245): query heads i * H/G to (i + 1) * H/G - 1 share key/value head i.

    Args:
        d_model: width D of what comes in and goes out.
        n_heads: query heads H.
        n_kv_heads: key/value heads G, H unless given.
        d_head: width E of one head, D/H unless given (T5-11B differs).
        bias: whether the four projections have bias terms.
        scale: multiplies the scores, 1/sqrt(E) unless given.
        dropout: share of the attention weights that are dropped in training.

    Raises:
        ValueError: the heads do not divide the width, or the groups the heads.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        bias: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_heads ({n_heads}) must be a multiple of n_kv_heads ({n_kv_heads})")
        if d_head is None and d_model % n_heads:
            raise ValueError(f"d_model ({d_model}) must be a multiple of n_heads ({n_heads})")
        self.d_model = d_model
        self.d_head = d_model // n_heads if d_head is None else d_head
        self.n_groups = n_heads // n_kv_heads
        self.scale = scale
        self.dropout = dropout
        self.q_proj = nn.Linear(d_model, n_heads * self.d_head, bias=bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.d_head, bias=bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.d_head, bias=bias)
        self.o_proj = nn.Linear(n_heads * self.d_head, d_model, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        context: Float[Tensor, "B C D"] | None = None,
        *,
        mask: Bool[Tensor, "#B #H #T #S"] | None = None,
        bias: Float[Tensor, "#B #H #T #S"] | None = None,
        rotate: Rotate | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend from `x` to `context`, or to `x` itself, with a fused kernel.

        Args:
            x: where the queries come from.
            context: where keys and values come from; `x` unless given (self-attention).
            mask: True where a query may look at a key.
            bias: added to the scores, in nats.
            rotate: turns queries and keys before they meet (rotary embeddings).
            cache: holds earlier keys and values; those of `context` are appended, and the queries
                look at all of them. An empty context (C = 0) adds nothing and costs nothing, so
                that cross-attention reads its memory once.

        Raises:
            ValueError: a width differs from d_model, or batches differ.
        """
        context = self._context(x, context)
        q = self._heads(self.q_proj(x), rotate)  # (B, H, T, E)
        if cache and context.shape[1] == 0:
            k, v = cache.held()
        else:
            k = self._heads(self.k_proj(context), rotate)  # (B, G, C, E)
            v = self._heads(self.v_proj(context))
            if cache is not None:
                k, v = cache.append(k, v)  # (B, G, S, E)
        allowed = mask
        if bias is not None:
            allowed = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=allowed,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=self.n_groups > 1,
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)

    def weights(
        self,
        x: Float[Tensor, "B T D"],
        context: Float[Tensor, "B C D"] | None = None,
        *,
        mask: Bool[Tensor, "#B #H #T #S"] | None = None,
        bias: Float[Tensor, "#B #H #T #S"] | None = None,
        rotate: Rotate | None = None,
    ) -> Float[Tensor, "B H T S"]:
        """The weights that `forward` uses without dropout, for looking at; rows sum to 1 (or 0)."""
        context = self._context(x, context)
        q = self._heads(self.q_proj(x), rotate)
        k = repeat(
            self._heads(self.k_proj(context), rotate), "B G S E -> B (G n) S E", n=self.n_groups
        )
        v = repeat(self._heads(self.v_proj(context)), "B G S E -> B (G n) S E", n=self.n_groups)
        return scaled_dot_product_attention(q, k, v, mask, bias, self.scale)[1]

    def _context(self, x: Tensor, context: Tensor | None) -> Tensor:
        """What keys and values come from, once it is known to fit."""
        context = x if context is None else context
        for name, t in (("x", x), ("context", context)):
            if t.ndim != 3 or t.shape[-1] != self.d_model:
                raise ValueError(
                    f"{name} must have shape (batch, positions, {self.d_model}), "
                    f"got {tuple(t.shape)}"
                )
        if x.shape[0] != context.shape[0]:
            raise ValueError(f"x has batch {x.shape[0]}, context {context.shape[0]}")
        return context

    def _heads(self, x: Tensor, rotate: Rotate | None = None) -> Tensor:
        """From (B, T, H * E) to (B, H, T, E). PyTorch's own functions: einops takes longer."""
        x = x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)
        return x if rotate is None else rotate(x)
