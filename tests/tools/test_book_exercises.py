"""The help under an exercise is the package's own, folded, and its mistakes stop the build."""

import io
import shutil
import sys
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from sphinx.application import Sphinx

from llm_anatomy.exercises import attention

ROOT = Path(__file__).resolve().parents[2]
EXERCISE = next(iter(attention.check.__self__.by_name.values()))


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Build one page of Markdown; return it and the warnings."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))

    def make(text: str, **config: object) -> tuple[BeautifulSoup, str]:
        source = tmp_path / "source"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        (source / "index.md").write_text(f"# Page\n\n{text}\n")
        extensions = ["myst_parser", "sphinx_exercise", "book_exercises"]
        warnings = io.StringIO()
        app = Sphinx(
            str(source),
            None,
            str(tmp_path / "html"),
            str(tmp_path / "doctrees"),
            "html",
            confoverrides={
                "extensions": extensions,
                "html_theme": "basic",
                "myst_enable_extensions": ["dollarmath"],
                **config,
            },
            status=None,
            warning=warnings,
            freshenv=True,
        )
        app.build()
        page = (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
        return BeautifulSoup(page, "html.parser"), warnings.getvalue()

    yield make
    sys.modules.pop("book_exercises", None)


HELP = f"```{{exercise-help}} attention {EXERCISE.name}\n```"


def test_two_hints_and_the_solution_of_the_package(build):
    page, warnings = build(HELP)
    folds = page.select("details")
    assert [fold["class"] for fold in folds] == [["hint"], ["hint"], ["solution"]]
    names = [fold.summary.get_text() for fold in folds]
    labels = ("Hint 1", "Hint 2", "Solution")
    assert names == [f"{label} for {EXERCISE.title}" for label in labels]
    assert not any(fold.has_attr("open") for fold in folds)
    assert folds[2].pre.get_text().strip() == EXERCISE.solution.strip()
    assert "error" not in warnings.lower()


def test_the_class_edition_leaves_the_solution_out(build):
    page, _ = build(HELP, hide_solutions=True)
    assert len(page.select("details.hint")) == 2 and not page.select("details.solution")
    assert EXERCISE.solution.strip() not in page.get_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```{exercise-help} attention no_such\n```", "has no exercise 'no_such'; it has: "),
        ("```{exercise-help} nowhere no_such\n```", "there is no exercise module 'nowhere'"),
    ],
)
def test_help_for_what_is_not_there_is_told(build, text, said):
    _, warnings = build(text)
    assert said in warnings
