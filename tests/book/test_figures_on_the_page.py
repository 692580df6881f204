"""Every kind of figure on a page of the book: what is seen is what the tensors hold, no kernel."""

import itertools
import json
from pathlib import Path

import ipywidgets as widgets
import pytest
import torch
from ipywidgets.embed import embed_data

from llm_anatomy import figures
from llm_anatomy.figures.peft import BYTES, METHODS, calculate
from llm_anatomy.peft import counts
from tools.book_pages import first_frame

pytestmark = [pytest.mark.book, pytest.mark.browser]

HTML = Path(__file__).resolve().parents[2] / "_build" / "html"
SENTENCES = [["the", "<b>cat</b>", "sat"], ["a", "dog", "&", "I"]]
TOKENS = SENTENCES[0]
# The cells of the tables that are seen, the bars beside them, and the rows that are framed.
TABLES = """figure => [...figure.querySelectorAll("table")].filter(t => t.checkVisibility())
    .map(table => [...table.rows].slice(1).map(row => [...row.querySelectorAll("td")]
        .map(cell => cell.textContent)))"""
BARS = """figure => [...figure.querySelectorAll("ul.la-bars")].filter(u => u.checkVisibility())
    .map(list => [...list.children].map(item => item.innerText.split("\\n").at(-1)))"""
FRAMED = """figure => [...figure.querySelectorAll("table")].filter(t => t.checkVisibility())
    .map(table => [...table.rows].slice(1).flatMap((row, i) =>
        getComputedStyle(row.cells[0]).boxShadow === "none" ? [] : [i]))"""


def weights(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator)).softmax(dim=-1)


def rounded(matrix: torch.Tensor, digits: int = 2) -> list[list[str]]:
    return [[f"{value:.{digits}f}" for value in line] for line in matrix.tolist()]


EXPLORED = [weights(n, 2, 3, len(s), len(s)) for n, s in enumerate(SENTENCES)]
LAYERS = weights(7, 2, 3, 3, 3)
DELTA = torch.diag(torch.tensor([4.0, -3.0, 2.0, 1.0]))
COSTS = torch.tensor([1000.0, 10.0])
ACCURACY = torch.tensor([[0.8, 0.9], [0.6, 0.9]])
SCHEMES = {"one": torch.arange(36.0).view(6, 6), "two": torch.eye(6) * 2}


def gallery() -> dict[str, figures.Figure]:
    return {
        "explorer": figures.attention_explorer(SENTENCES, EXPLORED),
        "heads": figures.heads_viewer(TOKENS, LAYERS),
        "temperature": figures.softmax_temperature(torch.tensor([1.0, 2.0, 4.0]), TOKENS),
        "masks": figures.mask_gallery(4),
        "positions": figures.position_similarity(SCHEMES),
        "depth": figures.depth_explorer(lambda a: torch.logspace(-3, 0, 6), {"net": ["a", "b"]}),
        "frames": figures.frames(["<p>A", "<p>B", "<p>C"], "page", about="Three pages."),
        "grid": figures.grid_of_frames(
            lambda a, b, c: f"<p>{a}{b}{c}",
            {"a": "pq", "b": "rs", "c": "xy"},
            about="Eight pages.",
        ),
        "rank": figures.rank_explorer(DELTA, [0, 1, 2, 4]),
        "methods": figures.method_comparison(
            ["full", "<b>LoRA</b>"],
            {"trained": COSTS, "bytes": 4 * COSTS, "accuracy": ACCURACY},
            across=["trained", "bytes"],
            up=["accuracy"],
            log=["trained", "bytes"],
        ),
        "painter": figures.mask_painter(torch.zeros(3, 3), TOKENS),
    }


