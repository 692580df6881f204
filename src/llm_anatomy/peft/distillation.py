"""Distillation: a small model, the student, learns from a large one, the teacher.

Hinton et al., 2015 (arXiv:1503.02531). All weights of the student train, so this is no method of
parameter-efficient fine-tuning: the model is made smaller, not its update. The losses are functions
of logits and hidden states and live in `objectives`; here is where a student's first weights and a
teacher's hidden states come from.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_BLOCK = re.compile(r"((?:^|\.)blocks\.)(\d+)\.")


def alternate_layers(n_teacher: int, n_student: int) -> tuple[int, ...]:
    """Layers of a teacher that a student starts from: evenly spaced, the first and the last in it.

    DistilBERT's published script takes the layers 0, 2, 4, 7, 9 and 11 of BERT's 12, which is what
    this gives (Sanh et al., 2019, arXiv:1910.01108, section 3: "one layer out of two"). A student
    with one layer gets the first.

    Raises:
        ValueError: the student has no layer, or more than the teacher.
    """
    if not 1 <= n_student <= n_teacher:
        raise ValueError(
            f"the student needs between 1 and {n_teacher} layers, as its teacher; got {n_student}"
        )
    step = (n_teacher - 1) / max(n_student - 1, 1)
    return tuple(int(i * step + 0.5) for i in range(n_student))


@torch.no_grad()
def initialise(
    student: nn.Module, teacher: nn.Module, layers: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Start a student from its teacher: embeddings and head are copied, and some of the blocks.

    Student and teacher have the same names and widths, and one list of blocks called `blocks`. A
    teacher with segments, BERT, may have a student without, DistilBERT: the vector of segment 0 is
    added to the student's positions then, so that a student with all layers is its teacher. (The
    published script drops that vector.)

    Args:
        student: changed in place.
        teacher: stays as it is.
        layers: for each block of the student the number of the teacher's block; `alternate_layers`
            unless given.

    Returns:
        The layers that were taken.

    Raises:
        ValueError: a tensor of the student is missing in the teacher or has another shape, a layer
            does not exist, or there is not one for each block. The student is unchanged then.
    """
    n_teacher, n_student = len(_blocks(teacher)), len(_blocks(student))
    layers = tuple(alternate_layers(n_teacher, n_student) if layers is None else layers)
    if len(layers) != n_student or not all(0 <= layer < n_teacher for layer in layers):
        raise ValueError(
            f"expected {n_student} layers between 0 and {n_teacher - 1}, got {list(layers)}"
        )
    theirs, ours = teacher.state_dict(), student.state_dict()
    for name, tensor in theirs.items():
        position = name.replace("segment_embedding", "position_embedding")
        if name.endswith("segment_embedding.weight") and name not in ours and position in ours:
            theirs[position] = theirs[position] + tensor[0]
    start: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        source = _BLOCK.sub(lambda m: f"{m[1]}{layers[int(m[2])]}.", name)
        if source not in theirs:
            raise ValueError(f"the teacher has no {source}, which the student starts from")
        if theirs[source].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, the teacher's {source} "
                f"{tuple(theirs[source].shape)}: only depth may differ"
            )
        start[name] = theirs[source]
    student.load_state_dict(start)
    return layers


@contextmanager
def hidden_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, whatever runs through the model's blocks leaves its hidden states in the list.

        with hidden_states(teacher) as states:
            logits = teacher(tokens)
        states[-1]  # (B, T, D), what the last block gave

    One tensor a block and pass, in order, with its gradient. Blocks are those of one list called
    `blocks`.

    Raises:
        ValueError: the model has no such list, or several.
    """
    states: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: states.append(out))
        for block in _blocks(model)
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _blocks(model: nn.Module) -> nn.ModuleList:
    found = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "blocks" and isinstance(module, nn.ModuleList)
    }
    if len(found) != 1:
        raise ValueError(
            f"expected one list of blocks called 'blocks', found {list(found) or 'none'}"
        )
    return next(iter(found.values()))
