"""Interactive figures, without a browser: what is stored, how it is wired, what is refused.

What a reader sees and does with them on a page is in tests/book/test_figures_on_the_page.py.
"""

import itertools
import re

import ipywidgets as widgets
import pytest
import torch

from llm_anatomy import figures, masks
from llm_anatomy.attention import scaled_dot_product_attention
from llm_anatomy.figures import blocks

TOKENS = ["the", "<cat>", 'a"b']
ABOUT = "What it shows."
pytestmark = pytest.mark.usefixtures("unchecked")


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).softmax(dim=-1)


def inside(widget: widgets.Widget) -> list[widgets.Widget]:
    """A widget and all that is in it, pages of stacks that are not shown too."""
    return [widget, *(w for child in getattr(widget, "children", ()) for w in inside(child))]


def find(figure: widgets.Widget, kind: type) -> list[widgets.Widget]:
    return [widget for widget in inside(figure) if isinstance(widget, kind)]


def html(figure: widgets.Widget) -> list[str]:
    """Pages, without the sentence and the style at the top."""
    return [widget.value for widget in find(figure, widgets.HTML)][1:]


def knobs(figure: widgets.Widget) -> dict[str, widgets.Widget]:
    kinds = (widgets.Dropdown, widgets.SelectionSlider)
    return {knob.description: knob for knob in find(figure, kinds)}


def cells(page: str) -> list[str]:
    return re.findall(r"<td class=la-\d+[^>]*>([^<]+)", page)


def rounded(matrix: torch.Tensor) -> list[str]:
    return [f"{value:.2f}" for value in matrix.flatten().tolist()]


@pytest.fixture
def links(monkeypatch):
    """Pairs that a figure links in the browser."""
    made = []
    monkeypatch.setattr(widgets, "jslink", lambda source, target: made.append((source, target)))
    return made


@pytest.fixture
def old(monkeypatch):
    """ipywidgets 7, as on Colab, which has no Stack."""
    monkeypatch.delattr(widgets, "Stack")


def three_pages():
    return figures.frames(["<p>A", "<p>B", "<p>C"], "page", ["u", "v", "w"], about=ABOUT)


def test_frames_are_linked_to_their_control(links):
    figure = three_pages()
    (stack,) = find(figure, widgets.Stack)
    knob = knobs(figure)["page"]
    assert links == [((knob, "index"), (stack, "selected_index"))]
    assert [page.value for page in stack.children] == ["<p>A", "<p>B", "<p>C"]
    assert (knob.index, stack.selected_index) == (0, 0)


def test_without_a_stack_a_callback_turns_the_page(old):
    figure = three_pages()
    for option, page in zip("uvw", "ABC", strict=True):
        knobs(figure)["page"].value = option
        assert html(figure) == [f"<p>{page}"]


def test_without_a_stack_pages_in_pages_turn(old):
    figure = figures.grid_of_frames(
        lambda a, b: f"<p>{a}{b}", {"a": ["x", "y"], "b": ["u", "v"]}, about=ABOUT
    )
    for a, b in itertools.product("xy", "uv"):
        knobs(figure)["a"].value = a
        knobs(figure)["b"].value = b
        assert html(figure) == [f"<p>{a}{b}"]


def test_a_grid_holds_every_combination_in_order(links):
    controls = {"a": ["x", "y"], "b": [1, 2, 3]}
    figure = figures.grid_of_frames(lambda *o: f"<p>{o}", controls, about=ABOUT, start={"b": 2})
    assert html(figure) == [f"<p>{(a, b)}" for a in "xy" for b in (1, 2, 3)]
    assert isinstance(knobs(figure)["a"], widgets.Dropdown)
    assert isinstance(knobs(figure)["b"], widgets.SelectionSlider)
    outer, *inner = find(figure, widgets.Stack)
    assert outer.selected_index == 0 and [stack.selected_index for stack in inner] == [1, 1]
    targets = [target for _, (target, _) in links]
    assert set(targets) == {outer, *inner} and len(targets) == 3