@pytest.fixture(scope="module")
def shown(context, site, make_visit):
    """A page of the book whose text is replaced by one figure of each kind."""
    widgets.Widget.close_all()
    made = gallery()
    data = embed_data(views=list(made.values()), drop_defaults=False)
    state = data["manager_state"]["state"]
    kinds = "application/vnd.jupyter.widget-{}+json"
    parts = []
    for name, figure in made.items():
        view = json.dumps({"version_major": 2, "version_minor": 0, "model_id": figure.model_id})
        parts.append(
            f'<div class="cell_output docutils container" id="{name}"><div class="first-frame">'
            f"{first_frame(figure.model_id, state)}</div>"
            f'<script type="{kinds.format("view")}">{view}</script></div>'
        )
    calculator = figures.peft_calculator().html
    parts.append(
        '<div class="cell_output docutils container" id="calculator"><div class="output text_html">'
        f"{calculator}</div></div>"
    )
    stored = json.dumps(data["manager_state"]).replace("<", "\\u003c")
    shell = (HTML / "reference" / "bibliography.html").read_text(encoding="utf-8")
    head, rest = shell.split('<article class="bd-article">')
    tail = rest.split("</article>")[1]
    site.extra["/reference/gallery.html"] = (
        f"{head.replace('</head>', '<script src=../_static/widgets.js></script></head>')}"
        f'<article class="bd-article"><h1>Figures</h1>{"".join(parts)}'
        f'<script type="{kinds.format("state")}">{stored}</script></article>{tail}'
    )
    widgets.Widget.close_all()
    page = context.new_page()
    yield make_visit(page).read("reference/gallery.html")
    page.close()


@pytest.fixture
def figure(shown, request):
    return shown.page.locator(f"#{request.param} .la")


def knob(figure, label):
    """The control with a label that is seen."""
    return figure.get_by_label(label, exact=True).filter(visible=True)


of = lambda name: pytest.mark.parametrize("figure", [name], indirect=True)  # noqa: E731


def test_they_are_all_drawn(shown):
    assert shown.faults == []
    assert shown.page.locator(".first-frame").count() == 0
    assert shown.page.locator(".la").count() == len(gallery()) + 1  # and the calculator


@of("explorer")
def test_explorer_shows_the_weights_of_each_choice(figure):
    heads, layers = range(3), range(2)
    for n, layer, head in itertools.product(range(2), layers, heads):
        knob(figure, "sentence").select_option(index=n)
        knob(figure, "layer").select_option(index=layer)
        knob(figure, "head").select_option(index=head)
        assert figure.evaluate(TABLES) == [rounded(EXPLORED[n][layer, head])]
        assert f"layer {layer}, head {head}" in figure.inner_text()


@of("explorer")
def test_explorer_frames_the_query_and_shows_its_bars(figure):
    for n, sentence in enumerate(SENTENCES):
        knob(figure, "sentence").select_option(index=n)
        knob(figure, "layer").select_option(index=1)
        for query, token in enumerate(sentence):
            knob(figure, "query").select_option(index=query)
            knob(figure, "head").select_option(index=query % 3)
            line = EXPLORED[n][1, query % 3, query]
            assert figure.evaluate(BARS) == rounded(line[None], 3)
            assert figure.evaluate(FRAMED) == [[query]]
            assert f"“{token}” looks at" in figure.inner_text()


@of("heads")
def test_heads_viewer_shows_all_heads_and_frames_one_query_in_each(figure):
    for layer, query in itertools.product(range(2), range(3)):
        knob(figure, "layer").select_option(index=layer)
        knob(figure, "query").select_option(index=query)
        assert figure.evaluate(TABLES) == [rounded(head) for head in LAYERS[layer]]
        assert figure.evaluate(FRAMED) == [[query]] * 3


@of("temperature")
def test_slider_turns_by_keyboard(figure):
    handle = figure.locator("[role=slider]")
    assert handle.get_attribute("aria-label") == "temperature"
    handle.press("Home")
    seen = [figure.evaluate(BARS)[0]]
    for _ in range(8):
        handle.press("ArrowRight")
        seen += figure.evaluate(BARS)
    logits = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    steps = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 10.0)
    assert seen == [rounded((logits / t).softmax(-1)[None], 3)[0] for t in steps]


@of("grid")
def test_stacks_in_stacks(figure):
    for a, b, c in itertools.product("pq", "rs", "xy"):
        for label, value in (("a", a), ("b", b), ("c", c)):
            knob(figure, label).select_option(value)
        pages = figure.locator("p:not(.la-about)").filter(visible=True)
        assert pages.all_inner_texts() == [a + b + c]


