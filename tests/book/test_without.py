"""The book without JavaScript, its search, and the edition for a class, without solutions."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from llm_anatomy.exercises import attention

ROOT = Path(__file__).resolve().parents[2]
BOOK_FILES = ("_config.yml", "references.bib", "pyproject.toml", "requirements.txt")
EDITION_TOC = """\
format: jb-book
root: index
chapters:
  - file: exercises
"""
# Texts that are in the page and not on the screen, apart from what is folded away or unpicked.
UNSEEN = """() => {
    const found = [], spared =
        "script, style, details, .headerlink, .la-off, .la-mark, .la-form[hidden], .needs-kernel";
    const walker = document.createTreeWalker(
        document.querySelector("article"), NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const text = walker.currentNode.textContent.trim(), box = walker.currentNode.parentElement;
        if (text && !box.closest(spared) && !box.checkVisibility({visibilityProperty: true}))
            found.push(text.slice(0, 80));
    }
    return found;
}"""

pytestmark = pytest.mark.book


@pytest.fixture(scope="session")
def plain(browser):
    """A browser whose pages run no script."""
    context = browser.new_context(java_script_enabled=False)
    yield context
    context.close()


@pytest.mark.browser
def test_a_chapter_reads_without_javascript(plain, site, chapter_path):
    """All text is there and visible, formulas as their source, figures as their first frame."""
    page = plain.new_page()
    page.goto(f"{site.base}/{chapter_path}")
    article = page.locator("article")
    assert len(article.inner_text()) > 10_000
    assert page.evaluate(UNSEEN) == []
    formulas = page.locator("article .math.notranslate").all_text_contents()  # in folds as well
    assert formulas and all("\\(" in text or "\\[" in text for text in formulas)
    for frame in page.locator(".first-frame:not(:has(.needs-kernel))").all():
        assert frame.is_visible() and len(frame.inner_text()) > 40
    for kind in ("hint", "solution", "quiz"):
        fold = page.locator(f"details.{kind}").first
        fold.locator("summary").click()
        assert fold.locator(":scope > :not(summary)").first.is_visible()
    page.close()


@pytest.mark.browser
@pytest.mark.parametrize(
    ("word", "page"),
    [("softmax", "chapters/01-attention.html"), ("注意力", "reference/glossary.html")],
)
def test_the_search_finds_a_word(visit, word, page):
    visit.page.goto(f"{visit.base}/search.html?q={word}")
    results = visit.page.locator("#search-results li a")
    results.first.wait_for()
    found = {re.split("[#?]", link.get_attribute("href"))[0] for link in results.all()}
    assert page in found
    assert visit.faults == []


@pytest.mark.browser
def test_the_search_opens_by_keyboard(visit):
    visit.page.goto(f"{visit.base}/index.html")
    visit.page.keyboard.press("Control+k")
    field = visit.page.locator("#pst-search-dialog input[type=search]")
    field.wait_for()
    field.fill("softmax")
    field.press("Enter")
    visit.page.wait_for_url("**/search.html?q=softmax*")
    visit.page.locator("#search-results li a").first.wait_for()
    assert visit.faults == []


@pytest.mark.browser
def test_the_search_finds_nothing_where_there_is_nothing(visit):
    visit.page.goto(f"{visit.base}/search.html?q=qqxxzzy")
    visit.page.get_by_text("did not match any documents").first.wait_for()
    assert visit.page.locator("#search-results li a").count() == 0


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [False, True], ids=["edition for all", "class edition"])
def test_the_class_edition_holds_no_solution(tmp_path, hidden):
    """A small book with the help of a chapter's exercises, built with solutions and without."""
    for name in BOOK_FILES:
        shutil.copy2(ROOT / name, tmp_path / name)
    for name in ("package.json", "package-lock.json"):
        shutil.copy2(ROOT / name, tmp_path / name)
    for name in ("assets", "src", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    exercises = attention.check.__self__.by_name
    helps = "\n\n".join(f"```{{exercise-help}} attention {name}\n```" for name in exercises)
    (tmp_path / "index.md").write_text("# Book\n")
    (tmp_path / "exercises.md").write_text(f"# Exercises\n\n{helps}\n")
    (tmp_path / "_toc.yml").write_text(EDITION_TOC)
    program = Path(sys.executable).with_name("jupyter-book" + (".exe" if os.name == "nt" else ""))
    built = subprocess.run(
        [program, "build", "."],
        cwd=tmp_path,
        env=os.environ | {"BOOK_HIDE_SOLUTIONS": "1" if hidden else "0"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    pages = tmp_path / "_build" / "html"
    page = BeautifulSoup((pages / "exercises.html").read_text(encoding="utf-8"), "html.parser")
    assert len(page.select("details.hint")) == 2 * len(exercises)
    assert len(page.select("details.solution")) == (0 if hidden else len(exercises))
    everything = [squeezed(page.get_text())]
    for path in [*pages.rglob("_sources/*"), *pages.glob("searchindex.js")]:
        if path.is_file():
            everything.append(squeezed(path.read_text(encoding="utf-8")))
    for exercise in exercises.values():
        found = any(squeezed(exercise.solution) in text for text in everything)
        assert found is not hidden, exercise.name
