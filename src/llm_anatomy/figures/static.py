"""Pictures drawn with matplotlib, in one style, and the one way to show them: with alt text.

A white ground reads on light and on dark pages, the first colours are those of Okabe and Ito (safe
for the common kinds of colour blindness), every series also differs by line and marker, and the
type stays legible when a phone shrinks the picture to 340 pixels.
"""

import base64
import io
import sys
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from IPython.display import display
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from llm_anatomy.figures.checks import check_finite, check_tokens, check_weights

DPI = 192  # twice the 96 pixels of a CSS inch: sharp on dense screens
WIDTH = 5.0  # inches; a phone shows 340 of the 480 pixels
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#7a3e9d", "#000000", "#996b00")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = "osD^vX"
STYLE = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same letters everywhere
    "font.size": 12,
    "lines.linewidth": 2.0,
    "lines.markersize": 5,
}


def show(figure: Figure, *, alt: str) -> None:
    """Display a figure as a PNG that carries `alt`, and close it.

    The text travels in the output's metadata, where the book and nbconvert pick it up for the
    `<img>`, and as the output's plain text, for readers without pictures. The same figure gives
    the same bytes on every run.

    Args:
        alt: one or two sentences that say what the figure shows, not what kind of figure it is.

    Raises:
        ValueError: `alt` is empty.
    """
    if not alt.strip():
        raise ValueError("alt is empty: say in a sentence what the figure shows")
    alt = " ".join(alt.split())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    if "matplotlib.pyplot" in sys.modules:  # else the inline backend would show it a second time
        sys.modules["matplotlib.pyplot"].close(figure)
    png = base64.b64encode(buffer.getvalue()).decode()
    width = round(figure.get_figwidth() * 96)
    display(
        {"image/png": png, "text/plain": alt},
        metadata={"image/png": {"alt": alt, "width": width}},
        raw=True,
    )


def canvas(
    rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float = 3.2, **options: object
) -> tuple[Figure, object]:
    """Make an empty figure in the book's style, for plots that no function here draws.

    Args:
        width: inches; 5 keeps the type legible on a phone.
        options: go to `Figure.subplots`, such as `sharey=True`.

    Returns:
        The figure, and its axes (one `Axes`, or an array of them).
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, **options)


def heat_map(
    weights: Float[Tensor, "T S"],
    queries: Sequence[str],
    keys: Sequence[str] | None = None,
    *,
    title: str = "",
) -> Figure:
    """Draw attention weights as a grid: tokens at the rows and columns, a number in each cell.

    Args:
        keys: the tokens looked at; the queries themselves unless given.

    Raises:
        ValueError: wrong number of tokens, NaN, or a row that sums neither to 1 nor to 0.
    """
    keys = queries if keys is None else keys
    check_weights(weights, "weights")
    check_tokens(queries, weights.shape[0], "queries")
    check_tokens(keys, weights.shape[1], "keys")
    T, S = weights.shape
    figure, axes = canvas(width=max(WIDTH, 1.2 + 0.55 * S), height=1.2 + 0.42 * T)
    with mpl.rc_context(STYLE):
        axes.imshow(weights.detach().cpu().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(S), keys, rotation=45 if max(map(len, keys)) > 4 else 0)
        axes.set_yticks(range(T), queries)
        axes.set_xlabel("key (looked at)")
        axes.set_ylabel("query (looks)")
        axes.set_title(title)
        _grid_lines(axes, T, S)
        if S <= 12:
            for i, row in enumerate(weights.tolist()):
                for j, weight in enumerate(row):
                    colour = "white" if weight > 0.55 else "black"
                    axes.text(
                        j, i, f"{weight:.2f}", ha="center", va="center", color=colour, size=10
                    )
    return figure


def line_plot(
    x: Sequence[float],
    series: Mapping[str, Sequence[float] | Float[Tensor, "*runs n"]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """Draw one named line for each series, with a band where there are several runs.

    Args:
        series: name to values, one a point of `x`; or to a (runs, points) tensor, drawn as the
            mean with a band from the smallest to the largest run.

    Raises:
        ValueError: no series, a length other than that of `x`, or a value that is not finite.
    """
    if not series:
        raise ValueError("series is empty: nothing to draw")
    if len(series) > len(COLOURS):
        raise ValueError(f"{len(series)} series; a reader can tell at most {len(COLOURS)} apart")
    figure, axes = canvas()
    with mpl.rc_context(STYLE):
        for number, (name, values) in enumerate(series.items()):
            runs = check_finite(values, f"series {name!r}")
            runs = runs.reshape(-1, runs.shape[-1])  # (runs, points)
            if runs.shape[-1] != len(x):
                raise ValueError(f"series {name!r} has {runs.shape[-1]} points, x has {len(x)}")
            line = axes.plot(
                x,
                runs.mean(dim=0),
                label=name,
                color=COLOURS[number],
                linestyle=LINES[number],
                marker=MARKERS[number] if len(x) <= 12 else None,
            )
            if len(runs) > 1:
                low, high = runs.amin(dim=0), runs.amax(dim=0)
                axes.fill_between(x, low, high, color=line[0].get_color(), alpha=0.2, linewidth=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(title)
        if log_x:
            axes.set_xscale("log")
        if log_y:
            axes.set_yscale("log")
        if len(series) > 1:
            axes.legend()
    return figure


def mask_pictures(masks: Mapping[str, Bool[Tensor, "_ _"]], *, columns: int = 3) -> Figure:
    """Draw masks side by side: a filled square where a query (row) may look at a key (column).

    Raises:
        ValueError: no masks, or one that is not a boolean matrix.
    """
    if not masks:
        raise ValueError("masks is empty: nothing to draw")
    for name, mask in masks.items():
        if mask.ndim != 2 or mask.dtype is not mask.bool().dtype or mask.numel() == 0:
            raise ValueError(
                f"mask {name!r} must be a boolean matrix, got {tuple(mask.shape)} of {mask.dtype}"
            )
    columns = min(columns, len(masks))
    rows = -(-len(masks) // columns)
    figure, grid = canvas(rows, columns, height=0.4 + 1.8 * rows, squeeze=False)
    with mpl.rc_context(STYLE):
        for axes in grid.flat[len(masks) :]:
            axes.remove()
        for axes, (name, mask) in zip(grid.flat, masks.items(), strict=False):
            shades = ListedColormap(["#f2f2f2", COLOURS[0]])
            axes.imshow(mask.cpu().numpy(), cmap=shades, vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(name)
            _grid_lines(axes, *mask.shape)
        grid[0, 0].set_ylabel("queries")
        grid[-1, 0].set_xlabel("keys")
    return figure


def _grid_lines(axes: Axes, T: int, S: int) -> None:
    """Part the cells of an image by white lines."""
    axes.set_xticks([s - 0.5 for s in range(S + 1)], minor=True)
    axes.set_yticks([t - 0.5 for t in range(T + 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
