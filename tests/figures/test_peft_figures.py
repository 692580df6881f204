"""The figures on fine-tuning, without a browser: what they show, store and refuse.

What the page computes is in tests/book/test_figures_on_the_page.py; the formulas behind it are in
tests/peft/test_counts.py.
"""

import base64
import html as markup
import itertools
import json
import math
import re
import zlib

import ipywidgets as widgets
import pytest
import torch

from llm_anatomy import figures
from llm_anatomy.figures import peft
from llm_anatomy.peft import counts
from llm_anatomy.peft.counts import Shape

pytestmark = pytest.mark.usefixtures("unchecked")


def inside(widget: widgets.Widget) -> list[widgets.Widget]:
    return [widget, *(w for child in getattr(widget, "children", ()) for w in inside(child))]


def html(figure: widgets.Widget) -> list[str]:
    """Pages and panels, without the sentence and the style at the top."""
    return [w.value for w in inside(figure) if isinstance(w, widgets.HTML)][1:]


def knob(figure: widgets.Widget, label: str) -> widgets.Widget:
    return next(w for w in inside(figure) if getattr(w, "description", None) == label)


# --- The rank explorer ----------------------------------------------------------------------------


def delta(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def pages_by_rank(figure: widgets.Widget) -> dict[int, str]:
    pages = [page for page in html(figure) if page.startswith("<p>Rank")]
    return {int(r): page for r, page in zip(knob(figure, "rank r").options, pages, strict=True)}


def test_the_error_is_the_distance_to_the_nearest_matrix_of_that_rank():
    matrix = delta(7, 5)
    pages = pages_by_rank(figures.rank_explorer(matrix, range(6)))
    values = torch.linalg.svdvals(matrix.double())
    for r, page in pages.items():
        error = (values[r:].square().sum() / values.square().sum()).sqrt().item()
        assert f"Rank {r} of 5" in page and f"the relative error is {100 * error:.1f} %" in page
        assert f"{r} · (7 + 5) = {12 * r} numbers, the whole matrix 35" in page


def test_no_rank_comes_nearer_and_the_largest_is_exact():
    pages = pages_by_rank(figures.rank_explorer(delta(6, 6)))
    assert list(pages) == [0, 1, 2, 3, 4, 6]
    errors = [float(re.search(r"error is ([\d.]+)", page)[1]) for page in pages.values()]
    assert errors == sorted(errors, reverse=True) and errors[0] == 100 and errors[-1] == 0


def pixels(page: str) -> list[list[int]]:
    """The levels of the one picture of a page, by hand: each line follows a filter byte of 0."""
    png = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    width = int.from_bytes(png[16:20])
    start = png.index(b"IDAT") + 4
    length = int.from_bytes(png[start - 8 : start - 4])
    data = zlib.decompress(png[start : start + length])
    lines = [data[i : i + width + 1] for i in range(0, len(data), width + 1)]
    assert all(line[0] == 0 for line in lines)
    return [[level - peft.STEPS for level in line[1:]] for line in lines]


def test_the_picture_shows_the_matrix_that_the_kept_values_make():
    matrix = delta(5, 4).double()
    figure = figures.rank_explorer(matrix, range(5))
    for r, page in pages_by_rank(figure).items():
        u, values, v = torch.linalg.svd(matrix)
        near = u[:, :r] @ values[:r].diag() @ v[:r]
        assert pixels(page) == (10 * near / matrix.abs().max()).round().clamp(-10, 10).tolist()
    whole = next(page for page in html(figure) if "The update itself" in page)
    assert pixels(whole) == pixels(pages_by_rank(figure)[4])
    assert min(map(min, pixels(whole))) < 0 < max(map(max, pixels(whole)))


def test_every_picture_has_a_text_and_the_values_stand_in_a_table():
    matrix = delta(4, 3)
    figure = figures.rank_explorer(matrix)
    pages = "".join(html(figure))
    assert pages.count("<img") == pages.count('alt="') == len(pages_by_rank(figure)) + 1
    assert pages.count("<svg") == pages.count("role=img aria-label=")
    rows = re.findall(r"<tr><td>(\d)<td>([\d.]+)<td>([\d.]+)", pages)
    values = torch.linalg.svdvals(matrix.double())
    kept = 100 * values.square().cumsum(0) / values.square().sum()
    assert rows == [
        (str(i + 1), f"{values[i]:.3g}", f"{kept[i].item():.1f}") for i in range(len(values))
    ]


def test_a_matrix_of_low_rank_starts_at_a_middle_rank():
    figure = figures.rank_explorer(delta(32, 48))
    assert knob(figure, "rank r").value == "8"
    assert sum(map(len, html(figure))) < 60_000


@pytest.mark.parametrize(
    ("matrix", "ranks", "message"),
    [
        (torch.zeros(3, 4), None, "delta is all zeros"),
        (torch.ones(3), None, r"must be a matrix of at most 96 by 96, got \(3,\)"),
        (torch.ones(2, 97), None, "at most 96"),
        (torch.full((2, 2), torch.nan), None, "must be finite"),
        (torch.ones(2, 3), [3], "ranks must lie between 0 and 2"),
        (torch.ones(2, 3), [-1], "ranks must lie between 0 and 2"),
        (torch.ones(2, 3), [], "ranks must lie between 0 and 2"),
    ],
)
def test_rank_explorer_refuses(matrix, ranks, message):
    with pytest.raises(ValueError, match=message):
        figures.rank_explorer(matrix, ranks)


# --- The calculator -------------------------------------------------------------------------------


def numbers(figure: peft.ScriptFigure) -> dict:
    return json.loads(markup.unescape(re.search(r"data-numbers='([^']+)'", figure.html)[1]))


def test_every_count_is_a_straight_line_over_its_size():
    data = numbers(figures.peft_calculator())
    assert [name for name, *_ in data["models"]] == list(counts.SHAPES)
    for (_, whole, lines), shape in zip(data["models"], counts.SHAPES.values(), strict=True):
        assert whole == counts.full(shape)
        for line, method in zip(lines, peft.METHODS.values(), strict=True):
            fixed, slope, stored_fixed, stored_slope, largest = line
            stored = method.stored or method.trained
            for n in {1, 2, 5, largest // 2 or 1, largest}:
                assert fixed + slope * n == method.trained(shape, n)
                assert stored_fixed + stored_slope * n == stored(shape, n)
            assert (slope == 0) == (not method.knob)


def test_the_first_result_is_there_without_a_script():
    figure = figures.peft_calculator()
    assert "<form class=la-form hidden" in figure.html  # no dead controls
    rows = re.findall(r"<tr><th scope=row>([^<]+)<td>([^<]+)", figure.html)[:6]
    method = peft.METHODS["LoRA on q, v"]
    assert dict(rows) == peft.calculate(counts.SHAPES["BERT-base"], method, 8, 4)
    assert dict(rows)["trainable parameters"] == "294,912"
    for shape, (name, method) in itertools.product(counts.SHAPES.values(), peft.METHODS.items()):
        assert f"<td>{method.trained(shape, method.usual):,}" in figure.html, name


def test_training_holds_the_weights_once_and_three_numbers_for_each_that_trains():
    shape = Shape(n_layers=1, d_model=2, d_ff=4, n_vectors=10)
    whole = counts.full(shape)
    shown = peft.calculate(shape, peft.METHODS["full fine-tuning"], 1, 4)
    assert shown["weights in training"] == peft.size_of(4 * whole)
    assert shown["gradients and AdamW's averages"] == peft.size_of(12 * whole)
    shown = peft.calculate(shape, peft.METHODS["prompt tuning"], 3, 2)
    assert shown["weights in training"] == peft.size_of(2 * (whole + 6))
    assert shown["stored for one task"] == "12 bytes"
    shown = peft.calculate(shape, peft.METHODS["prefix tuning, reparametrised"], 3, 4)
    assert shown["stored for one task"] == f"{4 * 3 * 2 * 2} bytes"  # the maps are thrown away


def test_the_calculator_is_text_where_it_cannot_be_drawn():
    bundle = figures.peft_calculator(about="What\n it shows.")._repr_mimebundle_()
    assert bundle["text/plain"] == "What it shows." and set(bundle) == {"text/plain", "text/html"}
    assert len(bundle["text/html"]) < 30_000


def test_a_shape_of_ones_own_is_escaped():
    figure = figures.peft_calculator({"<b>'": Shape()})
    assert "&lt;b&gt;" in figure.html and "<b>" not in figure.html
    assert numbers(figure)["models"][0][0] == "<b>'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"shapes": {}}, "no model to choose from"), ({"about": " "}, "about is empty")],
)
def test_calculator_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        figures.peft_calculator(**arguments)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0"), (100.0, "100"), (0.26937, "0.269"), (12.345, "12.3"), (7.04e-6, "0.00000704")],
)
def test_three_digits_that_count(value, said):
    assert peft.digits(value) == said


