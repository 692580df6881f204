"""What all methods share: modules found by name, a base that is frozen, and the way back.

A method is put on a model in place. It replaces or extends modules that it finds by the end of
their names, which works on the models of this package and on any other. Its parameters train, those
of the base do not, and removing it leaves the base as it was, bit for bit.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

State = dict[str, Tensor]
Targets = tuple[str, ...]


def find(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """Modules whose dotted name is a target or ends with one, in the order of the model.

    `q_proj` finds all query projections, `0.attention.q_proj` that of the first block alone.

    Raises:
        ValueError: a target finds nothing, or it finds a module that the model holds under several
            names, so that a change in one place would not reach the other.
    """
    check_targets("targets", targets)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    found: dict[str, nn.Module] = {}
    matched = set()
    for module, called in names.items():
        hits = {t for t in targets if any(_ends_with(name, t) for name in called)}
        matched |= hits
        if hits and len(called) > 1:
            raise ValueError(f"{' and '.join(called)} are one module, which cannot be adapted")
        if hits:
            found[called[0]] = module
    absent = [target for target in targets if target not in matched]
    if absent:
        known = sorted({called[0].rpartition(".")[2] for called in names.values()} - {""})
        words = [name for name in known if not name.isdigit()]
        raise ValueError(f"no module is called {_list(absent)}; the model has {_list(words, 40)}")
    return found


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in the place of the one called `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the linear layer of transformers' GPT models: its weight is (in, out)."""
    return hasattr(module, "nf") and hasattr(module, "nx")


