"""The search for learning rates runs the recipe of the chapter, and ties go to the smaller rate."""

import nbformat
import pytest

from tools import peft_rates


@pytest.fixture
def chapter(tmp_path):
    notebook = nbformat.v4.new_notebook()
    first, other, last = (
        nbformat.v4.new_code_cell(source)
        for source in (
            "GRID = (0.1, 0.01, 1.0)\nMETHODS = {'a': None}\nvalidation = 'held out'",
            "raise SystemExit('not a part of the recipe')",
            "def tuned(name, rate, seed):\n    return name, rate, seed\n\n"
            "def accuracy(run, data):\n    assert data == 'held out'\n"
            "    return {0.1: 0.5, 0.01: 0.5, 1.0: 0.25}[run[1]] + run[2]",
        )
    )
    for cell in (first, last):
        cell.metadata.tags = ["recipe"]
    notebook.cells = [first, other, last]
    path = tmp_path / "chapter.ipynb"
    nbformat.write(notebook, path)
    return path


def test_only_cells_of_the_recipe_run(chapter):
    scope = peft_rates.recipe(chapter)
    assert scope["GRID"] == (0.1, 0.01, 1.0)


def test_the_mean_over_seeds_decides_and_a_tie_goes_to_the_smaller_rate(chapter):
    means = peft_rates.sweep(peft_rates.recipe(chapter), "a", seeds=(0, 1))
    assert means == {0.1: 1.0, 0.01: 1.0, 1.0: 0.75}
    assert peft_rates.best(means) == 0.01


def test_the_chapter_has_a_recipe():
    cells = nbformat.read(peft_rates.CHAPTER, as_version=4).cells
    sources = [c.source for c in cells if "recipe" in c.metadata.get("tags", ())]
    for name in ("GRID", "METHODS", "def tuned(", "def accuracy(", "validation"):
        assert any(name in source for source in sources), name