@pytest.mark.parametrize(
    ("n_bytes", "said"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (1_179_648, "1.18 MB")],
)
def test_bytes_in_the_unit_that_suits(n_bytes, said):
    assert peft.size_of(n_bytes) == said
    assert peft.size_of(698_417_037_000) == "698 GB"


# --- The comparison -------------------------------------------------------------------------------

METHODS = ["full", "<LoRA>", "head"]
COLUMNS = {
    "trained": torch.tensor([10_000.0, 100.0, 10.0]),
    "bytes": torch.tensor([4e4, 4e2, 4e1]),
    "accuracy": torch.tensor([[0.9, 0.8], [0.9, 0.6], [0.5, 0.5]]),
}


def compare(**changed):
    given = {"across": ["trained", "bytes"], "up": ["accuracy"], "log": ["trained", "bytes"]}
    return figures.method_comparison(METHODS, COLUMNS, **{**given, **changed})


def test_a_choice_of_one_is_no_control():
    for up, labels in ((["accuracy", "bytes"], ["across", "up"]), (["accuracy"], ["across"])):
        dropdowns = [w for w in inside(compare(up=up)) if isinstance(w, widgets.Dropdown)]
        assert [w.description for w in dropdowns] == labels


def test_comparison_shows_means_with_one_standard_error():
    page = html(compare())[0]
    rows = re.findall(r"<tr><td>(\d)<th scope=row>([^<]+)<td>([^<]+)<td>([^<]+)", page)
    assert rows == [
        ("1", "full", "10,000", "0.85 ± 0.05"),
        ("2", "&lt;LoRA&gt;", "100", "0.75 ± 0.15"),
        ("3", "head", "10", "0.50 ± 0.00"),
    ]


