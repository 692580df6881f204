"""LoRA (Hu et al., 2021, arXiv:2106.09685): the change of a matrix, as a product of two thin ones.

    y = W x + (alpha / r) B A x        A is (r, in), B is (out, r), and W stays as it is

B starts at zero, so that training begins at the base. A is drawn as the authors' code does, Kaiming
uniform; their paper says Gaussian. For an embedding it is A that starts at zero, as in their code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_anatomy.peft import files, layers, targets
from llm_anatomy.peft.layers import Wrapped

METHOD = "LoRA"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Rank 8 on queries and values, as the paper has it for RoBERTa-base, unless told otherwise.

    The update is scaled by `alpha / r`, or by alpha over the root of r if it is `rank_stabilised`
    (Kalajdzievski, 2023, arXiv:2312.03732). A share `dropout` of what the update reads is dropped
    in training. The modules named in `also_train` train in full, such as a new head.

    Raises:
        ValueError: a field has another type than it states, or is out of range.
    """

    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    also_train: tuple[str, ...] = ()
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        targets.check_count("r", self.r)
        targets.check_positive("alpha", self.alpha)
        targets.check_share("dropout", self.dropout)
        targets.check_targets("targets", self.targets)
        if self.also_train != ():
            targets.check_targets("also_train", self.also_train)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilised else self.r)


class LoRALinear(Wrapped):
    """A linear layer, its weight laid out either way, and the low-rank update beside it."""

    def __init__(self, base: nn.Module, config: LoRAConfig, name: str = "the layer") -> None:
        super().__init__(base)
        self.config = config
        d_in, d_out = _check_rank(name, base, config.r)
        like = layers.like(base)
        self.lora_A = nn.Parameter(torch.empty(config.r, d_in, **like))
        self.lora_B = nn.Parameter(torch.zeros(d_out, config.r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "*_ I"]) -> Float[Tensor, "*_ O"]:
        y = self.base(x)
        if self.merged:
            return y
        low = F.linear(self.dropout(x), self.lora_A)  # (..., r)
        return y + F.linear(low, self.lora_B) * self.config.scale

    def update(self) -> Float[Tensor, "O I"]:
        """What training has added to the weight: a matrix of rank r at most."""
        return self.lora_B @ self.lora_A * self.config.scale

    def folded(self) -> dict[str, Tensor]:
        update = self.update().T if targets.is_conv1d(self.base) else self.update()
        return {"weight": self.base.weight + update}


class LoRAEmbedding(Wrapped):
    """A table of embeddings and its low-rank update: A holds r numbers for each token."""

    def __init__(self, base: nn.Embedding, config: LoRAConfig, name: str = "the layer") -> None:
        super().__init__(base)
        self.config = config
        if type(base).forward is not nn.Embedding.forward and not hasattr(base, "embed_scale"):
            raise ValueError(f"{name} is a {type(base).__name__}, which does more than look up")
        n, d = _check_rank(name, base, config.r)
        like = layers.like(base)
        self.lora_A = nn.Parameter(torch.zeros(config.r, n, **like))
        self.lora_B = nn.Parameter(torch.randn(d, config.r, **like))

    def forward(self, tokens: Int[Tensor, "*_"]) -> Float[Tensor, "*_ D"]:
        x = self.base(tokens)
        if self.merged:
            return x
        low = F.embedding(tokens, self.lora_A.T, self.base.padding_idx)  # (..., r)
        y = F.linear(low, self.lora_B) * self.config.scale
        # transformers' tables of scaled vectors, as in BART and Gemma 3
        return x + y * getattr(self.base, "embed_scale", 1.0)

    @property
    def weight(self) -> Float[Tensor, "V D"]:
        """The table with its update, which an output layer scores with where the two are tied."""
        return self.base.weight if self.merged else self.folded()["weight"]

    def update(self) -> Float[Tensor, "V D"]:
        """What training has added to the table."""
        return (self.lora_B @ self.lora_A).T * self.config.scale

    def folded(self) -> dict[str, Tensor]:
        return {"weight": self.base.weight + self.update()}


def add(model: nn.Module, config: LoRAConfig) -> None:
    """Put LoRA on every module that the config targets, and freeze the rest of the model.

    Raises:
        ValueError: a name finds nothing, or no linear layer and no embedding; the rank is above the
            width of a target; or the model carries a method already. The model is unchanged then.
    """
    targets.check_free(model, METHOD)
    found = targets.find(model, config.targets)
    layers.put_on(model, METHOD, _wrap(found, config), config.also_train)


def remove(model: nn.Module) -> None:
    """Give the base back as it was before `add`, bit for bit.

    Raises:
        ValueError: the model does not carry LoRA.
    """
    layers.take_off(model, METHOD)


def merge(model: nn.Module) -> None:
    """Add each update to its weight: the same outputs, at the cost of the base alone.

    Raises:
        ValueError: the model does not carry LoRA, it is merged already, or a weight is quantised or
            shared with another layer. The model is unchanged then.
    """
    layers.merge(model, METHOD)


def unmerge(model: nn.Module) -> None:
    """Take the updates out of the weights again, exactly.

    Raises:
        ValueError: the model does not carry LoRA, or it is not merged.
    """
    layers.unmerge(model, METHOD)


def merge_and_remove(model: nn.Module) -> None:
    """Leave a plain model with the updates in its weights and without a way back.

    Raises:
        ValueError: as `merge` does.
    """
    layers.merge_and_remove(model, METHOD)


# --- Files of the peft library --------------------------------------------------------------------