@of("rank")
def test_rank_explorer_fills_the_singular_values_that_are_kept(figure):
    handle = figure.locator("[role=slider]")
    handle.press("Home")
    for r, error in ((0, "100.0"), (1, "68.3"), (2, "40.8"), (4, "0.0")):
        said = figure.locator("p:not(.la-about)").filter(visible=True).first.inner_text()
        assert f"Rank {r} of 4" in said and f"the relative error is {error} %" in said
        kept = (
            figure.locator("path.la-kept")
            .filter(visible=True)
            .evaluate_all(
                "paths => paths.map(path => path.getAttribute('d').split('M').length - 1)"
            )
        )
        assert kept == ([r] if r else [])
        drawn = figure.locator("img").filter(visible=True)
        assert drawn.evaluate_all("all => all.map(i => i.naturalWidth)") == [4, 4]
        handle.press("ArrowRight")


@of("methods")
def test_method_comparison_shows_the_chosen_columns(figure):
    for column, costs in (("bytes", ["4,000", "40"]), ("trained", ["1,000", "10"])):
        knob(figure, "across").select_option(column)
        (table,) = figure.evaluate(TABLES)
        assert table == [["1", costs[0], "0.85 ± 0.05"], ["2", costs[1], "0.75 ± 0.15"]]
        assert figure.locator("circle").filter(visible=True).count() == 2


@pytest.fixture
def calculator(shown):
    shown.page.set_viewport_size(shown.DESKTOP)
    return shown.page.locator("#calculator")


F32, BF16 = BYTES
RESULT = "root => [...root.querySelectorAll('.la-result td')].map(cell => cell.textContent)"


@pytest.mark.parametrize("model", counts.SHAPES)
def test_calculator_computes_what_python_does(calculator, model):
    shape = counts.SHAPES[model]
    calculator.get_by_label("model", exact=True).select_option(label=model)
    for name, method in METHODS.items():
        calculator.get_by_label("method", exact=True).select_option(label=name)
        size = calculator.locator("input")
        assert size.is_visible() == bool(method.knob)
        for n, numbers in ((1, F32), (511, F32), (16, BF16)) if method.knob else ((1, BF16),):
            calculator.get_by_label("numbers", exact=True).select_option(label=numbers)
            if method.knob:
                calculator.get_by_label(method.knob).fill(str(n))
            wanted = calculate(shape, method, n, BYTES[numbers])
            assert calculator.evaluate(RESULT) == list(wanted.values()), (name, n)
        assert f"{model}, {name}" in calculator.get_by_role("status").inner_text()


def test_calculator_starts_at_the_usual_size_and_refuses_what_is_none(calculator):
    calculator.get_by_label("model", exact=True).select_option(label="BERT-base")
    calculator.get_by_label("method", exact=True).select_option(label="adapters, Houlsby")
    size = calculator.get_by_label("bottleneck width m")
    assert size.input_value() == "64"
    for wrong in ("0", "-1", "1.5", "", "999999"):
        size.fill(wrong)
        assert set(calculator.evaluate(RESULT)) == {"–"}
        assert "whole number from 1 to 3,072" in calculator.get_by_role("status").inner_text()
    size.press("ArrowUp")
    assert "–" in calculator.evaluate(RESULT)
    size.fill("64")
    size.press("ArrowDown")
    assert "width m = 63" in calculator.get_by_role("status").inner_text()


@of("painter")
def test_what_needs_a_kernel_says_so(figure):
    assert figure.locator(":scope > *").filter(visible=True).count() == 0
    said = figure.evaluate("figure => getComputedStyle(figure, '::before').content")
    assert "open the chapter in Colab or JupyterLab" in said


def test_text_from_data_stays_text(shown):
    assert shown.page.locator("th b, .la-bars b b").count() == 0
    assert shown.page.locator("#explorer").get_by_text("<b>cat</b>").first.count() == 1


def test_axe_finds_nothing_in_any_figure(shown):
    assert shown.violations() == []