def test_the_sentence_is_the_text_of_the_figure():
    long = "word " * 60
    figure = figures.frames(["<p>A"], "page", about=f"  It\n<shows> {long}")
    said = " ".join(f"It <shows> {long}".split())
    assert repr(figure) == said and figure._repr_mimebundle_()["text/plain"] == said
    assert "&lt;shows&gt;" in figure.children[0].value and "<shows>" not in figure.children[0].value
    assert "la" in figure._dom_classes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], "page", ["u", "v"]), "1 pages but 2 options"),
        (([], "page"), "'page' has no options"),
        ((["a", "b"], "page", ["u", "u"]), "'page' must differ"),
        ((["a", "b"], "page", [1, "1"]), "'page' must differ"),
    ],
)
def test_frames_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        figures.frames(*arguments, about=ABOUT)


def test_grids_refuse_a_start_that_is_no_option_and_an_empty_sentence():
    with pytest.raises(ValueError, match="cannot start at 'z'"):
        figures.grid_of_frames(str, {"a": ["x"]}, about=ABOUT, start={"a": "z"})
    with pytest.raises(ValueError, match="about is empty"):
        figures.grid_of_frames(str, {"a": ["x"]}, about=" ")


def test_explorer_stores_every_weight():
    sentences = [["a", "b"], ["c", "d", "e"]]
    given = [weights(2, 3, len(s), len(s)) for s in sentences]
    figure = figures.attention_explorer(sentences, given)
    assert list(knobs(figure)) == ["sentence", "layer", "head", "query"]
    pages = [page for page in html(figure) if "<table" in page]
    wanted = [each[layer, head] for each in given for layer in range(2) for head in range(3)]
    assert [cells(page) for page in pages] == [rounded(matrix) for matrix in wanted]
    bars = re.findall(r"<i>([\d.]+)</i>", "".join(pages))
    values = torch.cat([each.flatten() for each in given]).tolist()
    assert bars == [f"{value:.3f}" for value in values]


def test_explorer_has_no_control_where_there_is_no_choice():
    figure = figures.attention_explorer([TOKENS], [weights(1, 1, 3, 3)])
    assert list(knobs(figure)) == ["query"]
    assert knobs(figure)["query"].index == 2  # under a causal mask the first row is no choice


def test_a_query_that_sees_nothing_is_said_to():
    given = weights(1, 1, 3, 3)
    given[0, 0, 1] = 0
    page = "".join(html(figures.attention_explorer([["x", "y", "z"]], [given])))
    assert "“y” sees nothing" in page and "“x” looks at" in page


FIGURES = {
    "explorer": lambda: figures.attention_explorer([TOKENS], [weights(1, 2, 3, 3)]),
    "heads": lambda: figures.heads_viewer(TOKENS, weights(2, 3, 3)),
    "temperature": lambda: figures.softmax_temperature(torch.randn(3), TOKENS),
    "masks": lambda: figures.mask_gallery(3, tokens=TOKENS, n_padding=1),
    "painter": lambda: figures.mask_painter(torch.zeros(3, 3), TOKENS),
    "positions": lambda: figures.position_similarity({"<cat>": torch.eye(3)}),
    "depth": lambda: figures.depth_explorer(lambda a: torch.ones(3), {"a": ["<cat>", "b"]}),
}


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_text_from_data_is_escaped(make):
    written = "".join(html(make()))
    assert "&lt;cat&gt;" in written
    assert "<cat>" not in written and 'a"b' not in written


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_the_same_figure_is_stored_the_same(make):
    torch.manual_seed(0)
    first = html(make())
    torch.manual_seed(0)
    assert html(make()) == first


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_it_works_without_a_stack(make, old):
    figure = make()
    for knob in knobs(figure).values():
        for option in knob.options:
            knob.value = option
    assert html(figure)


