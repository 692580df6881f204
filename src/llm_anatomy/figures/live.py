"""Figures that compute while the reader plays, and so need a running kernel."""

from collections.abc import Sequence

import ipywidgets as widgets
import torch
from jaxtyping import Float
from torch import Tensor

from llm_anatomy import masks
from llm_anatomy.figures.blocks import Figure, matrix_html, panels, row, text
from llm_anatomy.figures.checks import check_finite, check_tokens
from llm_anatomy.figures.explorers import masked_weights

MOST = 10  # positions; a box for each pair of them has to fit the screen


def mask_painter(
    scores: Float[Tensor, "T S"],
    tokens: Sequence[str] | None = None,
    *,
    about: str = (
        "Paint a mask: tick where a query (row) may look at a key (column), "
        "and watch the attention weights follow."
    ),
) -> Figure:
    """Let the reader tick which keys each query may see, and compute the weights at each tick.

    The figure carries the class `needs-kernel`: on the book's page, where nothing can be computed,
    a line stands in its place.

    Args:
        scores: what the softmax is taken of, at most 10 by 10.
        tokens: names of the positions; 0, 1, 2, … unless given.
        about: what the figure shows.

    Raises:
        ValueError: scores that are not a square matrix of at most 10 positions, or not finite.
    """
    scores = check_finite(scores, "scores")
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) > MOST:
        raise ValueError(f"scores must be (T, T) with T at most {MOST}, got {tuple(scores.shape)}")
    T = len(scores)
    tokens = check_tokens([str(t) for t in range(T)] if tokens is None else tokens, T, "tokens")
    panel = panels()
    view = panel("")
    narrow = widgets.Layout(width="auto")
    plain = {"description_width": "0"}
    boxes = [
        [
            widgets.Checkbox(
                value=True, indent=False, layout=narrow, style=plain,
                tooltip=f"may {query} look at {key}?",
            )
            for key in tokens
        ]
        for query in tokens
    ]  # fmt: skip
    painting = False  # set while a whole mask is laid down, to compute once and not T² times

    def paint(change: object = None) -> None:
        if not painting:
            mask = torch.tensor([[box.value for box in line] for line in boxes])
            view.value = matrix_html(
                masked_weights(scores, mask).tolist(), tokens, tokens, "weights"
            )

    def lay(mask: Tensor) -> None:
        nonlocal painting
        painting = True
        for line, values in zip(boxes, mask.tolist(), strict=True):
            for box, value in zip(line, values, strict=True):
                box.value = value
        painting = False
        paint()

    for box in (box for line in boxes for box in line):
        box.observe(paint, "value")
    presets = {
        "all": torch.ones(T, T, dtype=torch.bool),
        "causal": masks.causal(T)[0, 0],
        "none": torch.zeros(T, T, dtype=torch.bool),
    }
    buttons = [widgets.Button(description=name, layout=narrow) for name in presets]
    for button, mask in zip(buttons, presets.values(), strict=True):
        button.on_click(lambda _, mask=mask: lay(mask))
    paint()

    names = [panel(f"<p>{text(token)}") for token in tokens]
    corner = panel("")
    grid = widgets.GridBox(
        [
            corner,
            *names,
            *(cell for name, line in zip(names, boxes, strict=True) for cell in (name, *line)),
        ],
        layout=widgets.Layout(
            grid_template_columns=f"max-content repeat({T}, minmax(32px, max-content))"
        ),
    )
    grid.add_class("la-grid")
    figure = Figure([row(buttons), row([grid, view])], about)
    figure.add_class("needs-kernel")
    return figure
