"""What stands in the built pages, without a browser: links, pictures, references, exercises."""

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest
from bs4 import BeautifulSoup

from tools.book_pages import BRANCH, colab_address, repository
from tools.chapter_rules import described

pytestmark = pytest.mark.book

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
# What MyST would have turned into something else: roles, directives, targets, unknown references.
RAW = re.compile(r"\{[a-z][\w:-]*\}`|`{3,}\{|:::+\s*\{|^\([\w-]+\)=\s*$|\?\?", re.MULTILINE)
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def test_there_are_pages():
    assert list(HTML.glob("chapters/*.html")), f"no chapters under {HTML}: run `make book` first"
    built = {path.stem for path in HTML.glob("chapters/*.html")}
    assert built == {path.stem for path in ROOT.glob("chapters/*.ipynb")}


@cache
def anchors(path: Path) -> frozenset[str]:
    """The names that a page's links may end in."""
    text = path.read_text(encoding="utf-8")
    return frozenset(re.findall(r'\s(?:id|name)="([^"]+)"', text))


def fault(page: str, link: str) -> str:
    """Say what is wrong with a link that a page holds; nothing where it leads somewhere."""
    address, fragment = urldefrag(link)
    if urlsplit(address).scheme in ("http", "https"):
        return outside(address)
    if urlsplit(address).scheme:  # mailto:, data:, javascript:
        return ""
    path = HTML / unquote(urlsplit(urljoin(page, address)).path) if address else HTML / page
    path = path / "index.html" if path.is_dir() else path
    if not path.is_file():
        return f"{link}: there is no {path.relative_to(HTML)}"
    fragment = unquote(fragment)
    if fragment and path.suffix == ".html" and fragment not in anchors(path):
        return f"{link}: {path.relative_to(HTML)} has no anchor {fragment}"
    return ""


def outside(address: str) -> str:
    """Look up what a link promises to be in the repository; other hosts are not asked."""
    owner_and_name = "/".join(repository(ROOT).split("/")[-2:])
    inside = re.match(
        rf".*?/{re.escape(owner_and_name)}/(blob|tree|raw|edit)/([^/]+)/?(.*)", address
    )
    if not inside:
        return ""
    _, branch, path = inside.groups()
    if branch != BRANCH:
        return f"{address}: the branch is {BRANCH}"
    if not (ROOT / unquote(path.partition("?")[0])).exists():
        return f"{address}: the repository holds no {path}"
    return ""


def links(page: BeautifulSoup) -> list[str]:
    found = [node["href"] for node in page.select("a[href], link[href]")]
    return found + [node["src"] for node in page.select("script[src], img[src]")]


def test_every_link_leads_somewhere(path, soup):
    given = links(soup(path))
    assert len(given) > 10
    assert [wrong for link in given if (wrong := fault(path, link))] == []


@pytest.mark.parametrize(
    "link",
    [
        "no-such-page.html",
        "../chapters/no-such-page.html",
        "glossary.html#no-such-anchor",
        "#no-such-anchor",
        "../_images/no-such-picture.png",
        "REPOSITORY/blob/main/no-such-file.py",
        "REPOSITORY/tree/other/tools",
        "COLAB",
    ],
)
def test_a_dead_link_is_seen(link):
    link = link.replace("REPOSITORY", repository(ROOT))
    link = link.replace("COLAB", colab_address(ROOT, "chapters/99-none"))
    assert fault("reference/glossary.html", link)


def test_the_colab_button_opens_the_export(chapter_path, soup):
    buttons = [a["href"] for a in soup(chapter_path).select("a.btn-colab")]
    assert buttons == [colab_address(ROOT, chapter_path.removesuffix(".html"))]
    assert (ROOT / "colab" / Path(chapter_path).with_suffix(".ipynb").name).is_file()


def test_the_repository_is_one(path, soup):
    """Links to issues and sources name the address of pyproject.toml."""
    given = {link for link in links(soup(path)) if "/issues/new" in link or "/blob/" in link}
    assert given
    owner_and_name = "/".join(repository(ROOT).split("/")[-2:])
    foreign = {link for link in given if f"/{owner_and_name}/" not in link}
    assert {
        link for link in foreign if urlsplit(link).netloc == "colab.research.google.com"
    } == set()
    assert {link for link in foreign if "/issues/new" in link} == set()