@pytest.mark.parametrize(
    ("sentences", "given", "message"),
    [
        ([], [], "0 sentences and 0 sets of weights"),
        ([TOKENS], [], "1 sentences and 0 sets of weights"),
        ([TOKENS], [weights(1, 2, 4, 4)], r"sentences\[0\] has 3 tokens for 4 positions"),
        ([TOKENS], [weights(2, 3, 3)], r"weights\[0\] must be \(L, H, T, T\), got \(2, 3, 3\)"),
        ([TOKENS], [weights(1, 1, 3, 4)], r"must be \(L, H, T, T\)"),
        ([TOKENS], [2 * weights(1, 1, 3, 3)], r"row \(0, 0, 0\) sums to 2.000"),
        ([TOKENS], [weights(1, 1, 3, 3) * float("nan")], "must be finite"),
        (
            [TOKENS, TOKENS],
            [weights(1, 2, 3, 3), weights(2, 2, 3, 3)],
            r"weights\[1\] has 2 layers and 2 heads, weights\[0\] has 1 and 2",
        ),
    ],
)
def test_explorer_refuses(sentences, given, message):
    with pytest.raises(ValueError, match=message):
        figures.attention_explorer(sentences, given)


def test_heads_viewer_shows_the_heads_of_each_layer():
    given = weights(2, 3, 3, 3)
    figure = figures.heads_viewer(TOKENS, given)
    pages = [page for page in html(figure) if "<table" in page]
    assert [cells(page) for page in pages] == [rounded(layer) for layer in given]
    assert list(knobs(figure)) == ["layer", "query"]
    assert list(knobs(figures.heads_viewer(TOKENS, given[0]))) == ["query"]


@pytest.mark.parametrize(
    ("tokens", "given", "message"),
    [
        (["a"], weights(2, 3, 3), "1 tokens for 3 positions"),
        (TOKENS, weights(2, 3, 4), "must be"),
        (TOKENS, -weights(2, 3, 3), "must not be negative"),
    ],
)
def test_heads_viewer_refuses(tokens, given, message):
    with pytest.raises(ValueError, match=message):
        figures.heads_viewer(tokens, given)


def test_temperature_shows_softmax_and_entropy():
    logits = torch.tensor([0.0, 1.0, 3.0])
    figure = figures.softmax_temperature(logits, TOKENS, [0.5, 1.0, 2.0])
    assert knobs(figure)["temperature"].value == "1.0"
    for t, page in zip((0.5, 1.0, 2.0), html(figure), strict=True):
        p = (logits / t).softmax(-1)
        entropy = -(p * p.log()).sum().item()
        assert re.findall(r"<i>([\d.]+)</i>", page) == [f"{x:.3f}" for x in p.tolist()]
        assert f"temperature {t}: entropy {entropy:.2f} nats" in page


@pytest.mark.parametrize(
    ("logits", "temperatures", "message"),
    [
        ([0.0, 1.0, 2.0], [0.0, 1.0], "temperatures must be above 0"),
        ([0.0, 1.0, 2.0], [], "temperatures must be above 0"),
        ([0.0, 1.0], [1.0], "3 tokens for 2 positions"),
        ([0.0, float("-inf"), 1.0], [1.0], r"must be finite, but at index \(1,\)"),
    ],
)
def test_temperature_refuses(logits, temperatures, message):
    with pytest.raises(ValueError, match=message):
        figures.softmax_temperature(torch.tensor(logits), TOKENS, temperatures)


def test_mask_gallery_shows_the_masks_of_the_package_and_what_they_leave():
    T = 5
    figure = figures.mask_gallery(T, torch.randn(T, T), n_padding=2, window=2)
    position = torch.arange(T)
    wanted = {
        "full": torch.ones(T, T, dtype=torch.bool),
        "causal": masks.causal(T)[0, 0],
        "padding: the last 2 hidden": (position < 3).expand(T, T),
        "prefix of 2": masks.causal(T)[0, 0] | (position < 2)[None],
        "sliding window of 2": masks.sliding_window(T, 2)[0, 0],
    }
    pages = dict(zip(knobs(figure)["mask"].options, html(figure), strict=True))
    for name, mask in wanted.items():
        said = re.findall(r">(yes|no)", pages[name])
        assert said == ["yes" if may else "no" for may in mask.flatten().tolist()], name
    blind = pages["causal, the first 2 padding"]
    assert "Queries 0, 1 see nothing" in blind and "see nothing" not in pages["causal"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"T": 3, "n_padding": 3}, "n_padding must leave at least one of the 3"),
        ({"T": 3, "n_padding": 0}, "n_padding"),
        ({"T": 1, "n_padding": 1}, "n_padding"),
        ({"T": 4, "scores": torch.zeros(3, 3)}, r"scores must be \(4, 4\), got \(3, 3\)"),
        ({"T": 2, "n_padding": 1, "scores": torch.full((2, 2), torch.nan)}, "must be finite"),
        ({"T": 4, "tokens": ["a"]}, "tokens has 1 tokens for 4"),
    ],
)
def test_mask_gallery_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        figures.mask_gallery(**arguments)


