"""The page of claims: what an entry says, where its links lead, and what it refuses."""

from pathlib import Path

import nbformat
import pytest

from tools import book_claims

ROOT = Path(__file__).resolve().parents[2]
CLAIM = {
    "id": "C001",
    "document": "000_0.txt",
    "claim": "A decoder starts with <s>",
    "phrase": "以 <s> 开始",
    "verdict": "wrong",
    "correction": "2 * 3 and 4 * 5 are no emphasis",
    "sources": ["vaswani2017attention", "devlin2019bert"],
    "evidence": [],
}


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A small book: one chapter with two tagged cells, one test."""
    for folder in ("chapters", "tests/claims"):
        (tmp_path / folder).mkdir(parents=True)
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_markdown_cell("# The title\n\nText."),
        nbformat.v4.new_code_cell("1"),
        nbformat.v4.new_code_cell("2", metadata={"tags": ["claim:C001", "hide-input"]}),
        nbformat.v4.new_markdown_cell("More."),
        nbformat.v4.new_code_cell("3", metadata={"tags": ["claim:C001", "claim:C002"]}),
    ]
    nbformat.write(notebook, tmp_path / "chapters/07-end.ipynb")
    (tmp_path / "tests/claims/test_it.py").write_text("\n\ndef test_one():\n    pass\n")
    address = '[project.urls]\nRepository = "https://github.com/a/b"\n'
    (tmp_path / "pyproject.toml").write_text(f"[project]\n{address}")
    return tmp_path


def test_cells_are_found_by_their_tags(book: Path):
    found = book_claims.evidence_cells(book)
    assert found == {
        "C001": [
            book_claims.Cell("chapters/07-end", 2, "The title"),
            book_claims.Cell("chapters/07-end", 3, "The title"),
        ],
        "C002": [book_claims.Cell("chapters/07-end", 3, "The title")],
    }
    assert found["C002"][0].anchor("C002") == "c002-07-end-3"


def test_an_entry_links_its_tests_and_cells(book: Path):
    cells = book_claims.evidence_cells(book)["C001"]
    node = "tests/claims/test_it.py::test_one"
    text = book_claims.entry(book, CLAIM | {"evidence": [node]}, cells)
    assert "{ref}`The title, cell 2 <c001-07-end-2>`" in text
    assert f"[one](https://github.com/a/b/blob/main/{node.partition('::')[0]}#L3)" in text
    assert "{cite}`vaswani2017attention,devlin2019bert`" in text


def test_text_is_text_and_no_markup(book: Path):
    text = book_claims.entry(book, CLAIM, [])
    assert r"starts with \<s>" in text and r"以 \<s> 开始" in text
    assert r"2 \* 3 and 4 \* 5" in text


def test_a_claim_that_nothing_decides_says_so(book: Path):
    assert "**Evidence.** None" in book_claims.entry(book, CLAIM, [])


@pytest.mark.parametrize("node", ["tests/claims/test_it.py::test_two", "tests/no.py::test_one"])
def test_evidence_that_does_not_exist_is_refused(book: Path, node: str):
    with pytest.raises(LookupError, match="does not exist"):
        book_claims.entry(book, CLAIM | {"evidence": [node]}, [])


def test_every_document_of_the_ledger_has_a_name():
    assert {claim["document"][:3] for claim in book_claims.claims(ROOT)} <= set(
        book_claims.DOCUMENTS
    )
