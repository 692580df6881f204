"""Adapters in the file format of the peft library.

A folder holds `adapter_config.json`, which names the method and its settings, and
`adapter_model.safetensors`, which holds what was learned and nothing of the base.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_anatomy.peft.targets import State, find, is_conv1d
from llm_anatomy.weights import Fused, Pretrained, Rename

PREFIX = "base_model.model."
"""What peft puts before the name of a module in the base."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BASE = "base"  # an entry in the head of the file, which peft passes over


def write(
    folder: str | Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter that peft can load.

    Args:
        folder: created if it is not there.
        settings: the fields of peft's config, `peft_type` among them.
        tensors: what was learned, under the names that peft gives it.
        base: weights of the base that the adapter was made for, as (out, in). A few of their
            numbers go along, by which `check_base` can tell that another base is not the one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(settings), indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    head = {"format": "pt"}
    if base:
        head[_BASE] = json.dumps({name: _probe(t) for name, t in sorted(base.items())})
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata=head)


def read_settings(folder: str | Path, peft_type: str) -> dict[str, Any]:
    """Read the config of an adapter, and check that it is of the method expected.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object, or the config of another method.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: an adapter's folder has an {CONFIG}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    found = settings.get("peft_type") if isinstance(settings, dict) else None
    if found != peft_type:
        raise ValueError(f"{path} describes an adapter of type {found!r}; expected {peft_type!r}")
    return settings


def read_tensors(folder: str | Path) -> State:
    """Read what an adapter has learned, under the names that peft gives it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is corrupt or truncated.
    """
    with _open(folder) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_base(folder: str | Path, base: Mapping[str, Tensor]) -> None:
    """Check that these are the weights that the adapter was made for, given as to `write`.

    The file says so where `write` got the base; peft's own files do not, and pass. A base in
    lower precision passes too.

    Raises:
        ValueError: they are others.
    """
    with _open(folder) as file:
        probes = json.loads((file.metadata() or {}).get(_BASE, "{}"))
    for name, want in probes.items():
        if name not in base:
            raise ValueError(f"the adapter was made for a base with {name}, which this one lacks")
        got = _probe(base[name])
        if len(got) != len(want) or not torch.allclose(
            torch.tensor(got), torch.tensor(want), rtol=0.02, atol=1e-6
        ):
            raise ValueError(f"the adapter was made for another base: its {name} has other weights")


def check_unused(settings: Mapping[str, Any], unused: Sequence[str]) -> None:
    """Check that settings which we do not know how to follow are off: false, empty or absent.

    Raises:
        ValueError: one is on.
    """
    for name in unused:
        if settings.get(name) not in (None, False, {}, [], "none"):
            raise ValueError(f"{CONFIG} sets {name} to {settings[name]!r}, which is not supported")


def need(settings: Mapping[str, Any], name: str) -> Any:
    """A setting that must be there.

    Raises:
        ValueError: it is not.
    """
    if settings.get(name) is None:
        raise ValueError(f"{CONFIG} lacks {name}")
    return settings[name]


def number(settings: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A setting that is a number; without a default it must be there.

    Raises:
        ValueError: it is not.
    """
    value = settings.get(name) if default is not None else need(settings, name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{CONFIG} sets {name} to {value!r}, which is no number")
    return float(value)


# --- Names of modules -----------------------------------------------------------------------------


def their_name(model: nn.Module, name: str) -> str:
    """What Hugging Face calls a module of ours; other models keep their own names.

    Raises:
        ValueError: there it is no module of its own but a part of a fused one, which peft can only
            adapt as a whole, or one of many experts, or it has no counterpart.
    """
    if not isinstance(model, Pretrained):
        return name
    for rule in model.hf_rules(model.config):
        if f"{name}.weight" not in rule.targets:
            continue
        if isinstance(rule, Fused):
            raise ValueError(_fused(rule))
        if ".experts." in rule.theirs:
            raise ValueError(f"transformers holds {name} and all other experts in one tensor")
        return rule.theirs.removesuffix(".weight")
    raise ValueError(f"{name} has no counterpart in Hugging Face's {model.model_type}")


def our_name(model: nn.Module, name: str) -> str:
    """What we call a module of Hugging Face's: the inverse of `their_name`.

    Raises:
        ValueError: theirs is several of ours in one, or we have none.
    """
    if not isinstance(model, Pretrained):
        return name
    for rule in model.hf_rules(model.config):
        if rule.theirs != f"{name}.weight":
            continue
        if isinstance(rule, Fused):
            raise ValueError(_fused(rule))
        return rule.ours.removesuffix(".weight")
    raise ValueError(f"the adapter is for {name}, which this {model.model_type} model lacks")


def in_full(model: nn.Module, names: Sequence[str]) -> tuple[list[str], State]:
    """Modules that train in full, such as a head, as peft writes them.

    Returns:
        Their names in Hugging Face's words, and their own parameters and buffers, not copies of
        them, under the names in the file.

    Raises:
        ValueError: a parameter is shared with another module, here or in Hugging Face's model: peft
            would train a copy, and leave the other module as it was.
    """
    modules: dict[str, None] = {}
    tensors = {}
    tied = model.hf_tied(model.config) if isinstance(model, Pretrained) else {}
    tied_names = {*tied, *tied.values()}
    n_places = Counter(p for m in model.modules() for p in m.parameters(recurse=False))
    for found in find(model, names) if names else ():
        whole = model.get_submodule(found).state_dict(prefix=f"{found}.", keep_vars=True)
        for path, tensor in whole.items():
            module, _, last = path.rpartition(".")
            theirs = their_name(model, module)
            if n_places[tensor] > 1 or f"{theirs}.{last}" in tied_names:
                raise ValueError(f"{path} is tied to another module; peft would train it alone")
            modules[theirs] = None
            tensors[f"{PREFIX}{theirs}.{last}"] = tensor
    return list(modules), tensors


def modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules with exactly these names.

    Raises:
        ValueError: the model lacks one, or holds it under several names.
    """
    there = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in there:
            raise ValueError(f"the adapter is for {name}, which the model lacks")
        called = [other for other, module in there.items() if module is there[name]]
        if len(called) > 1:
            raise ValueError(f"{' and '.join(called)} are one module, which cannot be adapted")
    return {name: there[name] for name in names}


def any_in_out(model: nn.Module, wrapped: Mapping[str, nn.Module]) -> bool:
    """Whether Hugging Face stores one of these weights as (in, out), as in GPT-2."""
    if not isinstance(model, Pretrained):
        return any(is_conv1d(layer.base) for layer in wrapped.values())
    return any(
        isinstance(rule, Rename)
        and rule.layout is not None
        and rule.ours.removesuffix(".weight") in wrapped
        for rule in model.hf_rules(model.config)
    )


def split(
    tensors: Mapping[str, Tensor], module_of: Callable[[str], str | None]
) -> tuple[list[str], list[str]]:
    """Their names of the modules that a method has adapted, and of those that it trained in full.

    Args:
        tensors: as `read_tensors` gives them.
        module_of: the module that a tensor of the method belongs to; None for any other tensor.

    Raises:
        ValueError: a name does not start as peft's do, or nothing belongs to the method.
    """
    adapted: dict[str, None] = {}
    in_full: dict[str, None] = {}
    for key in tensors:
        if not key.startswith(PREFIX):
            raise ValueError(f"the adapter holds {key}; expected names that start with {PREFIX}")
        name = key.removeprefix(PREFIX)
        module = module_of(name)
        if module is None:
            in_full[name.rpartition(".")[0]] = None
        else:
            adapted[module] = None
    if not adapted:
        raise ValueError("the adapter holds nothing of its method")
    return list(adapted), list(in_full)


def _fused(rule: Fused) -> str:
    ours = ", ".join(name.removesuffix(".weight") for name in rule.ours)
    return (
        f"Hugging Face holds {ours} as one module, {rule.theirs.removesuffix('.weight')}, and peft "
        "adapts it as a whole: such an adapter has no counterpart here"
    )


def _open(folder: str | Path):
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or truncated: {error}") from error


def _probe(tensor: Tensor, n: int = 4) -> list[float]:
    """A few numbers spread over a tensor: enough to tell trained weights apart."""
    flat = tensor.detach().reshape(-1)
    step = math.ceil(flat.numel() / n)
    return [float(value) for value in flat[::step].float()]
