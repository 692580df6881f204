"""Progressive shrinking: one network whose parts are networks of many sizes.

Once-for-All (Cai et al., 2020, arXiv:1908.09791) trains a super-net for images once; every smaller
network is a slice of its weights that needs no training of its own. Training goes from the whole
network to sub-networks of less depth, then of less width too, each taught by the whole one.
DynaBERT (Hou et al., 2020, arXiv:2004.04037) does it for BERT, narrowing heads and feed-forward
layers. All weights train: this is no method of parameter-efficient fine-tuning.

It works on models with one list `blocks`, whose blocks have a `MultiHeadAttention` called
`attention` and a `FeedForward` called `ffn`: BERT, RoBERTa, DistilBERT, GPT and GPT-2 here.
"""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from llm_anatomy.attention import MultiHeadAttention
from llm_anatomy.feedforward import FeedForward


@dataclass(frozen=True, kw_only=True)
class Size:
    """A sub-network: the first blocks, and of each block the first heads and feed-forward units."""

    n_layers: int
    n_heads: int
    d_ff: int


@dataclass(frozen=True)
class Space:
    """All sizes with one of these depths, numbers of heads and feed-forward widths.

    Raises:
        ValueError: one of the three is empty, or holds a number twice or below 1.
    """

    n_layers: tuple[int, ...]
    n_heads: tuple[int, ...]
    d_ff: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if not values or len(set(values)) < len(values) or min(values) < 1:
                raise ValueError(
                    f"{field.name} must hold different numbers of at least 1, got {values}"
                )

    def __iter__(self) -> Iterator[Size]:
        """Every size, those of the first depth first."""
        for n_layers, n_heads, d_ff in itertools.product(self.n_layers, self.n_heads, self.d_ff):
            yield Size(n_layers=n_layers, n_heads=n_heads, d_ff=d_ff)

    def sample(self, generator: torch.Generator) -> Size:
        """Draw each of the three on its own, all its values equally likely."""

        def pick(values: tuple[int, ...]) -> int:
            return values[int(torch.randint(len(values), (), generator=generator))]

        return Size(n_layers=pick(self.n_layers), n_heads=pick(self.n_heads), d_ff=pick(self.d_ff))

    def stages(self) -> list["Space"]:
        """The whole network alone, then every depth, then every width too: each holds the last."""
        heads, d_ff = (max(self.n_heads),), (max(self.d_ff),)
        return [
            Space((max(self.n_layers),), heads, d_ff),
            Space(self.n_layers, heads, d_ff),
            self,
        ]


@dataclass(frozen=True)
class Importance:
    """How much the heads and the feed-forward units of one block matter, in any unit."""

    heads: Float[Tensor, " H"]
    units: Float[Tensor, " F"]


def full_size(model: nn.Module) -> Size:
    """The size of the whole network.

    Raises:
        ValueError: the model has no blocks of the kind that can be cut, or they differ in size.
    """
    _, blocks = _stack(model)
    sizes = {(_n_heads(b.attention), b.ffn.up_proj.out_features) for b in blocks}
    if len(sizes) > 1:
        raise ValueError(f"the blocks differ in heads and width: {sorted(sizes)}")
    n_heads, d_ff = sizes.pop()
    return Size(n_layers=len(blocks), n_heads=n_heads, d_ff=d_ff)


# --- What matters comes first --------------------------------------------------------------------


@torch.no_grad()
def magnitude(model: nn.Module) -> list[Importance]:
    """The sum of absolute weights through which a head or a unit speaks, for each block.

    Once-for-All sorts channels by this L1 norm (arXiv:1908.09791, section 3.3).
    """
    return _by_block(model, lambda weight: weight.abs())


