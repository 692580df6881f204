"""A base model in four bits: QLoRA (Dettmers et al., 2023, arXiv:2305.14314).

The weights are frozen, so they may be stored coarsely: each as the nearest of 16 levels, times the
largest absolute value of its block of 64. What is trained beside them, such as LoRA's factors,
stays exact, and gradients pass through the frozen weights to reach it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int8, UInt8
from torch import Tensor, nn

from llm_anatomy.peft.targets import check_count, check_free, check_targets, find, replace

LEVELS = 16  # what four bits tell apart


def nf4_levels() -> Float32[Tensor, "16"]:
    """The levels of the 4-bit NormalFloat, from -1 to 1: quantiles of a normal distribution.

    Eight quantiles above zero, seven below it, and zero itself, which must be exact since padding
    and pruned weights are zero. The outermost probability, the mean of 1 - 1/32 and 1 - 1/30, is
    that of the authors' code; the paper leaves it open.
    """
    outermost = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    above = torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1]
    below = torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1]
    levels = torch.cat((-_quantile(below), torch.zeros(1), _quantile(above).flip(0)))
    return (levels / levels.max()).float()


def uniform_levels() -> Float32[Tensor, "16"]:
    """Sixteen levels at equal distances from -1 to 1: what four bits hold without a thought."""
    return torch.linspace(-1, 1, LEVELS)


def _quantile(p: Tensor) -> Tensor:
    return torch.special.ndtri(p)


@dataclass(frozen=True, kw_only=True)
class QuantisedConfig:
    """QLoRA's choices.

    Args:
        targets: which linear layers are quantised: the last part of a module's name, or more of it.
        block: weights that share one scale, their largest absolute value.
        group: scales that share one scale of their own, in the second quantisation; None keeps
            every scale in 32 bits.

    Raises:
        ValueError: a size is not a whole number of at least 1, or the names are no tuple.
    """

    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    block: int = 64
    group: int | None = 256

    def __post_init__(self) -> None:
        check_targets("targets", self.targets)
        check_count("block", self.block)
        if self.group is not None:
            check_count("group", self.group)


def bits_per_weight(block: int = 64, group: int | None = 256) -> float:
    """Bits that a weight takes, its share of the scales included; the one mean is not counted."""
    scale = 32 if group is None else 8 + 32 / group
    return 4 + scale / block


@dataclass(frozen=True)
class Quantised:
    """A tensor in four bits a value. Its fields are what is stored.

    Without a second quantisation `scales` holds 32-bit numbers and the last two fields are None.
    """

    shape: tuple[int, ...]
    block: int
    levels: Float32[Tensor, "16"]
    codes: UInt8[Tensor, " N"]
    scales: Int8[Tensor, " S"] | Float32[Tensor, " S"]
    group: int | None = None
    group_scales: Float32[Tensor, " U"] | None = None
    mean: Float32[Tensor, ""] | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes stored for this tensor; the 16 levels are the same for all."""
        parts = (self.codes, self.scales, self.group_scales, self.mean)
        return sum(p.numel() * p.element_size() for p in parts if p is not None)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "..."]:
        """The tensor again, as near as its levels come."""
        values = self.levels[unpack(self.codes, math.prod(self.shape)).long()]  # (n,)
        scale = self.absmax().repeat_interleave(self.block)[: len(values)]  # (n,)
        return (values * scale).view(self.shape).to(dtype)

    def absmax(self) -> Float32[Tensor, " S"]:
        """The scale of each block."""
        if self.group_scales is None:
            return self.scales
        scale = self.group_scales.repeat_interleave(self.group)[: len(self.scales)]
        return (self.scales * scale / 127 + self.mean).clamp(min=0)


