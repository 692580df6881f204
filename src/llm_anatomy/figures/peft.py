"""The interactive figures on parameter-efficient fine-tuning.

Two are pages made beforehand, as the other explorers are. The calculator has too many choices for
that: it computes in the page, by a script of its own, from numbers that `llm_anatomy.peft.counts`
gave. Every count is a straight line in the one size that can be chosen, so two numbers a count are
enough, and the formulas themselves are written in Python alone.
"""

import base64
import importlib.resources
import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llm_anatomy.figures.blocks import (
    Figure,
    control,
    nested,
    number,
    panels,
    row,
    scroll,
    stylesheet,
    text,
)
from llm_anatomy.figures.checks import check_finite
from llm_anatomy.peft import counts
from llm_anatomy.peft.counts import Shape

# --- A weight update and its best approximations of low rank --------------------------------------

WIDEST = 96  # rows or columns of a matrix that is drawn as a picture
STEPS = 10  # shades from 0 to the largest number, on either side
ABOVE, BELOW = (0, 114, 178), (213, 94, 0)  # blue and orange: safe for colour blindness


def rank_explorer(
    delta: Float[Tensor, "_ _"],
    ranks: Sequence[int] | None = None,
    *,
    about: str = (
        "A weight update and its best approximation of rank r. Move the slider: the bars are the "
        "singular values, filled where they are kept, and the pictures show the matrix that they "
        "make and the update itself: blue above 0, orange below, stronger where larger."
    ),
) -> Figure:
    """Show how much of a matrix its r largest singular values hold.

    The approximation is the nearest matrix of rank r (Eckart and Young, 1936): it keeps the r
    largest singular values. LoRA's two factors can express it, and nothing nearer.

    Args:
        delta: what fine-tuning added to a weight, at most 96 by 96.
        ranks: what the slider offers; about ten, from 0 to the full rank, unless given.
        about: what the figure shows.

    Raises:
        ValueError: not a matrix of at most 96 by 96, zero or not finite, or a rank out of range.
    """
    delta = check_finite(delta, "delta")
    if delta.ndim != 2 or max(delta.shape) > WIDEST:
        raise ValueError(
            f"delta must be a matrix of at most {WIDEST} by {WIDEST}, got {tuple(delta.shape)}"
        )
    if not delta.any():
        raise ValueError("delta is all zeros: there is nothing to approximate")
    n_rows, n_columns = delta.shape
    full = min(delta.shape)
    if ranks is None:
        ranks = sorted(
            {r for r in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if r < full} | {full}
        )
    if not ranks or not all(0 <= r <= full for r in ranks):
        raise ValueError(f"ranks must lie between 0 and {full}, got {list(ranks)}")
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    size = delta.abs().max().item()
    share = values.square().cumsum(0) / values.square().sum()  # of the sum of squares

    def page(r: int) -> str:
        kept = share[r - 1].item() if r else 0.0
        error = math.sqrt(max(0.0, 1.0 - kept)) if r < full else 0.0
        near = (left[:, :r] * values[:r]) @ right[:r]
        summary = (
            f"Rank {r} of {full} keeps {number(100 * kept, 1)} % of the sum of squares: the "
            f"relative error is {number(100 * error, 1)} %. Its two factors hold "
            f"{r} · ({n_rows} + {n_columns}) = {r * (n_rows + n_columns):,} numbers, the whole "
            f"matrix {n_rows * n_columns:,}."
        )
        picture = _picture(near, size, f"The approximation of rank {r}")
        return f"<p>{summary}<div class=la-pair>{_spectrum(values.tolist(), r)}{picture}</div>"

    middle = min(ranks, key=lambda r: abs(r - full // 4))
    knob = control("rank r", [int(r) for r in ranks], int(middle))
    panel = panels()
    rows = "".join(
        f"<tr><td>{i}<td>{value:.3g}<td>{number(100 * part, 1)}"
        for i, (value, part) in enumerate(zip(values.tolist(), share.tolist(), strict=True), 1)
    )
    table = (
        "<details><summary>The singular values as a table</summary>"
        + scroll(
            "<table><tr><th scope=col>rank<th scope=col>singular value"
            f"<th scope=col>kept up to here, %{rows}</table>",
            "singular values",
        )
        + "</details>"
    )
    whole = panel(_picture(delta, size, "The update itself"))
    pages = nested(page, [knob], [ranks])
    return Figure([row([knob]), row([pages, whole]), panel(_style() + table)], about)


def _style() -> str:
    """The rules of these figures alone, for one of their panels."""
    rules = importlib.resources.files("llm_anatomy.figures").joinpath("peft.css").read_text("utf-8")
    plain = re.sub(r"/\*.*?\*/|\n", " ", rules).strip()
    return f"<style>{plain}</style>"


def _spectrum(values: Sequence[float], r: int) -> str:
    """Draw singular values as bars, the first r of them filled."""
    step = 256 / len(values)
    wide = max(step - 1, step * 0.6)
    scale = 120 / values[0]

    def bars(first: int, last: int) -> str:
        return "".join(
            f"M{number(48 + i * step, 1)} 138v-{number(values[i] * scale, 1)}"
            f"h{number(wide, 1)}V138z"
            for i in range(first, last)
        )

    summary = f"{len(values)} singular values, the largest {values[0]:.3g}; the first {r} are kept"
    labels = [
        (44, 22, "end", f"{values[0]:.3g}"),
        (44, 142, "end", "0"),
        (52, 154, "middle", 1),
        (300, 154, "middle", len(values)),
        (176, 172, "middle", "singular value, by rank"),
    ]
    return (
        f'<svg viewBox="0 0 320 180" role=img aria-label="{summary}">'
        f'<path class=la-axis d="M48 14V138H306"/><path class=la-kept d="{bars(0, r)}"/>'
        f'<path class=la-axis d="{bars(r, len(values))}"/>{_texts(labels)}</svg>'
    )


def _picture(matrix: Tensor, size: float, caption: str) -> str:
    """Show a matrix as an image: one pixel a number, clear where it is 0."""
    n_rows, n_columns = matrix.shape
    shades = (matrix / size * STEPS).round().clamp(-STEPS, STEPS).to(torch.int64) + STEPS
    source = base64.b64encode(_png(shades.tolist())).decode()
    alt = f"{caption}, {n_rows} rows by {n_columns} columns"
    return (
        f"<div class=la-picture><p>{text(caption)}"
        f'<img src="data:image/png;base64,{source}" alt="{text(alt)}" '
        f"style=width:{min(320, 6 * n_columns)}px></div>"
    )


def _png(levels: Sequence[Sequence[int]]) -> bytes:
    """Write levels from 0 to 2 · STEPS as a PNG with a palette, not packed: everywhere the same."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    shades = range(-STEPS, STEPS + 1)
    palette = b"".join(bytes(BELOW if shade < 0 else ABOVE) for shade in shades)
    alpha = bytes(round(255 * abs(shade) / STEPS) for shade in shades)
    lines = b"".join(b"\0" + bytes(line) for line in levels)
    header = struct.pack(">IIBBBBB", len(levels[0]), len(levels), 8, 3, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (
            chunk(b"IHDR", header),
            chunk(b"PLTE", palette),
            chunk(b"tRNS", alpha),
            chunk(b"IDAT", zlib.compress(lines, 0)),
            chunk(b"IEND", b""),
        )
    )


# --- How many parameters a method trains ----------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A method of the calculator.

    Fields:
        trained: the parameters that it trains, of a shape and a size.
        knob: what the size is; empty where there is none.
        usual: the size at first.
        stored: the numbers that one task needs afterwards, where they are others.
        inside: whether what it trains is part of the model already.
    """

    trained: Callable[[Shape, int], int]
    knob: str = ""
    usual: int = 1
    stored: Callable[[Shape, int], int] | None = None
    inside: bool = False


def _lora(*targets: str) -> Callable[[Shape, int], int]:
    return lambda shape, r: counts.lora(shape, r, targets or counts.every_matrix(shape))


RANK, WIDTH, LENGTH = "rank r", "bottleneck width m", "virtual tokens P"
METHODS = {
    "full fine-tuning": Method(lambda shape, _: counts.full(shape), inside=True),
    "LoRA on q, v": Method(_lora("q_proj", "v_proj"), RANK, 8),
    "LoRA on q, k, v, o": Method(_lora("q_proj", "k_proj", "v_proj", "o_proj"), RANK, 8),
    "LoRA on every matrix": Method(_lora(), RANK, 8),
    "LoRA on c_attn (q, k, v fused)": Method(_lora("qkv_proj"), RANK, 8),
    "adapters, Houlsby": Method(counts.houlsby, WIDTH, 64),
    "adapters, Pfeiffer": Method(counts.pfeiffer, WIDTH, 64),
    "BitFit": Method(lambda shape, _: counts.bitfit(shape), inside=True),
    "(IA)³": Method(lambda shape, _: counts.ia3(shape)),
    "prompt tuning": Method(counts.prompt, LENGTH, 20),
    "prefix tuning": Method(counts.prefix, LENGTH, 20),
    "prefix tuning, reparametrised": Method(
        counts.prefix_reparametrised, LENGTH, 20, stored=counts.prefix
    ),
}
BYTES = {"float32: 4 bytes": 4, "bfloat16: 2 bytes": 2}


class ScriptFigure:
    """A figure of plain HTML that computes in the page, by a script of its own.

    Where scripts do not run it shows what it showed at first.
    """

    def __init__(self, about: str, content: str, script: str) -> None:
        if not about.strip():
            raise ValueError("about is empty: say in a sentence what the figure shows")
        self.about = " ".join(about.split())
        self.html = (
            f"<div class=la><style>{stylesheet()}</style>{_style()}"
            f"<p class=la-about>{text(self.about)}{content}</div><script>{script}</script>"
        )

    def __repr__(self) -> str:
        return self.about

    def _repr_mimebundle_(self, **options: object) -> dict[str, str]:
        return {"text/plain": self.about, "text/html": self.html}


def peft_calculator(
    shapes: Mapping[str, Shape] = counts.SHAPES,
    *,
    about: str = (
        "How many parameters a method trains, and what that takes. Choose a model, a method and "
        "its size; the page computes the rest."
    ),
) -> ScriptFigure:
    """Let the reader compute trainable parameters, their share, and bytes, for models of real size.

    Args:
        shapes: name to sizes of the models to choose from.
        about: what the figure shows.

    Raises:
        ValueError: no shapes.
    """
    if not shapes:
        raise ValueError("shapes is empty: no model to choose from")
    data = {
        "models": [
            [name, counts.full(shape), [_lines(method, shape) for method in METHODS.values()]]
            for name, shape in shapes.items()
        ],
        "methods": [[method.knob, method.usual, method.inside] for method in METHODS.values()],
    }
    packed = json.dumps(data, separators=(",", ":"))
    model, start = next(iter(shapes)), 1
    name = list(METHODS)[start]
    method = METHODS[name]
    shown = calculate(shapes[model], method, method.usual, 4)
    rows = "".join(f"<tr><th scope=row>{key}<td>{value}" for key, value in shown.items())
    form = (
        f"<form class=la-form hidden data-numbers='{text(packed)}'>"
        f"{_select('model', shapes, 0)}{_select('method', METHODS, start)}"
        f"<label><span>{method.knob}</span> "
        f"<input name=size type=number min=1 step=1 value={method.usual}></label>"
        f"{_select('numbers', BYTES, 0)}</form>"
    )
    table = f"<table><tbody>{rows}</table>"
    caption = f"{model}, {name}, {method.knob} = {method.usual}, 4 bytes a number"
    script = (
        importlib.resources.files("llm_anatomy.figures")
        .joinpath("calculator.js")
        .read_text("utf-8")
    )
    return ScriptFigure(
        about,
        f"{form}<div class=la-result><p role=status>{text(caption)}</p>{table}</div>"
        f"{_overview(shapes)}",
        script,
    )


def calculate(shape: Shape, method: Method, size: int, n_bytes: int) -> dict[str, str]:
    """Return what the calculator shows, as text, by the name of the row.

    Training holds the weights, and for each number that trains its gradient and AdamW's two running
    averages, all in the same type; activations come on top.
    """
    whole = counts.full(shape)
    trained = method.trained(shape, size)
    stored = trained if method.stored is None else method.stored(shape, size)
    weights = whole if method.inside else whole + trained
    return {
        "parameters of the model": f"{whole:,}",
        "trainable parameters": f"{trained:,}",
        "share of the model": f"{digits(100 * trained / whole)} %",
        "stored for one task": size_of(n_bytes * stored),
        "weights in training": size_of(n_bytes * weights),
        "gradients and AdamW's averages": size_of(3 * n_bytes * trained),
    }


def digits(value: float) -> str:
    """Round to three digits that count, and write no exponent."""
    places = 0 if value == 0 else max(0, 2 - math.floor(math.log10(value)))
    return f"{value:.{places}f}"


def size_of(n_bytes: int) -> str:
    """Write bytes in the unit that suits: a kB has 1000."""
    for unit, power in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= power:
            return f"{digits(n_bytes / power)} {unit}"
    return f"{n_bytes} bytes"


def _lines(method: Method, shape: Shape) -> list[int]:
    """Return trained and stored numbers as lines over the size, and the largest size.

    Each line is its height at 0 and its slope.
    """
    stored = method.trained if method.stored is None else method.stored
    lines = []
    for count in (method.trained, stored):
        slope = count(shape, 2) - count(shape, 1)
        lines += [count(shape, 1) - slope, slope]
    narrowest = min(shape.d_model, shape.width)
    largest = {RANK: narrowest, WIDTH: shape.d_ff, LENGTH: 2048}
    return [*lines, largest.get(method.knob, 1)]


def _select(name: str, options: Collection[str], start: int) -> str:
    items = "".join(
        f"<option value={i}{' selected' if i == start else ''}>{text(option)}"
        for i, option in enumerate(options)
    )
    return (
        f"<label><span>{name}</span> <select name={name} aria-label={name} autocomplete=off>"
        f"{items}</select></label>"
    )


def _overview(shapes: Mapping[str, Shape]) -> str:
    """Write the trainable parameters of all models and methods, at the usual sizes, as a table."""
    head = "".join(f"<th scope=col>{text(name)}" for name in shapes)
    body = "".join(
        f"<tr><th scope=row>{text(name)}{f', {m.knob} = {m.usual}' if m.knob else ''}"
        + "".join(f"<td>{m.trained(shape, m.usual):,}" for shape in shapes.values())
        for name, m in METHODS.items()
    )
    table = scroll(f"<table><tr><td>{head}{body}</table>", "trainable parameters of all models")
    return f"<details><summary>All models and methods as a table</summary>{table}</details>"


# --- Methods side by side -------------------------------------------------------------------------


def method_comparison(
    methods: Sequence[str],
    columns: Mapping[str, Float[Tensor, "*axes"]],
    *,
    across: Sequence[str],
    up: Sequence[str],
    log: Collection[str] = (),
    about: str = (
        "Methods compared: each numbered point is a method, and the table below names it. Bars "
        "reach one standard error of the mean over the seeds up and down. Choose the axes."
    ),
) -> Figure:
    """Show methods as points, with a choice of what each axis shows.

    Args:
        methods: their names.
        columns: name to one number a method; or to a (methods, seeds) tensor, shown as the mean
            with a bar of one standard error, which is the standard deviation over the square root
            of the number of seeds.
        across: the columns to choose from for the horizontal axis.
        up: those for the vertical axis.
        log: columns with a logarithmic axis.
        about: what the figure shows.

    Raises:
        ValueError: no methods, a column that is unknown or of another length, a number that is not
            finite, a single seed, or a number on a logarithmic axis that is not above 0.
    """
    if not methods:
        raise ValueError("methods is empty: nothing to compare")
    measured = {}
    for name, values in columns.items():
        tensor = check_finite(values, f"column {name!r}")
        if tensor.ndim == 0 or len(tensor) != len(methods):
            rows = len(tensor) if tensor.ndim else 1
            raise ValueError(f"column {name!r} has {rows} rows for {len(methods)} methods")
        if tensor.ndim > 2 or (tensor.ndim == 2 and tensor.shape[1] < 2):
            raise ValueError(
                f"column {name!r} must be (methods,), or (methods, seeds) with at least 2 seeds; "
                f"got {tuple(tensor.shape)}"
            )
        if name in log and tensor.min() <= 0:
            raise ValueError(f"column {name!r} has a logarithmic axis and must be above 0")
        if tensor.ndim == 2:
            error = tensor.std(dim=1) / math.sqrt(tensor.shape[1])
            measured[name] = [tensor.mean(dim=1).tolist(), error.tolist()]
        else:
            measured[name] = [tensor.tolist(), None]
    for name in (*across, *up, *log):
        if name not in measured:
            raise ValueError(f"no column is named {name!r}: there are {', '.join(measured)}")

    def page(x: str, y: str) -> str:
        return _scatter_html(methods, x, y, measured, log)

    knobs = [control("across", list(across)), control("up", list(up))]
    pages = nested(page, knobs, [across, up])
    choices = [knob for knob in knobs if len(knob.options) > 1]  # of one there is no choice
    return Figure([*([row(choices)] if choices else []), pages, panels()(_style())], about)


LEFT, RIGHT, TOP, BOTTOM = 52, 292, 12, 206  # of the plot, in a picture of 320 by 250


def _scatter_html(
    methods: Sequence[str],
    x: str,
    y: str,
    measured: Mapping[str, list],
    log: Collection[str],
) -> str:
    """Draw one column over another, with the table of both below."""
    (xs, x_errors), (ys, y_errors) = measured[x], measured[y]
    place_x, ticks_x = _axis(xs, x_errors, x in log, LEFT, RIGHT)
    place_y, ticks_y = _axis(ys, y_errors, y in log, BOTTOM, TOP)
    points = [(place_x(a), place_y(b)) for a, b in zip(xs, ys, strict=True)]
    bars = ""
    for i, (across, down) in enumerate(points):
        if y_errors:
            low, high = place_y(ys[i] - y_errors[i]), place_y(ys[i] + y_errors[i])
            bars += f"M{across} {low}V{high}"
        if x_errors:
            low, high = place_x(xs[i] - x_errors[i]), place_x(xs[i] + x_errors[i])
            bars += f"M{low} {down}H{high}"
    circles = "".join(f"<circle cx={a} cy={b} r=4 />" for a, b in points)
    labels = [
        *((at, BOTTOM + 16, "middle", name) for at, name in ticks_x),
        *((LEFT - 5, at + 4, "end", name) for at, name in ticks_y),
        ((LEFT + RIGHT) / 2, BOTTOM + 36, "middle", text(x)),
        *_beside(points),
    ]
    marks = "".join(f"M{at} {BOTTOM}v4" for at, _ in ticks_x)
    marks += "".join(f"M{LEFT} {at}h-4" for at, _ in ticks_y)
    best = max(range(len(ys)), key=ys.__getitem__)
    summary = f"{y} over {x} for {len(methods)} methods; {y} is largest for {methods[best]}"
    svg = (
        f'<svg viewBox="0 0 320 250" role=img aria-label="{text(summary)}">'
        f'<path class=la-axis d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}{marks}"/>'
        f'<path class=la-error d="{bars}"/>{circles}{_texts(labels)}</svg>'
    )
    body = "".join(
        f"<tr><td>{i + 1}<th scope=row>{text(method)}"
        f"<td>{_value(xs, x_errors, i)}<td>{_value(ys, y_errors, i)}"
        for i, method in enumerate(methods)
    )
    table = (
        f"<table><caption>{text(y)} over {text(x)}</caption><tr><th scope=col>no."
        f"<th scope=col>method<th scope=col>{text(x)}<th scope=col>{text(y)}{body}</table>"
    )
    return f"<p>Up: {text(y)}<div class='la-pair la-names'>{svg}{scroll(table, summary)}</div>"


def _axis(
    values: Sequence[float],
    errors: Sequence[float] | None,
    logarithmic: bool,
    start: int,
    end: int,
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Return where a value lies between two ends of a picture, and the axis's marks with names."""
    errors = [0.0] * len(values) if errors is None else errors
    low = min(v - e for v, e in zip(values, errors, strict=True))
    high = max(v + e for v, e in zip(values, errors, strict=True))
    if logarithmic:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(high))
        high = max(high, low + 1)
        step = -(-(high - low) // 5)
        marks = [(power, _power(power)) for power in range(low, high + 1, step)]
    else:
        step = _round_step((high - low) / 4 or abs(high) or 1.0)
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        high = high if high > low else low + step
        places = max(0, -math.floor(math.log10(step)))
        n = round((high - low) / step)
        marks = [(low + i * step, number(low + i * step, places)) for i in range(n + 1)]

    def place(value: float) -> float:
        at = (math.log10(value) if value > 0 else low) if logarithmic else value
        share = min(max((at - low) / (high - low), 0.0), 1.0)
        return round(start + share * (end - start), 1)

    there = [round(start + (at - low) / (high - low) * (end - start), 1) for at, _ in marks]
    return place, list(zip(there, (name for _, name in marks), strict=True))


def _round_step(rough: float) -> float:
    """Return the smallest of 1, 2, 5, 10, … (and their tenths) that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _power(power: int) -> str:
    """Write a power of ten as a reader says it."""
    names = {0: "1", 1: "10", 2: "100", 3: "1k", 4: "10k", 5: "100k", 6: "1M", 7: "10M", 8: "100M"}
    return names.get(power, f"1e{power}")


def _beside(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, str, int]]:
    """Place each point's number at its side, where it covers neither a point nor a number."""
    offsets = [
        (side * far, 4 + 10 * up) for far in (13, 26) for up in (0, -1, 1) for side in (1, -1)
    ]
    placed: list[tuple[float, float]] = []

    def covered(x: float, y: float) -> int:
        near = sum(abs(x - a) < 12 and abs(y - 4 - b) < 9 for a, b in points)
        return near + sum(abs(x - a) < 15 and abs(y - b) < 11 for a, b in placed)

    for a, b in points:
        free = [(round(a + da, 1), round(b + db, 1)) for da, db in offsets]
        placed.append(min(free, key=lambda at: covered(*at)))
    return [(x, y, "middle", i) for i, (x, y) in enumerate(placed, 1)]


def _value(values: Sequence[float], errors: Sequence[float] | None, i: int) -> str:
    """Write a number, whole ones in full; with an error, to two digits of the largest error."""
    if errors is not None:
        largest = max(errors)
        places = 3 if largest == 0 else min(max(0, 1 - math.floor(math.log10(largest))), 6)
        return f"{number(values[i], places)} ± {number(errors[i], places)}"
    return f"{values[i]:,.0f}" if values[i] == round(values[i]) else f"{values[i]:.3g}"


def _texts(labels: Sequence[tuple[float | int, float | int, str, object]]) -> str:
    return "".join(
        f"<text x={x} y={y} text-anchor={side}>{label}</text>" for x, y, side, label in labels
    )