def test_position_similarity_shows_the_row_and_whether_only_the_offset_counts():
    offset = torch.arange(5)[None] - torch.arange(5)[:, None]
    schemes = {"relative": -offset.abs().float(), "absolute": torch.arange(25.0).view(5, 5)}
    figure = figures.position_similarity(schemes, [0, 2])
    pages = iter(html(figure))
    for matrix, verdict in zip(schemes.values(), ("only the", "the absolute"), strict=True):
        for position in (0, 2):
            page = next(pages)
            rows = re.findall(r"<tr><td>(-?\d+)<td>(-?[\d.]+)", page)
            values = enumerate(matrix[position].tolist())
            assert rows == [(str(k - position), f"{value + 0.0:.3f}") for k, value in values]
            assert verdict in page and 'role=img aria-label="' in page
            assert (
                page.count(",") > 5 and len(re.findall(r'points="([^"]+)"', page)[0].split()) == 5
            )


@pytest.mark.parametrize(
    ("schemes", "positions", "message"),
    [
        ({}, None, "schemes is empty"),
        ({"a": torch.eye(3), "b": torch.eye(4)}, None, r"schemes\['b'\] must be a square"),
        ({"a": torch.ones(3, 4)}, None, "must be a square matrix"),
        ({"a": torch.ones(1, 1)}, None, "at least 2 positions"),
        ({"a": torch.eye(3) * torch.inf}, None, "must be finite"),
        ({"a": torch.eye(3)}, [3], "positions must lie between 0 and 2"),
        ({"a": torch.eye(3)}, [-1], "positions must lie between 0 and 2"),
        ({"a": torch.eye(3)}, [], "positions must lie between 0 and 2"),
    ],
)
def test_position_similarity_refuses(schemes, positions, message):
    with pytest.raises(ValueError, match=message):
        figures.position_similarity(schemes, positions)


def depth(*values: float, **options: object) -> str:
    """The one page of a figure that shows these values."""
    norms = lambda name: torch.tensor(values)  # noqa: E731
    return html(figures.depth_explorer(norms, {"net": ["deep"]}, **options))[0]


def test_depth_explorer_draws_each_layer_on_a_logarithmic_axis():
    page = depth(1e-4, 1e-2, 1.0, decades=4)
    points = [point.split(",") for point in re.findall(r'points="([^"]+)"', page)[0].split()]
    across, down = ([float(point[axis]) for point in points] for axis in (0, 1))
    assert across[1] - across[0] == across[2] - across[1] > 0
    assert down[0] - down[1] == pytest.approx(down[1] - down[2]) and down[0] > down[2]
    assert re.findall(r"<tr><td>(\d)<td>(\S+?)(?=<)", page) == [
        *(("0", "1.0e-04"), ("1", "1.0e-02"), ("2", "1.0e+00"))
    ]
    assert "a layer multiplies it by 0.01 on average" in page


def test_depth_explorer_keeps_what_is_beyond_the_axis_in_its_table():
    page = depth(1e-9, 1.0, 1e9, decades=2)
    edges = [
        float(point.split(",")[1]) for point in re.findall(r'points="([^"]+)"', page)[0].split()
    ]
    assert edges == [138.0, 76.0, 14.0] and "1.0e-09" in page and "1.0e+09" in page


def test_depth_explorer_says_where_nothing_arrives():
    assert "exactly 0 somewhere" in depth(0.0, 0.0, 1.0)


def test_depth_explorer_asks_for_every_combination():
    asked = []

    def norms(*options):
        asked.append(options)
        return torch.ones(2)

    figures.depth_explorer(norms, {"a": ["x", "y"], "b": [1, 2, 3]}, start={"b": 2})
    assert asked == list(itertools.product("xy", (1, 2, 3)))


