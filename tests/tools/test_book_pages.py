"""What the build adds to the pages; what a reader sees of it is in tests/book."""

import base64
from pathlib import Path
from types import SimpleNamespace

import pytest
from docutils import nodes

from llm_anatomy import figures
from tools import book_pages

ROOT = Path(__file__).resolve().parents[2]


def model(name: str, **state) -> dict:
    return {"model_name": name, "state": state}


def of(*keys: str) -> list[str]:
    return [f"IPY_MODEL_{key}" for key in keys]


def test_the_address_comes_from_one_place(tmp_path):
    text = '[project.urls]\nRepository = "https://github.com/some/book/"\n'
    (tmp_path / "pyproject.toml").write_text("[project]\n" + text)
    assert book_pages.repository(tmp_path) == "https://github.com/some/book"
    assert book_pages.colab_address(tmp_path, "chapters/01-a") == (
        "https://colab.research.google.com/github/some/book/blob/main/colab/01-a.ipynb"
    )


def test_versions_are_those_of_the_requirements(tmp_path):
    (tmp_path / "requirements.txt").write_text("numpy==1\ntorch==2.99.0\ntransformers==5.1\n")
    said = book_pages.tested_with(tmp_path)
    assert said == "Every output was computed and tested with torch 2.99.0 and transformers 5.1."
    assert "torch" in book_pages.tested_with(ROOT)


def test_first_frame_shows_the_chosen_page_and_the_controls_as_text():
    state = {
        "box": model("VBoxModel", children=of("knob", "stack"), _dom_classes=["la"]),
        "knob": model("DropdownModel", description="a<b", _options_labels=["u", "v"], index=1),
        "stack": model("StackModel", children=of("one", "two"), selected_index=1),
        "one": model("HTMLModel", value="<b>one</b>"),
        "two": model("HTMLModel", value="<b>two</b>"),
    }
    assert book_pages.first_frame("box", state) == (
        '<div class="first-frame-box la">'
        '<p class="first-frame-control">a&lt;b <b>v</b></p>'
        '<div class="first-frame-box"><div><b>two</b></div></div></div>'
    )


def test_first_frame_of_pictures_sliders_and_the_unknown():
    data = base64.b64encode(b"png").decode()
    image = model("ImageModel", format="png", alt='a "b"')
    image["buffers"] = [{"path": ["value"], "data": data}]
    state = {"i": image, "s": model("IntSliderModel", description="n", value=3), "x": model("X")}
    shown = book_pages.first_frame("i", state)
    assert shown == f'<img alt="a &quot;b&quot;" src="data:image/png;base64,{data}">'
    assert "n <b>3</b>" in book_pages.first_frame("s", state)
    assert book_pages.first_frame("x", state) == book_pages.first_frame("gone", state) == ""


def test_first_frame_of_a_real_figure_is_its_first_page():
    figure = figures.frames(["<p>one", "<p>two"], "page", about="Two pages.")
    state = {key: {"model_name": w.get_state()["_model_name"], "state": w.get_state()}
             for key, w in widgets_of(figure)}  # fmt: skip
    shown = book_pages.first_frame(figure.model_id, state)
    assert "Two pages." in shown and "<p>one" in shown and "<p>two" not in shown


def widgets_of(widget):
    yield widget.model_id, widget
    for child in getattr(widget, "children", ()):
        yield from widgets_of(child)


def test_search_splits_english_and_every_part_of_a_chinese_word():
    words = book_pages.EnglishWithChinese({}).split("self-attention 自注意力, softmax")
    assert {"self", "attention", "softmax", "自注意力", "注意力", "注意", "意力"} <= set(words)
    assert "力" not in words and "" not in words


def test_chinese_words_say_their_language():
    tree = nodes.paragraph("", "", nodes.Text("a 注意力 b"), nodes.literal("", "查询"))
    document = nodes.section("", tree)
    book_pages.mark_chinese(None, document, "page")
    marked = [node.astext() for node in document.findall(nodes.inline)]
    assert marked == ["注意力"] and tree.astext() == "a 注意力 b查询"
    term = nodes.term("", "查询")
    book_pages.mark_chinese(None, nodes.section("", term), "page")
    assert term["classes"] == ["language-zh"]


ICONS = (
    'x={"arrow-up":[384,512,["up"],"f062","M1z"],'
    'xmark:[1,2,[],"f00d",["a","b"]],sun:[5,5,[],"f185","M2"]}'
)


@pytest.mark.parametrize(
    ("used", "kept", "gone"),
    [
        ({"arrow-up"}, ["arrow-up"], ["xmark", "sun"]),
        ({"up"}, ["arrow-up"], ["xmark", "sun"]),
        ({"xmark", "sun"}, ["xmark", "sun"], ["arrow-up"]),
    ],
)
def test_only_icons_that_occur_are_kept(used, kept, gone):
    script = book_pages.keep_icons(ICONS, used)
    assert all(f"{name}" in script for name in kept)
    assert not any(name in script for name in gone) and script.startswith("x={")


def test_each_chapter_has_a_button_and_other_pages_have_none():
    app = SimpleNamespace(
        srcdir=str(ROOT), env=SimpleNamespace(doc2path=lambda page: f"{page}.ipynb")
    )
    context = {"header_buttons": [{"label": "other"}]}
    book_pages.add_colab_button(app, "reference/x", "", context, None)
    assert len(context["header_buttons"]) == 1
    book_pages.add_colab_button(app, "chapters/01-x", "", context, None)
    assert context["header_buttons"][0]["url"] == book_pages.colab_address(ROOT, "chapters/01-x")


@pytest.mark.parametrize(("variable", "hidden"), [("1", True), ("0", False), ("", False)])
def test_the_class_edition_is_chosen_by_a_variable(monkeypatch, variable, hidden):
    monkeypatch.setattr(book_pages.vendor_assets, "ensure", lambda root: False)
    monkeypatch.setenv("BOOK_HIDE_SOLUTIONS", variable)
    config = SimpleNamespace(html_theme_options={}, html_context={}, hide_solutions=False)
    book_pages.configure(SimpleNamespace(srcdir=str(ROOT)), config)
    assert config.hide_solutions is hidden
    assert config.html_theme_options["repository_url"] == book_pages.repository(ROOT)
