"""How a model is called: what the arguments of its `forward` mean, ours and those of transformers.

Methods that put something before the text change these arguments on their way in.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor, nn

TOKENS = ("tokens", "source", "input_ids")
OUTPUTS = {"logits": 3, "last_hidden_state": 3, "start_logits": 2, "end_logits": 2}
"""Outputs of transformers that have something for each token, and their numbers of dimensions."""

IGNORED = -100
"""A label that no loss counts."""


def bind(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """What `model(*args, **kwargs)` gives to which argument of its `forward`."""
    return inspect.signature(model.forward).bind(*args, **kwargs)


def has(given: Mapping[str, Any], name: str) -> bool:
    """Whether an argument is given, and not None."""
    return given.get(name) is not None


def takes(model: nn.Module, name: str) -> bool:
    """Whether `forward` has an argument of this name."""
    return name in inspect.signature(model.forward).parameters


def is_two_sided(model: nn.Module) -> bool:
    """Whether this is an encoder-decoder, whose outputs belong to another text than its inputs."""
    return takes(model, "target") or takes(model, "decoder_input_ids")


def finds_spans(model: nn.Module, outputs: tuple) -> bool:
    """Whether a model looks for an answer: it gives each token two numbers, apart."""
    apart = all(isinstance(part, Tensor) and part.ndim == 2 for part in outputs)
    return apart or takes(model, "start_positions")


def is_per_token(labels: Tensor, shape: Sequence[int]) -> bool:
    """Whether labels, for tokens of this shape, are one class a token, and not many a text."""
    return labels.shape == tuple(shape) and not labels.is_floating_point()


def n_cached(given: Mapping[str, Any]) -> int:
    """Positions that the caches hold."""
    if has(given, "past_key_values"):
        return given["past_key_values"].get_seq_length()
    caches = given.get("caches")
    return len(caches[0]) if caches else 0


def widen(
    per_token: Shaped[Tensor, "B T"], n: int, value: int | bool = True
) -> Shaped[Tensor, "B N"]:
    """Put n columns of `value` before what is said of each token: by default, that it is there."""
    return F.pad(per_token, (n, 0), value=value)


def widen_all(given: dict[str, Any], names: tuple[str, ...], n: int, value: int | bool) -> None:
    """Widen those of these arguments that are given."""
    for name in names:
        if has(given, name):
            given[name] = widen(given[name], n, value)