def widths(name: str, module: nn.Module) -> tuple[int, int]:
    """Features that go into and come out of a linear layer; a table of embeddings is one as well.

    Raises:
        ValueError: it is another kind of module; `name` is its name in the message.
    """
    if is_conv1d(module):
        return module.nx, module.nf
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    kind = type(module).__name__
    inside = [f"{name}.{n}" for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    such = f", such as {inside[0]}" if inside else ""
    raise ValueError(
        f"{name} is a {kind}; what can be adapted are linear layers and embeddings{such}"
    )


# --- What trains, and what is frozen --------------------------------------------------------------


@dataclass
class _Carried:
    """What a model must know to lose a method again."""

    method: str
    flags: list[tuple[nn.Parameter, bool]]
    values: list[tuple[nn.Parameter, Tensor]]
    statistics: list[tuple[nn.Module, str, Tensor]]
    merged: bool = False


_RECORD = "_carried"  # on the model that a method was put on
_METHOD = "_method"  # on each of its parts, the name of the method


def method_on(model: nn.Module) -> str | None:
    """The method that this model carries, or a part of it, or a model that it is a part of."""
    marks = (vars(module).get(_METHOD) for module in model.modules())
    return next((method for method in marks if method is not None), None)


def check_free(model: nn.Module, method: str) -> None:
    """Check that the model carries no method yet; the next one is `method`.

    Raises:
        ValueError: it carries one. Two at once would each take the other for a part of the base.
    """
    carried = method_on(model)
    if carried is not None:
        raise ValueError(f"the model carries {carried} already; remove it before adding {method}")


def check_carries(model: nn.Module, method: str, *, merged: bool | None = None) -> None:
    """Check that `method` was put on this very model and, where it is said, that it is (un)merged.

    Raises:
        ValueError: it was not, or it is in the other state.
    """
    record = vars(model).get(_RECORD)
    if record is None or record.method != method:
        raise ValueError(f"the model does not carry {method}, but {method_on(model) or 'nothing'}")
    if merged is not None and merged != record.merged:
        state = "merged already" if record.merged else "not merged"
        raise ValueError(f"{method} is {state}")


def freeze(model: nn.Module, method: str, parameters: Iterable[nn.Parameter] = ()) -> None:
    """Make `parameters` the only ones that train, and note what `thaw` needs.

    Call it before new parameters are added. Of `parameters`, which belong to the base, a copy is
    kept, so that the base comes back as it was, and of the running statistics of batch norms, which
    move in training though they are no parameters.
    """
    check_free(model, method)
    kept = {id(p) for p in parameters}
    base = list(model.parameters())
    record = _Carried(
        method,
        [(p, p.requires_grad) for p in base],
        [(p, p.detach().clone()) for p in base if id(p) in kept],
        _running(model),
    )
    for p in base:
        p.requires_grad_(id(p) in kept)
    setattr(model, _RECORD, record)
    for module in model.modules():
        setattr(module, _METHOD, method)


def thaw(model: nn.Module, method: str, *, restore: bool = True) -> None:
    """Undo `freeze`: what trained before may train again, with its old values if `restore`."""
    check_carries(model, method)
    record = vars(model).pop(_RECORD)
    with torch.no_grad():
        for p, value in record.values if restore else ():
            p.copy_(value)
        for module, name, value in record.statistics if restore else ():
            getattr(module, name).copy_(value)
    for p, flag in record.flags:
        p.requires_grad_(flag)
    for module in model.modules():
        vars(module).pop(_METHOD, None)


def _running(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """A copy of the running statistics of batch norms, and where each belongs."""
    return [
        (module, name, tensor.clone())
        for module in model.modules()
        if isinstance(module, _NormBase)
        for name, tensor in module.named_buffers(recurse=False)
    ]


def set_merged(model: nn.Module, method: str, merged: bool) -> None:
    """Note that the method is now merged, or no longer."""
    check_carries(model, method, merged=not merged)
    vars(model)[_RECORD].merged = merged


def is_merged(model: nn.Module) -> bool:
    """Whether the model, or a part of it, carries a method that is merged into its weights."""
    records = (vars(module).get(_RECORD) for module in model.modules())
    return any(record is not None and record.merged for record in records)


def parameters_of(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """All parameters of the modules that `names` find, such as a head; none if there is no name.

    Raises:
        ValueError: a name finds nothing, or a module without parameters, or one whose parameters
            are no real numbers.
    """
    found = find(model, names) if names else {}
    for name, module in found.items():
        if not any(True for _ in module.parameters()):
            raise ValueError(f"{name} is a {type(module).__name__}, which has nothing to train")
        if not all(p.is_floating_point() for p in module.parameters()):
            raise ValueError(f"{name} holds parameters of whole numbers, which cannot train")
    return [p for module in found.values() for p in module.parameters()]


def trainable(model: nn.Module) -> dict[str, int]:
    """Names of the parameters that train, with their numbers of elements."""
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


# --- The state of one task ------------------------------------------------------------------------


def state(model: nn.Module) -> State:
    """A copy of what a method has learned: every parameter that trains, by its name.

    Several tasks share one base: keep the state of each, and load whichever is wanted. Buffers,
    such as the running statistics of batch norms, are not among it.

    Raises:
        ValueError: the model carries no method, or one that is merged.
    """
    return {name: p.detach().clone() for name, p in _own(model).items()}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a method that is on the model what it has learned elsewhere.

    Raises:
        ValueError: the model carries no method, or one that is merged; or the state was made by
            another method or for another base: names or shapes differ. The model is unchanged then.
    """
    own = _own(model)
    check_names("the state", state, {name: p.shape for name, p in own.items()})
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(state[name])


def check_names(
    what: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]
) -> None:
    """Check that tensors have the wanted names and shapes, and that there are no others.

    Raises:
        ValueError: they do not; `what` says in the message what they are.
    """
    if missing := sorted(set(wanted) - set(tensors)):
        raise ValueError(f"{what} lacks {_list(missing)}: it belongs to another model or method")
    if left := sorted(set(tensors) - set(wanted)):
        raise ValueError(f"{what} holds {_list(left)}, for which the model has no place")
    wrong = [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(shape)}"
        for name, shape in wanted.items()
        if tuple(tensors[name].shape) != tuple(shape)
    ]
    if wrong:
        raise ValueError(f"{what} does not fit the model: {_list(wrong, 3)}")


def _own(model: nn.Module) -> dict[str, nn.Parameter]:
    if method_on(model) is None:
        raise ValueError("the model carries no method")
    if is_merged(model):
        raise ValueError(f"{method_on(model)} is merged; unmerge it first")
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --- Checks of the fields of a config -------------------------------------------------------------


def check_targets(field: str, targets: object) -> None:
    """Check that these are names in a tuple or list, at least one.

    Raises:
        ValueError: they are not. A string alone is no list of names.
    """
    if isinstance(targets, str):
        raise ValueError(
            f"{field} must hold names, as in ({targets!r},), got the string {targets!r}"
        )
    if not isinstance(targets, tuple | list) or not targets:
        raise ValueError(f"{field} must hold at least one name, got {targets!r}")
    if not all(isinstance(target, str) and target for target in targets):
        raise ValueError(f"{field} must hold names of modules, got {targets!r}")


def check_count(field: str, value: object) -> None:
    """Check that this is a whole number of at least 1.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field} must be a whole number of at least 1, got {value!r}")


def check_positive(field: str, value: object) -> None:
    """Check that this is a finite number above 0.

    Raises:
        ValueError: it is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"{field} must be a number above 0, got {value!r}")


def check_share(field: str, value: object) -> None:
    """Check that this is a share that dropout can take: from 0 to below 1.

    Raises:
        ValueError: it is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise ValueError(f"{field} must be a number from 0 to below 1, got {value!r}")


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _list(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