def sensitivity(
    model: nn.Module, loss_of: Callable[[nn.Module, Any], Tensor], batches: Sequence[Any]
) -> list[Importance]:
    """How much the loss would change, to first order, if a head or a unit were switched off.

    Each head and each unit gets a gate that multiplies what it says; the importance is the absolute
    derivative of the loss by the gate at 1, averaged over the batches (Michel et al., 2019,
    arXiv:1905.10650, and DynaBERT). The gate's derivative is the sum of weight times gradient over
    the weights that it multiplies, so one backward pass gives all of them.

    Raises:
        ValueError: there is no batch, or the weights are frozen.
    """
    if not batches:
        raise ValueError("the importance is measured on at least one batch, got none")
    _, blocks = _stack(model)
    weights = [w for b in blocks for w in (b.attention.o_proj.weight, b.ffn.down_proj.weight)]
    if not all(w.requires_grad for w in weights):
        raise ValueError("the model is frozen: without gradients there is no importance to measure")
    measured = []
    for batch in batches:
        gradients = torch.autograd.grad(loss_of(model, batch), weights)
        gradient_of = dict(zip(weights, gradients, strict=True))
        measured.append(_by_block(model, lambda w, of=gradient_of: w.detach() * of[w], torch.abs))
    return [
        Importance(
            torch.stack([i.heads for i in block]).mean(dim=0),
            torch.stack([i.units for i in block]).mean(dim=0),
        )
        for block in zip(*measured, strict=True)
    ]


@torch.no_grad()
def reorder(model: nn.Module, importance: Sequence[Importance]) -> None:
    """Put the most important heads and units of each block first, in place.

    A block sums over its heads and over its units, so their order is nothing that its output could
    depend on: the model computes the same function. Its prefixes become better sub-networks.

    Raises:
        ValueError: there is not one importance for each block, head and unit.
    """
    _, blocks = _stack(model)
    size = full_size(model)
    expected = [((size.n_heads,), (size.d_ff,))] * size.n_layers
    shapes = [(tuple(i.heads.shape), tuple(i.units.shape)) for i in importance]
    if shapes != expected:
        raise ValueError(f"expected heads and units of the shapes {expected}, got {shapes}")
    for block, order in zip(blocks, importance, strict=True):
        attention, ffn = block.attention, block.ffn
        rows = torch.arange(attention.q_proj.out_features).view(size.n_heads, -1)  # (H, E)
        heads = rows[order.heads.cpu().argsort(descending=True, stable=True)].flatten()
        units = order.units.cpu().argsort(descending=True, stable=True)
        for name in ("q_proj", "k_proj", "v_proj"):
            _take(getattr(attention, name), heads, dim=0)
        _take(attention.o_proj, heads, dim=1)
        _take(ffn.up_proj, units, dim=0)
        _take(ffn.down_proj, units, dim=1)


# --- Sub-networks --------------------------------------------------------------------------------


def run(model: nn.Module, size: Size, *args: Any, **kwargs: Any) -> Any:
    """What the sub-network of this size computes, with slices of the model's own weights.

    Gradients reach the slices, so that training any size trains a part of the whole model.

    Raises:
        ValueError: the model has no such size.
    """
    owner, blocks = _stack(model)
    slices = _slices(model, size)
    owner.blocks = blocks[: size.n_layers]
    try:
        return functional_call(model, slices, args, kwargs)
    finally:
        owner.blocks = blocks


@torch.no_grad()
def extract(model: nn.Module, size: Size) -> nn.Module:
    """The sub-network of this size as a model of its own, which shares nothing with the whole.

    Its config says what it is. A checkpoint in the format of transformers cannot hold it when it
    has fewer heads, since there heads always fill the width: keep its `state_dict`.

    Raises:
        ValueError: the model has no such size.
    """
    slices = _slices(model, size)
    small = copy.deepcopy(model)
    owner, blocks = _stack(small)
    owner.blocks = blocks[: size.n_layers]
    for name, tensor in slices.items():
        layer = small.get_submodule(name.rpartition(".")[0])
        setattr(layer, name.rpartition(".")[2], nn.Parameter(tensor.clone()))
        if name.endswith("weight"):
            layer.out_features, layer.in_features = tensor.shape
    for module in small.modules():
        config = getattr(module, "config", None)
        if dataclasses.is_dataclass(config):  # GPT-1's config takes its d_ff from the width
            known = {k: v for k, v in dataclasses.asdict(size).items() if hasattr(config, k)}
            module.config = dataclasses.replace(config, **known)
    return small