def test_every_picture_says_what_it_shows(path, soup):
    for picture in soup(path).select("img"):
        alt = picture.get("alt") or ""
        assert described(alt) and len(alt.split()) >= 5, f"{picture.get('src', '')[:80]}: {alt!r}"


def text(page: BeautifulSoup) -> str:
    """The prose of a page: without code, formulas and scripts."""
    main = BeautifulSoup(str(page.select_one("main")), "html.parser")
    for node in main.select("code, pre, script, style, .math, .la"):
        node.replace_with(" · ")
    return main.get_text()


def test_no_markup_is_left_over(path, soup):
    prose = text(soup(path))
    assert len(prose) > 200
    assert RAW.findall(prose) == []
    assert soup(path).select(".problematic, .system-message") == []


@pytest.mark.parametrize(
    "left", ["{cite}`a2020`", "{numref}`x", "```{note}", ":::{tip}", "(sec-x)=\n", "see ??"]
)
def test_left_over_markup_is_seen(left):
    assert RAW.search(text(BeautifulSoup(f"<main><p>so\n{left}</p></main>", "html.parser")))


def test_figures_and_formulas_are_numbered(chapter_path, soup):
    page = soup(chapter_path)
    captions = [figure.select_one("figcaption") for figure in page.select("figure[id^=fig-]")]
    numbers = [c and c.select_one(".caption-number").get_text(strip=True) for c in captions]
    assert numbers and all(re.fullmatch(r"Fig\. \d+(\.\d+)*", number or "") for number in numbers)
    assert len(set(numbers)) == len(numbers)
    formulas = page.select("div.math[id^=equation-eq]")
    numbers = [formula.select_one(".eqno").get_text(strip=True)[:-1] for formula in formulas]
    assert numbers and all(re.fullmatch(r"\(\d+(\.\d+)*\)", number) for number in numbers), numbers
    assert len(set(numbers)) == len(numbers)


def test_citations_lead_to_the_bibliography(chapter_path, soup):
    """By author and year, and each to an entry of its own."""
    found = soup(chapter_path).select("a[href*='bibliography.html#']")
    assert found, "a chapter that cites nothing"
    entries = soup("reference/bibliography.html").select(".citation")
    known = {entry["id"] for entry in entries}
    for link in found:
        assert urldefrag(link["href"])[1] in known
        assert re.search(r"\d{4}", link.get_text()), link


def test_help_is_folded_under_each_exercise(chapter_path, soup):
    page = soup(chapter_path)
    exercises = page.select("div.exercise")
    assert len(exercises) >= 8
    assert len(page.select("details.hint")) == 2 * len(exercises)
    assert len(page.select("details.solution")) == len(exercises)
    folds = page.select("details.hint, details.solution, details.quiz")
    assert [fold for fold in folds if fold.has_attr("open")] == []
    assert all(fold.select_one("summary").get_text(strip=True) for fold in folds)


def test_the_glossary_names_every_term_in_chinese(soup):
    """Beside each term stands its Chinese name; a name of a product is the same in Chinese."""
    named, term, chinese = 0, "", False
    for node in soup("reference/glossary.html").select("dl.glossary > dt, dl.glossary > dd"):
        if node.name == "dt" and CHINESE.search(node.get_text()):
            assert "zh" in (node.get("lang"), *(part.get("lang") for part in node.select("span")))
            chinese = True
        elif node.name == "dt":
            term = node.get_text()
        else:
            assert chinese or term[0].isupper(), f"{term} has no Chinese name"
            named, chinese = named + 1, False
    assert named > 50


def test_nothing_is_run_on_another_host(path, soup):
    """No script of a kernel service, and no script or style from anywhere else."""
    page = soup(path)
    loaded = [
        node.get("src") or node.get("href") for node in page.select("script[src], link[href]")
    ]
    assert [link for link in loaded if urlsplit(link).netloc] == []
    assert "thebe" not in str(page)
