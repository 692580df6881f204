"""What every model refuses, with a message that says what came and what was expected."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llm_anatomy import masks


def check_tokens(tokens: Int[Tensor, "B T"], vocab_size: int, name: str = "the prompt") -> None:
    """Check that there is something to read, and that the vocabulary has it.

    Raises:
        ValueError: there is no token, or a token id lies outside the vocabulary.
    """
    if tokens.numel() == 0:
        raise ValueError(f"{name} is empty: it has shape {tuple(tokens.shape)}")
    low, high = tokens.min().item(), tokens.max().item()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token ids must lie between 0 and {vocab_size - 1}; got {low} to {high} in {name}"
        )


def check_context(needed: int, n_positions: int) -> None:
    """Check that the model has a vector for every position.

    Raises:
        ValueError: more positions are needed than the model has.
    """
    if needed > n_positions:
        raise ValueError(f"{needed} positions are needed, but the model has {n_positions}")


def check_keep(keep: Bool[Tensor, "B S"], batch: int, needed: int) -> None:
    """Check that it is said of every position, those in the caches included, whether it is real.

    Raises:
        ValueError: `keep` is not boolean or has another shape.
    """
    if keep.dtype != torch.bool or keep.shape != (batch, needed):
        raise ValueError(
            f"keep must be boolean and of shape {(batch, needed)}, a column for each position, "
            f"those in the caches included; it is {keep.dtype} of shape {tuple(keep.shape)}"
        )


def padding_mask(
    keep: Bool[Tensor, "B S"] | None, batch: int, needed: int
) -> Bool[Tensor, "B 1 1 S"] | None:
    """Hide the padded keys from every query; where nothing is said, nothing is padded.

    Raises:
        ValueError: `keep` is not boolean or has another shape.
    """
    if keep is None:
        return None
    check_keep(keep, batch, needed)
    return masks.padding(keep)


def check_options(hf: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Check that config.json sets no option that would make the model another one.

    Args:
        hf: contents of config.json.
        supported: the values that an option may have. The first is what its absence means.

    Raises:
        ValueError: an option has another value.
    """
    for name, values in supported.items():
        found = hf.get(name, values[0])
        if found not in values:
            known = " or ".join(repr(value) for value in values)
            raise ValueError(f"config.json sets {name} to {found!r}; this model supports {known}")
