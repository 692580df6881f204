"""Interactive figures from two parts: pages of HTML made beforehand, and controls that turn them.

A control (an ipywidgets slider or drop-down list) is linked in the browser to the page on view, so
a figure answers in JupyterLab and equally on a page that has no kernel behind it. Where ipywidgets
is older than 8 and has no `Stack` (Colab), there always is a kernel, and a callback turns them.
"""

import functools
import html
import importlib.resources
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Real

import ipywidgets as widgets

LEVELS = 11  # shades of a cell: one for each tenth from 0 to 1
RAMPS = {"light": ((255, 255, 255), (8, 81, 156)), "dark": ((32, 37, 43), (158, 207, 255))}
DARK = ":is(html[data-theme=dark],[data-jp-theme-light=false],html[theme=dark],.vscode-dark) "


class Figure(widgets.VBox):
    """A card with a sentence that says what it shows, and below it controls and pages.

    The sentence is also the figure's text wherever widgets cannot be drawn.

    Args:
        children: the widgets inside.
        about: what the figure shows and how to use it.
        rows: how many rows of a matrix can be picked out by a `row_picker`.

    Raises:
        ValueError: `about` is empty.
    """

    def __init__(self, children: Sequence[widgets.Widget], about: str, rows: int = 0) -> None:
        if not about.strip():
            raise ValueError("about is empty: say in a sentence what the figure shows")
        self.about = " ".join(about.split())
        head = widgets.HTML(
            f"<style>{stylesheet(rows)}</style><p class=la-about>{text(self.about)}"
        )
        super().__init__([head, *children])
        self.add_class("la")

    def __repr__(self) -> str:
        return self.about

    def _repr_mimebundle_(self, **options: object) -> dict[str, object]:
        bundle = super()._repr_mimebundle_(**options)
        return {**bundle, "text/plain": self.about}  # ipywidgets would cut it at 110 characters


def frames(
    pages: Sequence[str], label: str, options: Sequence[object] | None = None, *, about: str
) -> Figure:
    """Show one of several pages of HTML, chosen by one control.

    Args:
        pages: HTML, each readable on its own; escape what comes from data with `text`.
        label: what the control chooses.
        options: one name a page: numbers make a slider, words a drop-down list; 0, 1, 2, …
            unless given.
        about: what the figure shows.

    Raises:
        ValueError: no pages, or not one option a page, or the same option twice.
    """
    options = range(len(pages)) if options is None else options
    if len(pages) != len(options):
        raise ValueError(f"there are {len(pages)} pages but {len(options)} options")
    by_option = dict(zip(map(str, options), pages, strict=True))
    return grid_of_frames(lambda option: by_option[str(option)], {label: options}, about=about)


def grid_of_frames(
    page: Callable[..., str],
    controls: Mapping[str, Sequence[object]],
    *,
    about: str,
    start: Mapping[str, object] | None = None,
) -> Figure:
    """Show one page of HTML for each combination of several controls.

    Args:
        page: called once with every combination of options, in the order of `controls`.
        controls: label to options. All pages are stored: mind the product of the numbers.
        about: what the figure shows.
        start: label to the option chosen at first; the first option where it says nothing.

    Raises:
        ValueError: a control without options, with the same option twice, or a start that is none.
    """
    start = {} if start is None else start
    knobs = [control(label, options, start.get(label)) for label, options in controls.items()]
    return Figure([row(knobs), nested(page, knobs, list(controls.values()))], about)


def control(label: str, options: Sequence[object], start: object = None) -> widgets.Widget:
    """Make a slider (for numbers) or a drop-down list (for words); its `index` is the choice.

    Args:
        label: what it chooses.
        options: all numbers, or words.
        start: the option chosen at first, the first one unless given.

    Raises:
        ValueError: no options, the same one twice, or a start that is not among them.
    """
    names = [str(option) for option in options]
    if not names:
        raise ValueError(f"control {label!r} has no options to choose from")
    if len(set(names)) < len(names):
        raise ValueError(f"the options of control {label!r} must differ, got {names}")
    chosen = names[0] if start is None else str(start)
    if chosen not in names:
        raise ValueError(f"control {label!r} cannot start at {chosen!r}: the options are {names}")
    numbers = len(names) > 2 and all(isinstance(option, Real) for option in options)
    kind = widgets.SelectionSlider if numbers else widgets.Dropdown
    return kind(
        options=names,
        value=chosen,
        description=label,
        layout=widgets.Layout(
            width="24rem" if numbers else "auto",
            max_width="100%" if numbers else "min(100%, 22rem)",
            margin="0 12px 6px 0",
        ),
        style={"description_width": "initial"},
    )


def row(children: Sequence[widgets.Widget]) -> widgets.HBox:
    """Put widgets side by side; what does not fit wraps onto the next line."""
    return widgets.HBox(children, layout=widgets.Layout(flex_flow="row wrap"))


def switch(
    knob: widgets.Widget, pages: Sequence[widgets.Widget], layout: widgets.Layout | None = None
) -> widgets.Widget:
    """Show the page whose number the control holds: linked in the browser, or by a callback."""
    layout = widgets.Layout() if layout is None else layout
    if hasattr(widgets, "Stack"):
        view = widgets.Stack(pages, selected_index=knob.index, layout=layout)
        widgets.jslink((knob, "index"), (view, "selected_index"))
        return view
    view = widgets.VBox([pages[knob.index]], layout=layout)
    knob.observe(lambda change: setattr(view, "children", [pages[change["new"]]]), "index")
    return view