def test_points_lie_where_the_axes_say():
    page = html(compare())[0]
    points = [tuple(map(float, p)) for p in re.findall(r"<circle cx=([\d.]+) cy=([\d.]+)", page)]
    across = [x for x, _ in points]
    assert across == [peft.RIGHT, pytest.approx(132, abs=0.1), peft.LEFT]  # 10k, 100, 10
    marks = re.findall(r"<text x=([\d.]+) y=([\d.]+) text-anchor=(\w+)>([^<]+)", page)
    height = {name: float(y) - 4 for x, y, side, name in marks if side == "end"}
    down = (height["0.5"] - height["0.8"]) / 0.3
    assert [y for _, y in points] == [
        pytest.approx(height["0.5"] - down * (mean - 0.5), abs=0.11) for mean in (0.85, 0.75, 0.5)
    ]
    bars = re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)", page.split("la-error")[1])
    for (_, low, high), error in zip(bars, (0.05, 0.15, 0.0), strict=True):
        assert float(low) - float(high) == pytest.approx(2 * down * error, abs=0.21)


def test_comparison_has_a_page_for_each_pair_of_columns():
    figure = compare(across=["trained", "bytes", "accuracy"], up=["accuracy", "bytes"])
    captions = [re.search(r"<caption>([^<]+)", page)[1] for page in html(figure)[:-1]]
    assert captions == [
        f"{up} over {across}"
        for across in ("trained", "bytes", "accuracy")
        for up in ("accuracy", "bytes")
    ]


def test_numbers_of_points_keep_apart():
    crowd = [(100.0, 100.0 + 3 * i) for i in range(6)]
    placed = [(x, y) for x, y, *_ in peft._beside(crowd)]
    assert len(set(placed)) == 6
    for (a, b), (c, d) in itertools.combinations(placed[:4], 2):
        assert abs(a - c) >= 15 or abs(b - d) >= 10


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([0.5, 0.85], ["0.5", "0.6", "0.7", "0.8", "0.9"]),
        ([3.0, 3.0], ["0", "5"]),
        ([0.0, 0.0], ["0", "1"]),
        ([-1.0, 7.0], ["-2", "0", "2", "4", "6", "8"]),
    ],
)
def test_linear_axes_have_round_marks(values, names):
    place, marks = peft._axis(values, None, False, 0, 100)
    assert [name for _, name in marks] == names
    low, high = float(names[0]), float(names[-1])
    for value in values:
        assert place(value) == pytest.approx(100 * (value - low) / (high - low), abs=0.1)


def test_logarithmic_axes_have_powers_of_ten():
    place, marks = peft._axis([3.0, 200_000.0], None, True, 0, 120)
    assert [name for _, name in marks] == ["1", "100", "10k", "1M"]
    assert place(3.0) == pytest.approx(20 * math.log10(3), abs=0.1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"across": ["speed"]}, "no column is named 'speed': there are trained, bytes, accuracy"),
        ({"log": ["speed"]}, "no column is named 'speed'"),
        ({"across": []}, "has no options"),
    ],
)
def test_comparison_refuses_columns_that_are_not_there(changed, message):
    with pytest.raises(ValueError, match=message):
        compare(**changed)


@pytest.mark.parametrize(
    ("methods", "values", "message"),
    [
        ([], torch.ones(0), "methods is empty"),
        (METHODS, torch.ones(2), "column .a. has 2 rows for 3 methods"),
        (METHODS, torch.ones(3, 1), "at least 2 seeds"),
        (METHODS, torch.tensor([1.0, 0.0, 2.0]), "logarithmic axis and must be above 0"),
        (METHODS, torch.tensor([1.0, torch.nan, 2.0]), "must be finite"),
    ],
)
def test_comparison_refuses_values(methods, values, message):
    with pytest.raises(ValueError, match=message):
        figures.method_comparison(methods, {"a": values}, across=["a"], up=["a"], log=["a"])


# --- All of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: figures.rank_explorer(delta(3, 4)), compare])
def test_the_same_figure_is_stored_the_same(make):
    assert html(make()) == html(make())


@pytest.mark.parametrize("make", [lambda: figures.rank_explorer(delta(3, 4)), compare])
def test_it_works_without_a_stack(make, monkeypatch):
    monkeypatch.delattr(widgets, "Stack")
    figure = make()
    for each in inside(figure):
        for option in getattr(each, "options", ()):
            each.value = option
    assert html(figure)
