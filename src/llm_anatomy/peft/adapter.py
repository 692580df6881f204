"""Bottleneck adapters (Houlsby et al., 2019, arXiv:1902.00751): a small network after a layer.

    y = h + W_up f(W_down h),   h = W x + b, the output of the layer

The two matrices start near zero, so that the model starts near the base. The nonlinearity between
them is why an adapter cannot be merged, and costs time at inference.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llm_anatomy.peft import layers, targets
from llm_anatomy.peft.layers import Wrapped

METHOD = "adapters"

HOULSBY = ("o_proj", "down_proj")
"""Two adapters a block: after attention and after feed-forward, each before the residual sum.

A decoder that looks at an encoder has one more a block, after that attention too.
"""

PFEIFFER = ("down_proj",)
"""One a block, after feed-forward (Pfeiffer et al., 2021, arXiv:2005.00247)."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Houlsby's placement with a bottleneck of `width` 64, unless told otherwise.

    Their first weights are drawn with standard deviation `std`, cut at two of them. Modules named
    in `also_train` train in full; Houlsby et al. train the norms and the head.

    Raises:
        ValueError: a field has another type than it states, or is out of range.
    """

    width: int = 64
    activation: Callable[[Tensor], Tensor] = F.gelu
    std: float = 0.01
    targets: tuple[str, ...] = HOULSBY
    also_train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        targets.check_count("width", self.width)
        targets.check_positive("std", self.std)
        targets.check_targets("targets", self.targets)
        if not callable(self.activation):
            raise ValueError(f"activation must be a function, got {self.activation!r}")
        if self.also_train != ():
            targets.check_targets("also_train", self.also_train)


class Adapter(Wrapped):
    """A layer, then a bottleneck whose output is added to what the layer puts out."""

    def __init__(self, base: nn.Module, config: AdapterConfig, name: str = "the layer") -> None:
        super().__init__(base)
        self.config = config
        _, d = targets.widths(name, base)
        if config.width > d:
            raise ValueError(f"a bottleneck of {config.width} is above the width of {name}, {d}")
        self.down = nn.Linear(d, config.width, **layers.like(base))
        self.up = nn.Linear(config.width, d, **layers.like(base))
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, 0.0, config.std, -2 * config.std, 2 * config.std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Float[Tensor, "*_ D"]:
        h = self.base(x)
        return h + self.up(self.config.activation(self.down(h)))


def add(model: nn.Module, config: AdapterConfig) -> None:
    """Put an adapter after every module that the config targets, and freeze the rest of the model.

    Raises:
        ValueError: a name finds nothing, or no linear layer and no embedding; the bottleneck is
            wider than a layer; or the model carries a method already. The model is unchanged then.
    """
    targets.check_free(model, METHOD)
    new = {
        name: Adapter(module, config, name)
        for name, module in targets.find(model, config.targets).items()
    }
    layers.put_on(model, METHOD, new, config.also_train)


def remove(model: nn.Module) -> None:
    """Give the base back as it was before `add`, bit for bit; `targets.state` keeps the task.

    Raises:
        ValueError: the model does not carry adapters.
    """
    layers.take_off(model, METHOD)
