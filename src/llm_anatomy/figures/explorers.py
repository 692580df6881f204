"""The interactive figures of the chapters."""

import math
from collections.abc import Callable, Mapping, Sequence

import ipywidgets as widgets
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_anatomy import masks
from llm_anatomy.attention import scaled_dot_product_attention
from llm_anatomy.figures.blocks import (
    Figure,
    bars_html,
    control,
    grid_of_frames,
    matrix_html,
    nested,
    number,
    row,
    row_picker,
    scroll,
    switch,
    text,
)
from llm_anatomy.figures.checks import check_finite, check_tokens, check_weights


def attention_explorer(
    sentences: Sequence[Sequence[str]],
    weights: Sequence[Float[Tensor, "L H _ _"]],
    *,
    about: str = (
        "Attention weights, a row for each query and a column for each key. Choose a sentence, a "
        "layer, a head and a query: the framed row, and the bars, show how that query divides its "
        "attention."
    ),
) -> Figure:
    """Let the reader walk through the attention weights of a model.

    Args:
        sentences: the tokens of each sentence.
        weights: for each sentence all its self-attention weights.
        about: what the figure shows.

    Raises:
        ValueError: no sentences, counts that do not fit, NaN, or a row that sums neither
            to 1 nor to 0.
    """
    if not sentences or len(sentences) != len(weights):
        raise ValueError(
            f"there are {len(sentences)} sentences and {len(weights)} sets of weights; "
            "give at least one sentence, and as many sets"
        )
    checked = [_square(each, 4, f"weights[{n}]") for n, each in enumerate(weights)]
    for n, (tokens, each) in enumerate(zip(sentences, checked, strict=True)):
        check_tokens(tokens, each.shape[-1], f"sentences[{n}]")
        if each.shape[:2] != checked[0].shape[:2]:
            raise ValueError(
                f"weights[{n}] has {each.shape[0]} layers and {each.shape[1]} heads, "
                f"weights[0] has {checked[0].shape[0]} and {checked[0].shape[1]}"
            )
    L, H = checked[0].shape[:2]
    titles = [f"{n} {' '.join(tokens)}" for n, tokens in enumerate(sentences)]
    sentence = control(
        "sentence", [title if len(title) < 48 else title[:47] + "…" for title in titles]
    )
    layer, head = _numbered("layer", L), _numbered("head", H)

    def body(tokens: Sequence[str], each: Tensor) -> widgets.Widget:
        def page(layer: int, head: int) -> str:
            lines = each[layer, head].tolist()
            caption = f"layer {layer}, head {head}"
            bars = "".join(
                bars_html(line, tokens, _looks(tokens[i], line), row=i)
                for i, line in enumerate(lines)
            )
            matrix = matrix_html(lines, tokens, tokens, caption)
            return f"<div class=la-pair>{matrix}{bars}</div>"

        pages = nested(page, [layer, head], [range(L), range(H)])
        return widgets.VBox([*row_picker("query", tokens), pages])

    bodies = [body(tokens, each) for tokens, each in zip(sentences, checked, strict=True)]
    knobs = [
        knob for knob, n in ((sentence, len(bodies)), (layer, L), (head, H)) if n > 1
    ]  # nothing to choose from one
    shown = bodies[0] if len(bodies) == 1 else switch(sentence, bodies)
    return Figure([row(knobs), shown], about, rows=max(each.shape[-1] for each in checked))


def heads_viewer(
    tokens: Sequence[str],
    weights: Float[Tensor, "*L H _ _"],
    *,
    about: str = (
        "Attention weights of all heads side by side. Choose a query to frame its row in each "
        "head: the heads divide the same sentence in different ways."
    ),
) -> Figure:
    """Show every head of a layer at once, with one query's row framed in all of them.

    Args:
        tokens: the sentence.
        weights: (H, T, T) of one layer, or (L, H, T, T) with a control for the layer.
        about: what the figure shows.

    Raises:
        ValueError: counts that do not fit, NaN, or a row that sums neither to 1 nor to 0.
    """
    weights = weights[None] if weights.ndim == 3 else weights
    weights = _square(weights, 4, "weights")
    tokens = check_tokens(tokens, weights.shape[-1], "tokens")
    L, H = weights.shape[:2]

    def page(layer: int) -> str:
        heads = [
            matrix_html(
                weights[layer, head].tolist(), tokens, tokens, f"layer {layer}, head {head}"
            )
            for head in range(H)
        ]
        return f"<div class='la-pair la-small'>{''.join(heads)}</div>"

    layer = _numbered("layer", L)
    picker = row_picker("query", tokens)
    knobs = [row([layer])] if L > 1 else []
    return Figure([*knobs, *picker, nested(page, [layer], [range(L)])], about, rows=len(tokens))