@pytest.mark.parametrize(
    ("values", "decades", "message"),
    [
        ((1.0,), 3, "must be at least 2 numbers"),
        ((1.0, -1.0), 3, "none negative"),
        ((1.0, torch.inf), 3, r"the gradient norm for deep must be finite, but at index \(1,\)"),
        ((1.0, 1.0), 0, "decades must be at least 1, got 0"),
    ],
)
def test_depth_explorer_refuses(values, decades, message):
    with pytest.raises(ValueError, match=message):
        depth(*values, decades=decades)


# The one that computes


def painted(figure: widgets.Widget) -> list[str]:
    return cells(next(page for page in html(figure) if "<table" in page))


def test_mask_painter_follows_each_tick():
    scores = torch.randn(3, 3)
    figure = figures.mask_painter(scores, TOKENS)
    boxes = find(figure, widgets.Checkbox)
    mask = torch.ones(3, 3, dtype=torch.bool)
    for box, (i, j) in zip(boxes, itertools.product(range(3), repeat=2), strict=True):
        box.value = False
        mask[i, j] = False
        bias = scores.masked_fill(~mask, -torch.inf)
        assert painted(figure) == rounded(bias.softmax(-1).nan_to_num(0.0))
    assert set(painted(figure)) == {"0.00"}
    boxes[4].value = True
    assert painted(figure)[4] == "1.00"


@pytest.mark.parametrize(
    ("preset", "mask"),
    [
        ("all", torch.ones(3, 3, dtype=torch.bool)),
        ("causal", masks.causal(3)[0, 0]),
        ("none", torch.zeros(3, 3, dtype=torch.bool)),
    ],
)
def test_mask_painter_lays_down_whole_masks(preset, mask):
    scores = torch.randn(3, 3)
    figure = figures.mask_painter(scores)
    find(figure, widgets.Checkbox)[0].value = False
    button = {b.description: b for b in find(figure, widgets.Button)}[preset]
    button.click()
    assert [box.value for box in find(figure, widgets.Checkbox)] == mask.flatten().tolist()
    nothing = torch.zeros(1, 1, 3, 1)
    given = scaled_dot_product_attention(
        nothing, nothing, nothing, mask[None, None], scores[None, None]
    )
    assert painted(figure) == rounded(given[1][0, 0])


def test_mask_painter_needs_a_kernel_and_says_so():
    figure = figures.mask_painter(torch.zeros(2, 2))
    assert "needs-kernel" in figure._dom_classes
    labels = [box.tooltip for box in find(figure, widgets.Checkbox)]
    assert labels == [f"may {q} look at {k}?" for q in "01" for k in "01"]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(2, 3), r"must be \(T, T\) with T at most 10, got \(2, 3\)"),
        (torch.zeros(11, 11), "at most 10"),
        (torch.zeros(3), "must be"),
        (torch.tensor([[torch.nan]]), "must be finite"),
    ],
)
def test_mask_painter_refuses(scores, message):
    with pytest.raises(ValueError, match=message):
        figures.mask_painter(scores)


# The parts


def test_every_shade_reads_on_its_ground():
    """4.5 to 1 at least, which WCAG 2 asks of text, in light and dark."""
    for theme, step in itertools.product(blocks.RAMPS, range(blocks.LEVELS)):
        ground, ink = blocks.shade(step, theme)
        tones = sorted((blocks.luminance(ground), 1.0 if ink == "#fff" else 0.0))
        assert (tones[1] + 0.05) / (tones[0] + 0.05) >= 4.5


@pytest.mark.parametrize(
    ("value", "step"), [(0.0, 0), (0.04, 0), (0.06, 1), (0.5, 5), (1.0, 10), (1.2, 10), (-0.1, 0)]
)
def test_shades_follow_the_weight(value, step):
    assert blocks.level(value) == step


def test_numbers_have_no_negative_zero():
    assert blocks.number(-0.001) == "0.00" and blocks.number(-0.0051) == "-0.01"


def test_the_stylesheet_knows_as_many_rows_as_are_asked_for():
    style = blocks.stylesheet(3)
    assert ".la-q2)" in style and ".la-q3)" not in style
    assert "/*" not in style and "\n" not in style
    assert html(figures.heads_viewer(TOKENS, weights(1, 3, 3)))[:3] == [
        f"<i class=la-q{i}></i>" for i in range(3)
    ]
