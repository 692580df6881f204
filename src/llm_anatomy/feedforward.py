"""Position-wise feed-forward layers: what happens at each position between two attentions."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]

gelu_tanh: Activation = partial(F.gelu, approximate="tanh")
"""The tanh approximation of GELU, as GPT-2 has it; `F.gelu` is the exact one, as BERT has it."""


class FeedForward(nn.Module):
    """Widen, apply a nonlinearity, narrow: W2 f(W1 x).

    Vaswani et al., 2017 (arXiv:1706.03762), section 3.3, where f is ReLU; GPT and BERT use GELU.
    T5 and BART drop a share `dropout` of the widened features in training.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: Activation,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.dropout = dropout
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "*_ D"]) -> Float[Tensor, "*_ D"]:
        wide = self.activation(self.up_proj(x))
        return self.down_proj(F.dropout(wide, self.dropout, self.training))


class GatedFeedForward(nn.Module):
    """One projection gates another: W2 (f(Wg x) * W1 x).

    Shazeer, 2020 (arXiv:2002.05202). The activation names the variant: sigmoid gives GLU, GELU
    gives GEGLU (T5 v1.1), SiLU gives SwiGLU (LLaMA). A share `dropout` of the product is dropped in
    training.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: Activation,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.dropout = dropout
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "*_ D"]) -> Float[Tensor, "*_ D"]:
        wide = self.activation(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(F.dropout(wide, self.dropout, self.training))