def quantise(
    weight: Float[Tensor, "..."],
    *,
    levels: Float32[Tensor, "16"] | None = None,
    block: int = 64,
    group: int | None = 256,
) -> Quantised:
    """Round every value to the nearest level, times the largest absolute value of its block.

    Blocks run along the rows of the flattened tensor, and the last may be shorter. With a `group`
    the scales, less their mean, are rounded to 8 bits themselves (double quantisation, section 3).
    They are spaced evenly here; the authors' code takes an 8-bit floating-point format.

    Args:
        weight: any tensor.
        levels: 16 of them, rising from -1 to 1; those of NF4 unless given.
        block: values that share one scale.
        group: scales that share one scale of their own, or None.

    Raises:
        ValueError: the tensor is empty or not finite, or its values are too large for 32 bits; the
            levels are not 16 or do not rise from -1 to 1; or a size is not a whole number of at
            least 1.
    """
    levels = nf4_levels() if levels is None else levels
    if levels.shape != (LEVELS,):
        raise ValueError(f"there must be {LEVELS} levels, got a tensor of {tuple(levels.shape)}")
    if (levels.diff() <= 0).any() or levels[0] != -1 or levels[-1] != 1:
        raise ValueError(f"the levels must rise from -1 to 1, got {levels.tolist()}")
    check_count("block", block)
    if group is not None:
        check_count("group", group)
    if not weight.numel():
        raise ValueError(f"a tensor of shape {tuple(weight.shape)} has nothing to quantise")
    if not weight.isfinite().all():
        raise ValueError("the tensor holds values that are not finite")
    if not (weight.detach().abs().amax().float() * weight.numel() * 127).isfinite():
        raise ValueError("the tensor holds values whose sums are too large for 32 bits")
    levels = levels.to(weight.device)
    flat = weight.detach().float().flatten()
    absmax = _blocks(flat, block).abs().amax(dim=1)  # (S,)
    scale = absmax.clamp(min=torch.finfo(torch.float32).tiny).repeat_interleave(block)[: len(flat)]
    middles = (levels[1:] + levels[:-1]) / 2
    codes = pack(torch.bucketize(flat / scale, middles).to(torch.uint8))
    shape = tuple(weight.shape)
    if group is None:
        return Quantised(shape, block, levels, codes, absmax)
    mean = absmax.mean()
    rest = absmax - mean
    group_scales = _blocks(rest, group).abs().amax(dim=1)  # (U,)
    step = group_scales.clamp(min=torch.finfo(torch.float32).tiny).repeat_interleave(group)
    scales = (rest / step[: len(rest)] * 127).round().to(torch.int8)
    return Quantised(shape, block, levels, codes, scales, group, group_scales, mean)


def _blocks(flat: Tensor, size: int) -> Tensor:
    """Cut a vector into rows, the last of them filled up with zeros."""
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def pack(codes: UInt8[Tensor, " N"]) -> UInt8[Tensor, " M"]:
    """Put two codes below 16 into each byte, the first into its upper half."""
    pairs = F.pad(codes, (0, len(codes) % 2)).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def unpack(packed: UInt8[Tensor, " M"], n: int) -> UInt8[Tensor, " N"]:
    """The first n codes again."""
    return torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:n]


class _Product(torch.autograd.Function):
    """x @ weight.T, which keeps the four bits for the backward pass and not the weight."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "QuantisedLinear") -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantise(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantise(gradient.dtype), None


class QuantisedLinear(nn.Module):
    """A linear layer whose weight is frozen in four bits; its bias, if any, is kept and frozen.

    Gradients pass to what comes before it, never to itself.
    """

    def __init__(self, linear: nn.Linear, block: int = 64, group: int | None = 256) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        stored = quantise(linear.weight, block=block, group=group)
        self.block, self.group = block, group
        self.dtype = linear.weight.dtype
        self.train(linear.training)
        for name in ("levels", "codes", "scales", "group_scales", "mean"):
            self.register_buffer(name, getattr(stored, name), persistent=name != "levels")
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.trained = {n: p.requires_grad for n, p in linear.named_parameters()}  # before

    @property
    def stored(self) -> Quantised:
        """The weight as it is stored."""
        shape = (self.out_features, self.in_features)
        scales = (self.scales, self.group, self.group_scales, self.mean)
        return Quantised(shape, self.block, self.levels, self.codes, *scales)

    @property
    def weight(self) -> Float[Tensor, "O I"]:
        """The weight in its old precision, made anew: models ask for its type or its device."""
        return self.dequantise(self.dtype)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "O I"]:
        """The weight that the layer computes with."""
        return self.stored.dequantise(dtype)

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits=4"


def quantise_base(model: nn.Module, config: QuantisedConfig) -> list[str]:
    """Put linear layers of a model into four bits, in place, before a method is put on it.

    Returns:
        The names of the layers.

    Raises:
        ValueError: the model carries a method already, a name finds nothing, or what it finds is no
            linear layer, is in four bits already, or shares its weight with another module. The
            model is unchanged then.
    """
    check_free(model, "a quantised base")
    found = find(model, config.targets)
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[p] = owners.get(p, 0) + 1
    for name, module in found.items():
        if isinstance(module, QuantisedLinear):
            raise ValueError(f"{name} is in four bits already")
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name} is a {type(module).__name__}, not a linear layer")
        if owners[module.weight] > 1:
            raise ValueError(f"{name} shares its weight with another module")
    made = {n: QuantisedLinear(m, config.block, config.group) for n, m in found.items()}
    for name, module in made.items():
        replace(model, name, module)
    return [*made]


def restore_base(model: nn.Module) -> list[str]:
    """Give every layer in four bits an ordinary weight again: the rounded one, all that is left.

    It has its old precision, and trains if it did.

    Returns:
        The names of the layers.

    Raises:
        ValueError: the model carries a method, or no layer in four bits.
    """
    check_free(model, "full precision")
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    if not found:
        raise ValueError("the model has no layer in four bits")
    for name, layer in found.items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight = nn.Parameter(layer.weight)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach())
        for part, p in linear.named_parameters():
            p.requires_grad_(layer.trained[part])
        replace(model, name, linear.train(layer.training))
    return [*found]