def _slices(model: nn.Module, size: Size) -> dict[str, Tensor]:
    """The tensors that the sub-network has smaller: views of the model's, by name."""
    full = full_size(model)
    for field in dataclasses.fields(Size):
        wanted, most = getattr(size, field.name), getattr(full, field.name)
        if not 1 <= wanted <= most:
            raise ValueError(f"{field.name} must lie between 1 and {most}, got {wanted}")
    owner, blocks = _stack(model)
    prefix = next(name for name, module in model.named_modules() if module is owner)
    prefix = f"{prefix}.blocks" if prefix else "blocks"
    slices: dict[str, Tensor] = {}
    for i, block in enumerate(blocks[: size.n_layers]):
        rows = size.n_heads * block.attention.d_head
        for name, layer, n_out, n_in in (
            ("attention.q_proj", block.attention.q_proj, rows, None),
            ("attention.k_proj", block.attention.k_proj, rows, None),
            ("attention.v_proj", block.attention.v_proj, rows, None),
            ("attention.o_proj", block.attention.o_proj, None, rows),
            ("ffn.up_proj", block.ffn.up_proj, size.d_ff, None),
            ("ffn.down_proj", block.ffn.down_proj, None, size.d_ff),
        ):
            slices[f"{prefix}.{i}.{name}.weight"] = layer.weight[:n_out, :n_in]
            if layer.bias is not None:  # one a row: what is summed keeps its bias
                slices[f"{prefix}.{i}.{name}.bias"] = layer.bias[:n_out]
    return slices


def _stack(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that has the blocks, and the blocks."""
    owners = [m for m in model.modules() if isinstance(getattr(m, "blocks", None), nn.ModuleList)]
    if len(owners) != 1 or not len(owners[0].blocks):
        raise ValueError(f"expected one list of blocks called 'blocks', found {len(owners)}")
    for i, block in enumerate(owners[0].blocks):
        attention, ffn = getattr(block, "attention", None), getattr(block, "ffn", None)
        if not isinstance(attention, MultiHeadAttention) or not isinstance(ffn, FeedForward):
            raise ValueError(
                f"block {i} needs a MultiHeadAttention called 'attention' and a FeedForward called "
                f"'ffn'; it has {[name for name, _ in block.named_children()]}"
            )
        layers = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        layers += [ffn.up_proj, ffn.down_proj]
        if not all(type(layer) is nn.Linear for layer in layers):
            kinds = sorted({type(layer).__name__ for layer in layers} - {"Linear"})
            raise ValueError(f"block {i} has {', '.join(kinds)} where a plain Linear can be cut")
        if attention.n_groups != 1:
            raise ValueError(f"block {i} shares keys among heads, which cannot be cut one by one")
    return owners[0], owners[0].blocks


def _n_heads(attention: MultiHeadAttention) -> int:
    return attention.q_proj.out_features // attention.d_head


def _by_block(
    model: nn.Module,
    score: Callable[[Tensor], Tensor],
    finish: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Importance]:
    """The scores of output weights, summed over all that one head or one unit speaks through."""
    found = []
    for block in _stack(model)[1]:
        heads = rearrange(
            score(block.attention.o_proj.weight), "D (H E) -> D H E", E=block.attention.d_head
        )
        units = reduce(score(block.ffn.down_proj.weight), "D F -> F", "sum")
        found.append(Importance(finish(reduce(heads, "D H E -> H", "sum")), finish(units)))
    return found


def _take(layer: nn.Linear, index: Tensor, dim: int) -> None:
    """Reorder the rows (0) of a layer with their biases, or its columns (1)."""
    index = index.to(layer.weight.device)
    layer.weight.copy_(layer.weight.index_select(dim, index))
    if dim == 0 and layer.bias is not None:
        layer.bias.copy_(layer.bias[index])
