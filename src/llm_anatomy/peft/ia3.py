"""(IA)3 (Liu et al., 2022, arXiv:2205.05638): rescale keys, values and the features inside the FFN.

    k = l_k * (W_k x)      v = l_v * (W_v x)      ffn(x) = W_2 (l_ff * f(W_1 x))

One learned number a feature, all of them one at the start. Each is a factor of a row or a column of
a matrix, so that they merge, as LoRA's update does.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_anatomy.peft import files, layers, targets
from llm_anatomy.peft.layers import Wrapped

METHOD = "(IA)3"


@dataclass(frozen=True, kw_only=True)
class IA3Config:
    """The paper's three places, by the names of this package, unless told otherwise.

    What the `targets` put out is rescaled; of the `inputs`, what they read, which for the second
    matrix of a feed-forward layer is the output of its activation. Modules named in `also_train`
    train in full.

    Raises:
        ValueError: a field does not hold names, or a name is in two fields.
    """

    targets: tuple[str, ...] = ("k_proj", "v_proj")
    inputs: tuple[str, ...] = ("down_proj",)
    also_train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.targets == () and self.inputs == ():
            raise ValueError("targets and inputs must not both be empty")
        for field in ("targets", "inputs", "also_train"):
            if getattr(self, field) != ():
                targets.check_targets(field, getattr(self, field))
        if both := set(self.targets) & set(self.inputs):
            raise ValueError(f"{min(both)} is in targets and in inputs")


class IA3Linear(Wrapped):
    """A linear layer of which each output feature, or each input feature, is rescaled."""

    def __init__(
        self, base: nn.Module, config: IA3Config, *, of_input: bool, name: str = "the layer"
    ) -> None:
        super().__init__(base)
        if isinstance(base, nn.Embedding):
            raise ValueError(f"{name} is an Embedding; (IA)3 rescales linear layers")
        self.config = config
        self.of_input = of_input
        d_in, d_out = targets.widths(name, base)
        self.gain = nn.Parameter(torch.ones(d_in if of_input else d_out, **layers.like(base)))

    def forward(self, x: Float[Tensor, "*_ I"]) -> Float[Tensor, "*_ O"]:
        if self.merged:
            return self.base(x)
        return self.base(x * self.gain) if self.of_input else self.base(x) * self.gain

    def folded(self) -> dict[str, Tensor]:
        rows = self.of_input == targets.is_conv1d(self.base)  # of the weight as it is stored
        new = {"weight": self.base.weight * (self.gain[:, None] if rows else self.gain)}
        if not self.of_input and self.bias is not None:
            new["bias"] = self.bias * self.gain
        return new


def add(model: nn.Module, config: IA3Config) -> None:
    """Put (IA)3 on every module that the config names, and freeze the rest of the model.

    Raises:
        ValueError: a name finds nothing, or no linear layer, or a module is found by `targets` and
            by `inputs`; or the model carries a method already. The model is unchanged then.
    """
    targets.check_free(model, METHOD)
    outputs = targets.find(model, config.targets) if config.targets else {}
    inputs = targets.find(model, config.inputs) if config.inputs else {}
    if both := sorted(set(outputs) & set(inputs)):
        raise ValueError(f"{both[0]} is found by targets and by inputs")
    layers.put_on(model, METHOD, _wrap(outputs, inputs, config), config.also_train)


def remove(model: nn.Module) -> None:
    """Give the base back as it was before `add`, bit for bit.

    Raises:
        ValueError: the model does not carry (IA)3.
    """
    layers.take_off(model, METHOD)


def merge(model: nn.Module) -> None:
    """Multiply the rows and columns of the weights, and biases: the same outputs, at no extra cost.

    Raises:
        ValueError: the model does not carry (IA)3, it is merged already, or a weight is quantised
            or shared with another layer. The model is unchanged then.
    """
    layers.merge(model, METHOD)


def unmerge(model: nn.Module) -> None:
    """Put the weights of the base back, exactly, even where a factor was zero.

    Raises:
        ValueError: the model does not carry (IA)3, or it is not merged.
    """
    layers.unmerge(model, METHOD)


def merge_and_remove(model: nn.Module) -> None:
    """Leave a plain model with the factors in its weights and without a way back.

    Raises:
        ValueError: as `merge` does.
    """
    layers.merge_and_remove(model, METHOD)


# --- Files of the peft library --------------------------------------------------------------------


def save(model: nn.Module, folder: str | Path) -> None:
    """Write what was learned as peft would for the model's Hugging Face counterpart.

    Raises:
        ValueError: the model does not carry (IA)3, or a target is a part of what Hugging Face
            fuses.
    """
    targets.check_carries(model, METHOD)
    ours = layers.wrapped(model)
    wrapped = {files.their_name(model, name): layer for name, layer in ours.items()}
    config: IA3Config = next(iter(wrapped.values())).config
    modules, in_full = files.in_full(model, config.also_train)
    settings = {
        "peft_type": "IA3",
        "target_modules": list(wrapped),
        "feedforward_modules": [name for name, layer in wrapped.items() if layer.of_input],
        "modules_to_save": modules or None,
        "fan_in_fan_out": files.any_in_out(model, ours),
        "inference_mode": True,
    }
    tensors = {_key(name): _shaped(layer) for name, layer in wrapped.items()}
    files.write(folder, settings, {**tensors, **in_full}, layers.dense_weights(wrapped))


def load(model: nn.Module, folder: str | Path) -> IA3Config:
    """Put on a base the (IA)3 that `save` or peft has written.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is corrupt or was made for another base; or the model carries a method
            already. The model is unchanged then.
    """
    targets.check_free(model, METHOD)
    settings = files.read_settings(folder, "IA3")
    tensors = files.read_tensors(folder)
    adapted, heads = files.split(tensors, _module_of)
    of_input = {name: _is_input(name, settings.get("feedforward_modules")) for name in adapted}
    config = IA3Config(
        targets=tuple(files.our_name(model, n) for n in adapted if not of_input[n]),
        inputs=tuple(files.our_name(model, n) for n in adapted if of_input[n]),
        also_train=tuple(files.our_name(model, head) for head in heads),
    )
    outputs, inputs = (files.modules(model, names) for names in (config.targets, config.inputs))
    new = _wrap(outputs, inputs, config)
    by_theirs = {files.their_name(model, name): layer for name, layer in new.items()}
    shapes = {_key(name): tuple(_shaped(layer).shape) for name, layer in by_theirs.items()}
    in_full = files.in_full(model, config.also_train)[1]
    shapes |= {name: tuple(p.shape) for name, p in in_full.items()}
    targets.check_names("the adapter", tensors, shapes)
    if base := layers.dense_weights(by_theirs):
        files.check_base(folder, base)
    layers.put_on(model, METHOD, new, config.also_train)
    with torch.no_grad():
        for name, layer in by_theirs.items():
            layer.gain.copy_(tensors[_key(name)].flatten())
        for name, p in in_full.items():
            p.copy_(tensors[name])
    return config


def _key(theirs: str) -> str:
    return f"{files.PREFIX}{theirs}.ia3_l"


def _module_of(name: str) -> str | None:
    return name.removesuffix(".ia3_l") if name.endswith(".ia3_l") else None


def _is_input(name: str, feedforward: object) -> bool:
    """Whether peft rescales what this module reads: it is one of these, or matches the pattern.

    Raises:
        ValueError: they are no names and no pattern.
    """
    if isinstance(feedforward, str):
        return re.fullmatch(feedforward, name) is not None
    if not feedforward:
        return False
    targets.check_targets("feedforward_modules", feedforward)
    return any(name.endswith(ending) for ending in feedforward)


def _shaped(layer: IA3Linear) -> Tensor:
    return layer.gain[None, :] if layer.of_input else layer.gain[:, None]


def _wrap(
    outputs: Mapping[str, nn.Module], inputs: Mapping[str, nn.Module], config: IA3Config
) -> dict[str, Wrapped]:
    return {
        name: IA3Linear(module, config, of_input=found is inputs, name=name)
        for found in (outputs, inputs)
        for name, module in found.items()
    }
