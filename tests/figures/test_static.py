"""Static figures: what they refuse, what they draw, and the text that goes with them."""

import base64

import pytest
import torch

from llm_anatomy import figures, masks
from llm_anatomy.figures import static

WEIGHTS = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.2, 0.3, 0.5]])
TOKENS = ["a", "long token", "c"]
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def shown(monkeypatch):
    """Show a figure; return the data and the metadata of its output."""
    given = []
    monkeypatch.setattr(static, "display", lambda data, **options: given.append((data, options)))

    def show(figure, alt="What it shows."):
        figures.show(figure, alt=alt)
        data, options = given.pop()
        assert not given and options["raw"]
        return data, options["metadata"]["image/png"]

    return show


def line():
    return figures.line_plot([1, 2, 3], {"one": [3, 1, 2]}, x_label="x", y_label="y")


MAKERS = {
    "heat_map": lambda: figures.heat_map(WEIGHTS, TOKENS),
    "line_plot": line,
    "mask_pictures": lambda: figures.mask_pictures({"causal": masks.causal(4)[0, 0]}),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_show_gives_the_same_png_each_time_with_its_text(make, shown):
    data, metadata = shown(make(), alt="  One line\n of text. ")
    assert data["text/plain"] == metadata["alt"] == "One line of text."
    png = base64.b64decode(data["image/png"])
    assert png.startswith(b"\x89PNG") and b"Software" not in png
    assert shown(make())[0]["image/png"] == data["image/png"]


def test_show_gives_the_width_of_the_page_not_of_the_pixels(shown):
    figure, _ = figures.canvas(width=4.0)
    assert shown(figure)[1]["width"] == 4 * 96


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_show_refuses_no_text(alt):
    with pytest.raises(ValueError, match="alt is empty"):
        figures.show(line(), alt=alt)


def test_heat_map_writes_each_weight_beside_its_tokens():
    axes = figures.heat_map(WEIGHTS, TOKENS, title="Head 0").axes[0]
    written = {label.get_position(): label.get_text() for label in axes.texts}
    assert written == {(j, i): f"{WEIGHTS[i, j].item():.2f}" for i in range(3) for j in range(3)}
    assert torch.equal(torch.as_tensor(axes.images[0].get_array()), WEIGHTS)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == TOKENS
    assert axes.get_title(loc="left") == "Head 0"


@pytest.mark.parametrize(
    ("weights", "queries", "keys", "message"),
    [
        (WEIGHTS, ["a"], None, "queries has 1 tokens for 3 positions"),
        (WEIGHTS, TOKENS, ["a"], "keys has 1 tokens for 3 positions"),
        (WEIGHTS * 2, TOKENS, None, r"must sum to 1 .* row \(0,\) sums to 2.000"),
        (WEIGHTS.log() * 0, TOKENS, None, r"must be finite, but at index \(0, 1\) it is nan"),
        (WEIGHTS - 0.5, TOKENS, None, "must not be negative"),
        (torch.empty(0, 0), [], None, "is empty"),
    ],
)
def test_heat_map_refuses(weights, queries, keys, message):
    with pytest.raises(ValueError, match=message):
        figures.heat_map(weights, queries, keys)


def test_line_plot_draws_the_mean_and_the_band_of_its_runs():
    runs = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 7.0]])
    series = {"one": [0.0, 1.0, 2.0], "many": runs}
    figure = figures.line_plot([1, 2, 4], series, x_label="x", y_label="y", log_x=True)
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["one", "many"]
    assert axes.lines[0].get_ydata().tolist() == [0, 1, 2]
    assert axes.lines[1].get_ydata().tolist() == [2, 2, 5]
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (1, 7)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}
    assert len(styles) == 2 and len({style[1] for style in styles}) == 2  # not by colour alone


@pytest.mark.parametrize(
    ("series", "message"),
    [
        ({}, "series is empty"),
        ({"a": [1.0]}, "series 'a' has 1 points, x has 2"),
        ({"a": [1.0, float("inf")]}, r"series 'a' must be finite, but at index \(1,\)"),
        ({str(n): [1.0, 2.0] for n in range(7)}, "7 series; a reader can tell at most 6"),
    ],
)
def test_line_plot_refuses(series, message):
    with pytest.raises(ValueError, match=message):
        figures.line_plot([1, 2], series, x_label="x", y_label="y")


def test_mask_pictures_draw_each_mask_under_its_name():
    given = {name: masks.sliding_window(5, n)[0, 0] for n, name in enumerate("abcd", start=1)}
    drawn = figures.mask_pictures(given, columns=3).axes
    assert [axes.get_title(loc="left") for axes in drawn] == list("abcd")
    for axes, mask in zip(drawn, given.values(), strict=True):
        assert torch.equal(torch.as_tensor(axes.images[0].get_array()).bool(), mask)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "masks is empty"),
        ({"m": torch.ones(2, 2)}, "mask 'm' must be a boolean matrix"),
        ({"m": torch.ones(2, dtype=torch.bool)}, "mask 'm' must be a boolean matrix"),
        ({"m": torch.ones(0, 2, dtype=torch.bool)}, "mask 'm' must be a boolean matrix"),
    ],
)
def test_mask_pictures_refuse(given, message):
    with pytest.raises(ValueError, match=message):
        figures.mask_pictures(given)
