"""A move of the repository reaches every file that names its address."""

import re
import shutil
from pathlib import Path

import pytest

from tools import repository

ROOT = Path(__file__).resolve().parents[2]
NEW = "https://github.com/somebody-new/other.book"
COPIED = ("chapters", "colab", "reference", "pyproject.toml", "references.bib", "README.md")


@pytest.fixture
def book(tmp_path: Path) -> Path:
    for name in (*COPIED, "CITATION.cff", "assets", "index.md"):
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("offline"))
        else:
            shutil.copy2(source, target)
    return tmp_path


def test_every_committed_file_knows_the_address():
    assert repository.stale(ROOT) == []


def test_a_move_reaches_every_file(book: Path):
    old = repository.repository(book)
    assert old in (book / "README.md").read_text()
    with pytest.raises(SystemExit, match=r"^0$"):
        repository.main(["--root", str(book), "--check"])
    repository.main(["--root", str(book), NEW])
    assert repository.repository(book) == NEW
    owner = old.split("/")[-2]
    for path in [*book.glob("*.*"), *book.glob("colab/*")]:
        if path.is_file() and path.suffix not in (".png", ".bib"):
            text = path.read_text(encoding="utf-8")
            assert old not in text and f"{owner}.github.io" not in text, path.name
    assert f"{NEW}/issues/new" in (book / "README.md").read_text()
    assert f"git+{NEW}@main" in next(iter(sorted(book.glob("colab/*")))).read_text()
    assert "url: https://somebody-new.github.io/other.book/" in (book / "CITATION.cff").read_text()
    assert repository.stale(book) == [] and repository.write(book) == []


def test_a_file_that_was_left_behind_is_told(book: Path):
    path = book / "CITATION.cff"
    path.write_text(path.read_text().replace("github.com", "example.org"))
    assert repository.stale(book) == ["CITATION.cff"]
    path = book / "pyproject.toml"
    path.write_text(re.sub(r"github\.com/[\w/-]+", "github.com/a/b", path.read_text()))
    assert {"README.md", "CITATION.cff"} < set(repository.stale(book))


@pytest.mark.parametrize(
    "url", ["github.com/a/b", "https://github.com/a", "https://github.com/a/b/c"]
)
def test_what_is_no_address_changes_nothing(book: Path, url: str):
    before = (book / "pyproject.toml").read_text()
    with pytest.raises(SystemExit, match="is not like"):
        repository.main(["--root", str(book), url])
    assert (book / "pyproject.toml").read_text() == before