def softmax_temperature(
    logits: Float[Tensor, " V"],
    tokens: Sequence[str],
    temperatures: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 10.0),
    *,
    about: str = (
        "Softmax of the same logits at different temperatures: "
        "a low temperature sharpens the distribution, a high one flattens it."
    ),
) -> Figure:
    """Show the softmax of `logits / temperature` as bars, with its entropy.

    Args:
        logits: one for each token.
        tokens: their names.
        temperatures: what the slider offers.
        about: what the figure shows.

    Raises:
        ValueError: counts that do not fit, a logit that is not finite, a temperature not above 0.
    """
    logits = check_finite(logits, "logits")
    tokens = check_tokens(tokens, len(logits), "tokens")
    if not temperatures or min(temperatures) <= 0:
        raise ValueError(f"temperatures must be above 0, got {list(temperatures)}")

    def page(temperature: float) -> str:
        p = (logits / temperature).softmax(dim=-1)
        entropy = torch.special.entr(p).sum().item()  # nats
        title = (
            f"temperature {temperature}: entropy {number(entropy)} nats, as uncertain as "
            f"{number(torch.tensor(entropy).exp().item(), 1)} equally likely tokens"
        )
        return bars_html(p.tolist(), tokens, title)

    start = {"temperature": min(temperatures, key=lambda t: abs(t - 1))}
    return grid_of_frames(page, {"temperature": list(temperatures)}, about=about, start=start)


def mask_gallery(
    T: int = 6,
    scores: Float[Tensor, "T T"] | None = None,
    *,
    tokens: Sequence[str] | None = None,
    n_padding: int = 2,
    n_prefix: int | None = None,
    window: int = 3,
    about: str = (
        "Masks: where a query (row) may look at a key (column), "
        "and the weights that the softmax then gives to the same scores."
    ),
) -> Figure:
    """Show the usual masks, each with the attention weights that it leaves.

    The masks are those of `llm_anatomy.masks`, the weights those of
    `scaled_dot_product_attention`. The last choice joins a causal mask with padding on the left,
    as in batched generation: its first queries see nothing, and get zeros.

    Args:
        T: number of positions.
        scores: what the softmax is taken of; all equal unless given, so that each query divides
            its attention evenly over what it may see.
        tokens: names of the positions; 0, 1, 2, … unless given.
        n_padding: how many positions are padding, at either end.
        n_prefix: length of the prefix; half of the positions unless given.
        window: how many positions a sliding window holds.
        about: what the figure shows.

    Raises:
        ValueError: counts that do not fit, a score that is not finite, fewer than 2 positions.
    """
    if not 0 < n_padding < T:
        raise ValueError(f"n_padding must leave at least one of the {T} positions, got {n_padding}")
    scores = check_finite(torch.zeros(T, T) if scores is None else scores, "scores")
    if scores.shape != (T, T):
        raise ValueError(f"scores must be ({T}, {T}), got {tuple(scores.shape)}")
    tokens = check_tokens([str(t) for t in range(T)] if tokens is None else tokens, T, "tokens")
    n_prefix = T // 2 if n_prefix is None else n_prefix
    position = torch.arange(T)
    causal = masks.causal(T)
    document = position >= (T + 1) // 2  # two documents in one sequence
    gallery = {
        "full": torch.ones(1, 1, T, T, dtype=torch.bool),
        "causal": causal,
        f"padding: the last {n_padding} hidden": masks.padding((position < T - n_padding)[None]),
        f"prefix of {n_prefix}": masks.prefix(torch.tensor([n_prefix]), T),
        f"sliding window of {window}": masks.sliding_window(T, window),
        "two packed documents": causal & (document[:, None] == document),
        f"causal, the first {n_padding} padding": causal
        & masks.padding((position >= n_padding)[None]),
    }

    def page(name: str) -> str:
        mask = gallery[name].expand(1, 1, T, T)[0, 0]
        weights = masked_weights(scores, mask)
        blind = [tokens[i] for i in (~mask.any(dim=-1)).nonzero().flatten().tolist()]
        note = (
            f"<p>Queries {text(', '.join(blind))} see nothing. The softmax of a row of −∞ is "
            "0/0, not a number; here such a row gives zeros."
            if blind
            else ""
        )
        return (
            f"<div class=la-pair>{_mask_html(mask, tokens, name)}"
            f"{matrix_html(weights.tolist(), tokens, tokens, 'weights')}</div>{note}"
        )

    return grid_of_frames(page, {"mask": list(gallery)}, about=about)