_UNUSED = (
    *("bias", "lora_bias", "rank_pattern", "alpha_pattern", "use_dora", "use_qalora", "use_bdlora"),
    *("layer_replication", "trainable_token_indices", "target_parameters", "arrow_config"),
    *("alora_invocation_tokens", "velora_config", "kasa_config", "monteclora_config"),
)
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""Ways to begin that leave the base as it is; PiSSA, OLoRA, LoftQ and others change it first."""


def save(model: nn.Module, folder: str | Path) -> None:
    """Write what was learned as peft would for the model's Hugging Face counterpart.

    Raises:
        ValueError: the model does not carry LoRA, or peft's format has no place for it: a target is
            a part of what Hugging Face fuses, or an embedding that our model ties to its output.
    """
    targets.check_carries(model, METHOD)
    ours = layers.wrapped(model)
    wrapped = {_their_name(model, name, w): w for name, w in ours.items()}
    config: LoRAConfig = next(iter(wrapped.values())).config
    modules, in_full = files.in_full(model, config.also_train)
    settings = {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilised,
        "target_modules": list(wrapped),
        "modules_to_save": modules or None,
        "fan_in_fan_out": files.any_in_out(model, ours),
        "inference_mode": True,
    }
    tensors = {key: p for name, w in wrapped.items() for key, p in _keys(name, w).items()}
    files.write(folder, settings, {**tensors, **in_full}, layers.dense_weights(wrapped))


def load(model: nn.Module, folder: str | Path) -> LoRAConfig:
    """Put on a base the LoRA that `save` or peft has written.

    The factors take the precision of the base; peft keeps them in 32 bits over one of 16.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is corrupt, asks for a variant of LoRA that is not supported, or was made
            for another base; or the model carries a method already. The model is unchanged then.
    """
    targets.check_free(model, METHOD)
    settings = files.read_settings(folder, "LORA")
    files.check_unused(settings, _UNUSED)
    if (start := settings.get("init_lora_weights")) not in _STARTS:
        raise ValueError(f"the adapter's base was changed first: init_lora_weights is {start!r}")
    tensors = _without_base(model, files.read_tensors(folder))
    theirs, heads = files.split(tensors, _module_of)
    config = LoRAConfig(
        r=files.need(settings, "r"),
        alpha=files.number(settings, "lora_alpha"),
        dropout=files.number(settings, "lora_dropout", 0.0),
        targets=tuple(files.our_name(model, name) for name in theirs),
        also_train=tuple(files.our_name(model, head) for head in heads),
        rank_stabilised=bool(settings.get("use_rslora")),
    )
    new = _wrap(files.modules(model, config.targets), config)
    by_theirs = {_their_name(model, name, layer): layer for name, layer in new.items()}
    places = {key: p for name, w in by_theirs.items() for key, p in _keys(name, w).items()}
    places |= files.in_full(model, config.also_train)[1]
    targets.check_names("the adapter", tensors, {name: p.shape for name, p in places.items()})
    if base := layers.dense_weights(by_theirs):
        files.check_base(folder, base)
    layers.put_on(model, METHOD, new, config.also_train)
    with torch.no_grad():
        for name, p in places.items():
            p.copy_(tensors[name])
    return config


def _module_of(name: str) -> str | None:
    """The module to which a tensor of this name belongs, if it is a factor."""
    module, _, last = name.rpartition(".")
    if last.startswith("lora_embedding_"):
        return module
    return module.rpartition(".")[0] if module.endswith((".lora_A", ".lora_B")) else None


def _without_base(model: nn.Module, tensors: Mapping[str, Tensor]) -> targets.State:
    """Leave out the copies of the base's tables that peft writes beside their factors.

    Raises:
        ValueError: one is not the base's own, which peft would put into its place.
    """
    rest = dict(tensors)
    for key in tensors:
        theirs, inside, last = key.removeprefix(files.PREFIX).partition(".base_layer.")
        if not inside:
            continue
        name = files.our_name(model, theirs)
        own = dict(files.modules(model, [name])[name].named_parameters()).get(last)
        copy = rest.pop(key)
        if own is None or own.shape != copy.shape or not _close(own, copy):
            raise ValueError(f"the adapter brings another {theirs}.{last} than that of the base")
    return rest


def _close(own: Tensor, copy: Tensor) -> bool:
    """Whether these are the same weights, perhaps in other precisions."""
    return torch.allclose(own.float().cpu(), copy.float(), rtol=0.02, atol=1e-6)


def _keys(theirs: str, layer: Wrapped) -> dict[str, nn.Parameter]:
    kind = "{}lora_embedding_{}" if isinstance(layer, LoRAEmbedding) else "{}lora_{}.weight"
    return {
        kind.format(f"{files.PREFIX}{theirs}.", factor): getattr(layer, f"lora_{factor}")
        for factor in "AB"
    }


def _their_name(model: nn.Module, name: str, layer: Wrapped) -> str:
    tied = getattr(model, "hf_tied", None)
    if isinstance(layer, LoRAEmbedding) and tied is not None and tied(model.config):
        raise ValueError(
            f"{name} is tied to the output here, and its update reaches both; peft adapts one alone"
        )
    return files.their_name(model, name)


def _wrap(found: Mapping[str, nn.Module], config: LoRAConfig) -> dict[str, Wrapped]:
    return {
        name: (LoRAEmbedding if isinstance(module, nn.Embedding) else LoRALinear)(
            module, config, name
        )
        for name, module in found.items()
    }


def _check_rank(name: str, base: nn.Module, r: int) -> tuple[int, int]:
    d_in, d_out = targets.widths(name, base)
    if r > min(d_in, d_out):
        raise ValueError(f"rank {r} is above the width of {name}, which maps {d_in} to {d_out}")
    return d_in, d_out
