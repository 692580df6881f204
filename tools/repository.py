"""Move the book to another address, or check that every file knows the present one.

    python tools/repository.py https://github.com/owner/name     change it everywhere
    python tools/repository.py                                   write what is made from it again
    python tools/repository.py --check                           compare only

The address stands in pyproject.toml. From it are made the links at the top of README.md, the
command there that installs the package, two fields of CITATION.cff, and everything in colab/. The
pages of the book read it when they are built.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import colab
from tools.book_pages import BRANCH, repository

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+?(?:\.git)?/?")
BLOCK = re.compile(
    r"(?P<start><!-- addresses: written by `make repository` -->\n).*?(?P<end><!-- end of addr)",
    re.DOTALL,
)


class RepositoryError(Exception):
    """The address is no address, or a file lacks the place for it."""


def change_project(root: Path, url: str) -> None:
    """Put a new address into pyproject.toml.

    Raises:
        RepositoryError: the address is not like https://github.com/owner/name.
    """
    if not ADDRESS.fullmatch(url):
        raise RepositoryError(f"{url!r} is not like https://github.com/owner/name")
    url = url.rstrip("/").removesuffix(".git")
    path = root / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    text = replaced(text, r'^(Repository = ").*(")$', rf"\g<1>{url}\g<2>", path)
    path.write_text(text, encoding="utf-8", newline="\n")


def replaced(text: str, pattern: str, replacement: str, path: Path) -> str:
    """Replace what must stand in a text exactly once."""
    made, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
    if count != 1:
        raise RepositoryError(f"{path.name} has {count} places like {pattern}, not one")
    return made


def derived(root: Path) -> dict[Path, str]:
    """Return the files made from the address, as they should be, colab/ apart."""
    url = repository(root)
    first = next(iter(colab.chapters(root)), None)
    page = first.relative_to(root).with_suffix("").as_posix() if first else "chapters/01"
    pages = colab.Book.pages(root)
    links = {
        "Read the book": pages,
        "Open the first chapter in Colab": colab.colab_address(root, page),
        "Source": f"{url}/tree/{BRANCH}",
        "Report a mistake": f"{url}/issues/new",
    }
    line = " ·\n".join(f"[{text}]({address})" for text, address in links.items())
    path = root / "README.md"
    readme = path.read_text(encoding="utf-8")
    if not BLOCK.search(readme):
        raise RepositoryError("README.md has no place for the addresses")
    readme = BLOCK.sub(lambda found: f"{found['start']}{line}\n{found['end']}", readme)
    readme = replaced(readme, r'(llm-anatomy\[figures\] @ git\+)[^"]*', rf"\g<1>{url}", path)
    path = root / "CITATION.cff"
    citation = path.read_text(encoding="utf-8")
    citation = replaced(citation, r"^(repository-code: ).*$", rf"\g<1>{url}", path)
    citation = replaced(citation, r"^(url: ).*$", rf"\g<1>{pages}", path)
    return {root / "README.md": readme, root / "CITATION.cff": citation}


def stale(root: Path) -> list[str]:
    """Return the files that do not know the present address."""
    made = derived(root).items()
    found = [path.name for path, text in made if path.read_text(encoding="utf-8") != text]
    return found + colab.stale(root)


def write(root: Path) -> list[str]:
    """Write every file that is made from the address; return those that changed."""
    changed = []
    for path, text in derived(root).items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8", newline="\n")
            changed.append(path.name)
    return changed + [f"colab/{name}" for name in colab.write(root)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("url", nargs="?", help="the new address")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.check:
            found = stale(options.root)
            print("\n".join(found) or "every file knows the address")
            sys.exit(1 if found else 0)
        if options.url:
            change_project(options.root, options.url)
        changed = write(options.root)
    except (RepositoryError, colab.ColabError) as error:
        sys.exit(str(error))
    print(f"The book stands at {repository(options.root)}")
    print("changed: " + ", ".join(changed) if changed else "nothing else had to change")


if __name__ == "__main__":
    main()