def nested(
    page: Callable[..., str],
    knobs: Sequence[widgets.Widget],
    options: Sequence[Sequence[object]],
) -> widgets.Widget:
    """Make a switch inside a switch for each control, with `page(option, …)` at the bottom."""
    panel = panels()
    layout = widgets.Layout()

    def build(chosen: tuple[object, ...]) -> widgets.Widget:
        if len(chosen) == len(knobs):
            return panel(page(*chosen))
        inner = [build((*chosen, option)) for option in options[len(chosen)]]
        return inner[0] if len(inner) == 1 else switch(knobs[len(chosen)], inner, layout)

    return build(())


def panels() -> Callable[[str], widgets.HTML]:
    """Return a maker of HTML widgets that share one layout and style: half the stored state."""
    shared: dict[str, widgets.Widget] = {}

    def panel(value: str) -> widgets.HTML:
        made = widgets.HTML(value, **shared)
        shared.update(layout=made.layout, style=made.style)
        return made

    return panel


def row_picker(label: str, names: Sequence[str]) -> list[widgets.Widget]:
    """Make a drop-down list that picks out one row in every matrix after it in the same box.

    Only an invisible mark is switched; the stylesheet does the rest. So the choice outlasts a
    change of matrix, and no matrix is stored once for each row.

    Returns:
        The control and the mark, to be followed by the matrices. Rows are those that
        `matrix_html` and `bars_html` number; the figure needs `rows` of at least their number.
    """
    options = [f"{i} {name}" for i, name in enumerate(names)]
    knob = control(label, options, options[-1])  # under a causal mask the first row is no choice
    panel = panels()
    mark = switch(knob, [panel(f"<i class=la-q{i}></i>") for i in range(len(names))])
    mark.add_class("la-mark")
    return [knob, mark]


def text(value: object) -> str:
    """Escape a value so that it is text in HTML, also inside a quoted attribute."""
    return html.escape(str(value), quote=True)


def number(value: float, digits: int = 2) -> str:
    """Round to so many digits after the point, without a negative zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def matrix_html(
    values: Sequence[Sequence[float]], queries: Sequence[str], keys: Sequence[str], caption: str
) -> str:
    """Write weights between 0 and 1 as a table: shaded cells, two digits shown, three on hover."""
    head = "".join(f"<th scope=col>{text(key)}" for key in keys)
    body = "".join(
        f"<tr class=la-r{i}><th scope=row>{text(query)}"
        + "".join(
            f'<td class=la-{level(value)} title="{text(query)} to {text(key)}: {number(value, 3)}">'
            f"{number(value)}"
            for key, value in zip(keys, line, strict=True)
        )
        for i, (query, line) in enumerate(zip(queries, values, strict=True))
    )
    return scroll(f"<table><caption>{text(caption)}</caption><tr><td>{head}{body}</table>", caption)


def bars_html(
    values: Sequence[float], names: Sequence[str], title: str, *, row: int | None = None
) -> str:
    """Write values between 0 and 1 as a list of bars, each with its name and three digits.

    Args:
        row: show the list only while a `row_picker` has picked this row.
    """
    hidden = "" if row is None else f" la-off la-r{row}"
    items = "".join(
        f"<li style=--w:{number(100 * value, 1)}><b>{text(name)}</b> <i>{number(value, 3)}</i>"
        for name, value in zip(names, values, strict=True)
    )
    return f'<div class="la-bars{hidden}"><p>{text(title)}<ul class=la-bars>{items}</ul></div>'


def scroll(content: str, label: str) -> str:
    """Wrap what may be wide in a box of its own that scrolls, also by keyboard."""
    return f'<div class=la-scroll tabindex=0 role=group aria-label="{text(label)}">{content}</div>'


def level(value: float) -> int:
    """Say which of the shades a value between 0 and 1 gets."""
    return round(min(max(value, 0.0), 1.0) * (LEVELS - 1))


def shade(step: int, theme: str) -> tuple[tuple[int, int, int], str]:
    """Return a shade's ground as (red, green, blue), and black or white, whichever reads on it."""
    start, end = RAMPS[theme]
    share = step / (LEVELS - 1)
    ground = tuple(round(a + share * (b - a)) for a, b in zip(start, end, strict=True))
    bright = luminance(ground)
    return ground, "#000" if (bright + 0.05) ** 2 > 1.05 * 0.05 else "#fff"


def luminance(colour: tuple[int, int, int]) -> float:
    """Return the relative luminance of an sRGB colour, between 0 and 1, as WCAG 2 defines it."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@functools.cache
def stylesheet(rows: int = 0) -> str:
    """Return a figure's style: the file, the shades in light and dark, and the rows to pick."""
    source = (
        importlib.resources.files("llm_anatomy.figures").joinpath("figure.css").read_text("utf-8")
    )
    source = re.sub(r"/\*.*?\*/|\n", " ", source, flags=re.DOTALL)
    rules = [re.sub(r"\s+", " ", source).strip()]
    for theme, where in (("light", ""), ("dark", DARK)):
        for step in range(LEVELS):
            (red, green, blue), ink = shade(step, theme)
            rules.append(
                f"{where}.la td.la-{step}{{background:#{red:02x}{green:02x}{blue:02x};color:{ink}}}"
            )
    for i in range(rows):
        here = f".la-mark:has(.la-q{i})~* "
        rules.append(f"{here}.la-off.la-r{i}{{display:block}}")
        rules.append(f"{here}tr.la-r{i}>*{{box-shadow:0 -2px var(--la-mark),0 2px var(--la-mark)}}")
    return "".join(rules)
