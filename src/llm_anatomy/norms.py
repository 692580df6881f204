"""Normalisation over the model width, each position on its own."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """Subtract the mean, divide by the standard deviation, then scale and shift.

    Ba et al., 2016 (arXiv:1607.06450). The variance is the biased one (divided by D), and `eps` is
    added to it, inside the root. Equal to `torch.nn.LayerNorm`, which the models use.
    """

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Float[Tensor, "*_ D"]) -> Float[Tensor, "*_ D"]:
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias


class RMSNorm(nn.Module):
    """Divide by the root mean square, then scale; no mean is subtracted and nothing is shifted.

    Zhang and Sennrich, 2019 (arXiv:1910.07467). Computed in float32 for narrower types, as LLaMA
    and T5 do, so that the squares cannot overflow.
    """

    def __init__(self, d_model: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Float[Tensor, "*_ D"]) -> Float[Tensor, "*_ D"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(dim=-1, keepdim=True).add(self.eps).rsqrt()
        return self.weight * (wide * scale).to(x.dtype)
