"""The page of the tiny world shows every kind of data of the package, as the package makes it."""

from pathlib import Path

import pytest

from llm_anatomy import tiny_world
from tools import book_world

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "reference" / "tiny-world.md").read_text(encoding="utf-8")
MODULES = sorted(path.stem for path in Path(tiny_world.__file__).parent.glob("*.py"))


def test_the_page_shows_every_module_that_draws_examples():
    drawing = [
        name
        for name in MODULES
        if name != "__init__" and list(book_world.generators(book_world.load(name)))
    ]
    assert drawing
    for name in drawing:
        assert f"{{world-examples}} {name}\n" in PAGE


def test_every_kind_of_data_is_shown_once():
    names = [
        name
        for module in ("stories", "labels", "pairs", "text_to_text", "in_context")
        for name, _ in book_world.generators(book_world.load(module))
    ]
    assert sorted(names) == sorted(set(names))
    assert {"stories", "sentiment", "banks", "questions", "translations", "prompts"} <= set(names)
    assert "many" not in names


def test_an_example_shows_its_texts_and_what_is_known():
    labels = book_world.load("labels")
    bank = labels.banks(1, seed=0)[0]
    shown = book_world.line(bank)
    assert " ".join(bank.words) in shown
    assert f"river {bank.river}" in shown and f"position {bank.position}" in shown
    pair = book_world.load("text_to_text").translations(1, seed=0)[0]
    assert book_world.line(pair) == f"{' '.join(pair.source)} | {' '.join(pair.target)}"


@pytest.mark.slow
def test_the_entropies_are_those_of_the_grammar():
    stories = book_world.load("stories").STORIES
    table = book_world.entropies()
    assert f"| {stories.entropy().per_token:.4f} |" in table
    assert f"| {stories.cross_entropy().per_token:.4f} |" in table
