"""BitFit (Ben Zaken et al., 2022, arXiv:2106.10199): train the biases, and nothing else.

No parameter is added: what is learned is a change of numbers that the model has already.
"""

from dataclasses import dataclass

from torch import nn

from llm_anatomy.peft import targets

METHOD = "BitFit"


@dataclass(frozen=True, kw_only=True)
class BitFitConfig:
    """All biases, those of norms included, unless `targets` names the modules whose biases train.

    The paper also trains half of them, those of the queries and of the first matrix of each
    feed-forward layer: ("q_proj", "up_proj"). Modules named in `also_train` train in full.

    Raises:
        ValueError: a field does not hold names.
    """

    targets: tuple[str, ...] = ()
    also_train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("targets", "also_train"):
            if getattr(self, field) != ():
                targets.check_targets(field, getattr(self, field))


def add(model: nn.Module, config: BitFitConfig = BitFitConfig()) -> None:
    """Freeze all but the biases.

    Raises:
        ValueError: a name finds nothing, there is no bias, or the model carries a method already.
            The model is unchanged then.
    """
    targets.check_free(model, METHOD)
    biases = _biases(model, config)
    targets.freeze(model, METHOD, [*biases, *targets.parameters_of(model, config.also_train)])


def remove(model: nn.Module) -> None:
    """Give the base back as it was before `add`, bit for bit; `targets.state` keeps the task.

    Raises:
        ValueError: the model does not carry BitFit.
    """
    targets.thaw(model, METHOD)


def _biases(model: nn.Module, config: BitFitConfig) -> list[nn.Parameter]:
    modules = list(targets.find(model, config.targets).values()) if config.targets else [model]
    biases = [
        p
        for module in modules
        for name, p in module.named_parameters()
        if _is_bias(name.rpartition(".")[2])
    ]
    if not biases:
        raise ValueError(f"{', '.join(config.targets) or 'the model'} has no bias")
    return biases


def _is_bias(name: str) -> bool:
    """Whether a parameter is called so; PyTorch's attention and recurrent layers hold several."""
    return name in ("bias", "in_proj_bias") or name.startswith(("bias_ih_", "bias_hh_"))