def position_similarity(
    schemes: Mapping[str, Float[Tensor, "_ _"]],
    positions: Sequence[int] | None = None,
    *,
    about: str = (
        "How a position scheme relates two positions: the value for a fixed query position as a "
        "function of the offset to the key. A scheme that knows only relative positions gives the "
        "same curve at each query position."
    ),
) -> Figure:
    """Show for each scheme how similar, or how favoured, keys are at each offset from a query.

    Args:
        schemes: name to a (T, T) matrix of queries by keys: dot products of position vectors
            (sinusoidal, learned), scores of one content rotated to each position (RoPE), or a bias
            (ALiBi, T5). All of the same T.
        positions: the query positions to choose from; nine, evenly spaced, unless given.
        about: what the figure shows.

    Raises:
        ValueError: no schemes, a matrix that is not square or not finite, a position out of range.
    """
    if not schemes:
        raise ValueError("schemes is empty: nothing to draw")
    curves = {name: check_finite(matrix, f"schemes[{name!r}]") for name, matrix in schemes.items()}
    T = len(next(iter(curves.values())))
    for name, matrix in curves.items():
        if matrix.shape != (T, T) or T < 2:
            raise ValueError(
                f"schemes[{name!r}] must be a square matrix of at least 2 positions, as wide as "
                f"the others ({T}), got {tuple(matrix.shape)}"
            )
    if positions is None:
        positions = sorted({round(n * (T - 1) / 8) for n in range(9)})
    if not positions or not all(0 <= position < T for position in positions):
        raise ValueError(f"positions must lie between 0 and {T - 1}, got {list(positions)}")

    def page(name: str, position: int) -> str:
        return _curve_html(curves[name], name, position)

    controls = {"scheme": list(curves), "query position": list(positions)}
    middle = {"query position": positions[len(positions) // 2]}
    return grid_of_frames(page, controls, about=about, start=middle)


def depth_explorer(
    norms: Callable[..., Float[Tensor, " n"]],
    controls: Mapping[str, Sequence[object]],
    *,
    quantity: str = "gradient norm",
    decades: int = 12,
    start: Mapping[str, object] | None = None,
    about: str = (
        "The size of the gradient at each layer of a deep network, on a logarithmic axis. Choose "
        "how the network is built: a straight line down to the left is a gradient that vanishes."
    ),
) -> Figure:
    """Show one number for each layer on a logarithmic axis, for every combination of choices.

    Args:
        norms: called with one option of each control; returns the number at layer 0, 1, …, which
            is never negative. The pages share one axis, so that choices can be compared.
        controls: label to options.
        quantity: what the numbers are.
        decades: the axis runs from 10 to the power of -decades up to 10 to the power of decades;
            what lies beyond is drawn at the edge and stands in the table as it is.
        start: label to the option chosen at first.
        about: what the figure shows.

    Raises:
        ValueError: fewer than 2 layers, a number that is negative or not finite, or no decades.
    """
    if decades < 1:
        raise ValueError(f"decades must be at least 1, got {decades}")

    def page(*options: object) -> str:
        name = ", ".join(map(str, options))
        values = check_finite(norms(*options), f"the {quantity} for {name}")
        if values.ndim != 1 or len(values) < 2 or values.min() < 0:
            raise ValueError(
                f"the {quantity} for {name} must be at least 2 numbers, none negative; "
                f"got shape {tuple(values.shape)}"
            )
        return _depth_html(values.tolist(), name, quantity, decades)

    return grid_of_frames(page, controls, about=about, start=start)


def masked_weights(scores: Float[Tensor, "T S"], mask: Bool[Tensor, "T S"]) -> Float[Tensor, "T S"]:
    """Return the weights of given scores: the package's attention, with the scores as bias."""
    T, S = scores.shape
    nothing = torch.zeros(1, 1, T, 1, dtype=scores.dtype)
    keys = torch.zeros(1, 1, S, 1, dtype=scores.dtype)
    weights = scaled_dot_product_attention(
        nothing, keys, keys, mask[None, None], scores[None, None]
    )[1]
    return weights[0, 0]


def _mask_html(mask: Tensor, tokens: Sequence[str], name: str) -> str:
    """Write a boolean mask as a table of yes (shaded) and no."""
    head = "".join(f"<th scope=col>{text(token)}" for token in tokens)
    body = "".join(
        f"<tr><th scope=row>{text(token)}"
        + "".join("<td class=la-8>yes" if may else "<td class=la-0>no" for may in line)
        for token, line in zip(tokens, mask.tolist(), strict=True)
    )
    caption = f"{name}: may the query look?"
    return scroll(f"<table><caption>{text(caption)}</caption><tr><td>{head}{body}</table>", caption)


def _curve_html(matrix: Tensor, name: str, position: int) -> str:
    """Draw one row of a scheme's matrix over the offset, with its values as a table below."""
    T = len(matrix)
    low, high = min(matrix.min().item(), 0.0), max(matrix.max().item(), 0.0)
    scale = 120 / (high - low) if high > low else 0.0

    def across(offset: int) -> float:
        return round(40 + 260 * (offset + T - 1) / (2 * T - 2), 1)

    def down(value: float) -> float:
        return round(14 + (high - value) * scale, 1)

    values = [(key - position, value) for key, value in enumerate(matrix[position].tolist())]
    points = " ".join(f"{across(offset)},{down(value)}" for offset, value in values)
    here = matrix[position, position].item()
    spread = max(
        (line.max() - line.min()).item() for line in (matrix.diagonal(k) for k in range(1 - T, T))
    )
    middle = across(0)
    summary = (
        f"{name}, query at position {position}: from {number(values[0][1])} at offset "
        f"{values[0][0]} over {number(here)} at offset 0 to {number(values[-1][1])} at offset "
        f"{values[-1][0]}"
    )
    labels = [
        (36, down(high) + 4, "end", number(high)),
        (36, down(low) + 4, "end", number(low)),
        (across(1 - T), 154, "middle", 1 - T),
        (middle, 154, "middle", 0),
        (across(T - 1), 154, "middle", T - 1),
        (middle, 172, "middle", "offset: key position − query position"),
    ]
    texts = "".join(
        f"<text x={x} y={y} text-anchor={side}>{label}</text>" for x, y, side, label in labels
    )
    zero = down(0.0)
    svg = (
        f'<svg viewBox="0 0 320 180" role=img aria-label="{text(summary)}">'
        f'<path class=la-axis d="M40 14V138H300M40 {zero}H300M{middle} 14V138"/>'
        f'<polyline class=la-curve points="{points}"/>'
        f"<circle cx={middle} cy={down(here)} r=4 />{texts}</svg>"
    )
    rows = "".join(f"<tr><td>{offset}<td>{number(value, 3)}" for offset, value in values)
    verdict = (
        f"Over all query positions, values at equal offset differ by at most {number(spread)}: "
        + ("only the offset counts." if spread < 1e-4 else "the absolute position counts too.")
    )
    return (
        f"{svg}<p>{verdict}<details><summary>The values as a table</summary>"
        f"<table><caption>{text(name)}, query at position {position}</caption>"
        f"<tr><th scope=col>offset<th scope=col>value{rows}</table></details>"
    )


def _depth_html(values: Sequence[float], name: str, quantity: str, decades: int) -> str:
    """Draw positive numbers over the layers on a logarithmic axis, with a table below."""
    last = len(values) - 1

    def across(layer: int | float) -> float:
        return round(48 + 256 * layer / last, 1)

    def down(value: float) -> float:
        power = math.log10(value) if value > 0 else -decades
        return round(76 - 62 * min(max(power, -decades), decades) / decades, 1)

    points = " ".join(f"{across(layer)},{down(value)}" for layer, value in enumerate(values))
    summary = f"{name}: {quantity} {values[0]:.0e} at layer 0, {values[-1]:.0e} at layer {last}"
    if values[0] > 0 and values[-1] > 0:
        factor = (values[0] / values[-1]) ** (1 / last)
        verdict = f"On its way down, a layer multiplies it by {number(factor)} on average."
    else:
        verdict = "It is exactly 0 somewhere: nothing arrives."
    labels = [
        (44, 18, "end", f"1e{decades}"),
        (44, 80, "end", "1"),
        (44, 142, "end", f"1e−{decades}"),
        (across(0), 156, "middle", 0),
        (across(last / 2), 156, "middle", f"{last / 2:g}"),
        (across(last), 156, "middle", last),
        (across(last / 2), 174, "middle", "layer (0 is the input)"),
    ]
    texts = "".join(
        f"<text x={x} y={y} text-anchor={side}>{label}</text>" for x, y, side, label in labels
    )
    svg = (
        f'<svg viewBox="0 0 320 180" role=img aria-label="{text(summary)}">'
        f'<path class=la-axis d="M48 14V138H304M48 76H304"/>'
        f'<polyline class=la-curve points="{points}"/>{texts}</svg>'
    )
    rows = "".join(f"<tr><td>{layer}<td>{value:.1e}" for layer, value in enumerate(values))
    return (
        f"{svg}<p>{text(summary)}. {verdict}<details><summary>The values as a table</summary>"
        f"<table><caption>{text(name)}</caption>"
        f"<tr><th scope=col>layer<th scope=col>{text(quantity)}{rows}</table></details>"
    )


def _numbered(label: str, n: int) -> widgets.Widget:
    """Make a drop-down list of 0 to n - 1, numbered as the tensor's axis is."""
    return control(label, [str(i) for i in range(n)])


def _square(weights: Tensor, ndim: int, name: str) -> Tensor:
    """Check weights whose last two axes are the same positions."""
    if weights.ndim != ndim or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"{name} must be (L, H, T, T), got {tuple(weights.shape)}")
    return check_weights(weights, name)


def _looks(token: str, line: Sequence[float]) -> str:
    """Head the list of one query's weights."""
    return f"“{token}” looks at" if any(line) else f"“{token}” sees nothing"
