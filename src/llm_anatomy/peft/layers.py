"""What LoRA, (IA)3 and adapters share: a layer of their own around one of the base."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm_anatomy.peft import targets


class Wrapped(nn.Module):
    """A layer of the base with something learned around it.

    A subclass says in `folded` what the base's tensors become when the learned part is folded in.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.before: dict[str, Tensor] | None = None  # the base's own tensors, while it is merged

    @property
    def merged(self) -> bool:
        return self.before is not None

    @property
    def weight(self) -> Tensor:
        """The base's: models ask their layers for it, to look at its type or its device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base, "bias", None)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def folded(self) -> dict[str, Tensor]:
        """New values of parameters of the base, by name, with which it computes the same alone."""
        raise NotImplementedError

    def merge(self) -> None:
        new = self.folded()
        self.before = {name: getattr(self.base, name).detach().clone() for name in new}
        self._set(new)

    def unmerge(self) -> None:
        """Put back the copy of the base's own tensors; to subtract would leave rounding errors."""
        self._set(self.before)
        self.before = None

    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            getattr(self.base, name).copy_(value)

    def own_parameters(self) -> list[nn.Parameter]:
        """What was learned, without the base."""
        return list(self.parameters(recurse=False))


def wrapped(model: nn.Module) -> dict[str, Wrapped]:
    """The layers that a method has put on the model, by the name of the module each replaces."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Wrapped)}


def put_on(
    model: nn.Module, method: str, layers: Mapping[str, Wrapped], also_train: Sequence[str] = ()
) -> None:
    """Freeze the model and put `layers` in the place of the modules they wrap.

    Args:
        model: changed in place.
        method: its name, for messages.
        layers: by the name of the module that each wraps.
        also_train: modules of the base that train in full, such as a head.

    Raises:
        ValueError: the model carries a method already, a name in `also_train` finds nothing, or it
            finds a module that is wrapped; or a layer belongs to a module of PyTorch that does not
            call it. The model is unchanged then.
    """
    targets.check_free(model, method)
    in_full = targets.parameters_of(model, also_train)
    for name, layer in layers.items():
        if {id(p) for p in layer.base.parameters()} & {id(p) for p in in_full}:
            raise ValueError(f"{name} cannot be a target and train in full at once")
        _check_called(model, name)
    targets.freeze(model, method, in_full)
    for name, layer in layers.items():
        layer.train(layer.base.training)
        targets.replace(model, name, layer)


def take_off(model: nn.Module, method: str) -> None:
    """Give the base back as it was, bit for bit, merged or not.

    Raises:
        ValueError: the model does not carry the method.
    """
    targets.check_carries(model, method)
    with torch.no_grad():
        for name, layer in wrapped(model).items():
            if layer.merged:
                layer.unmerge()
            targets.replace(model, name, layer.base)
    targets.thaw(model, method)


def merge(model: nn.Module, method: str) -> None:
    """Fold what was learned into the weights of the base: inference then costs nothing extra.

    While merged, nothing in the layers trains; modules that train in full still do.

    Raises:
        ValueError: the model does not carry the method, it is merged already, or a layer cannot
            take a change: its weight is quantised, or another layer shares a parameter of it.
    """
    targets.check_carries(model, method, merged=False)
    layers = wrapped(model)
    for name, layer in layers.items():
        _check_mergeable(model, name, layer)
    targets.set_merged(model, method, True)
    with torch.no_grad():
        for layer in layers.values():
            layer.merge()
            for p in layer.own_parameters():
                p.requires_grad_(False)


def unmerge(model: nn.Module, method: str) -> None:
    """Take out of the weights what `merge` put in, bit for bit.

    Raises:
        ValueError: the model does not carry the method, or it is not merged.
    """
    targets.set_merged(model, method, False)
    with torch.no_grad():
        for layer in wrapped(model).values():
            layer.unmerge()
            for p in layer.own_parameters():
                p.requires_grad_(True)


def merge_and_remove(model: nn.Module, method: str) -> None:
    """Leave a plain model that has learned the task: nothing to load beside it, and no way back.

    Raises:
        ValueError: as `merge` does.
    """
    targets.check_carries(model, method)
    if not targets.is_merged(model):
        merge(model, method)
    for name, layer in wrapped(model).items():
        targets.replace(model, name, layer.base)
    targets.thaw(model, method, restore=False)


def dense_weights(layers: Mapping[str, Wrapped]) -> dict[str, Tensor]:
    """Weights of the base as (out, in), before any merge; nothing if one is quantised."""
    weights = {}
    for name, layer in layers.items():
        weight = getattr(layer.base, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            return {}
        weight = layer.before["weight"] if layer.merged else weight
        weights[name] = weight.T if targets.is_conv1d(layer.base) else weight
    return weights


def like(base: nn.Module) -> dict[str, Any]:
    """Where to put new parameters, and in which precision: as the base, if its weight is real.

    Raises:
        ValueError: the base holds no weight as a tensor.
    """
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor):
        kind = f"{type(base).__module__}.{type(base).__name__}"
        raise ValueError(f"a {kind} holds no weight that a method could be put on")
    return {"device": weight.device, "dtype": weight.dtype if weight.is_floating_point() else None}


def _check_called(model: nn.Module, name: str) -> None:
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        raise ValueError(
            f"{name} cannot be adapted: PyTorch's {type(parent).__name__} reads its weight and may "
            "not call it"
        )


def _check_mergeable(model: nn.Module, name: str, layer: Wrapped) -> None:
    weight = getattr(layer.base, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise ValueError(f"{name} has no weight of real numbers that could take a change")
    with torch.no_grad():
        changed = {id(getattr(layer.base, part)): part for part in layer.folded()}
    for other, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if module is not layer.base and id(p) in changed:
                part = changed[id(p)]
                raise ValueError(
                    f"{name} shares its {part} with {other}, which a merge would change"
                )
