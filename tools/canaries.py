"""Check that the tests turn red when the book is broken.

    python tools/canaries.py                 every canary
    python tools/canaries.py link export     those whose name holds one of the words

Each canary breaks one thing in a copy of the repository and runs the smallest command of `make
test` that has to see it. The command must be green before, red after, and name what is broken:
red for another reason proves nothing.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import tasks

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 120
CUT_CELLS = 4  # code cells that stay in the notebook that is run
PAGE = """\
# A page

(a-section)=
## A section

See {ref}`a-section`, {doc}`chapters/NAME` and {cite}`vaswani2017attention`.
"""
TOC = """\
format: jb-book
root: index
chapters:
  - file: chapters/NAME
  - file: reference/glossary
  - file: reference/bibliography
"""
MISSING = {
    "{ref}`no-such-section`": "no-such-section",
    "{doc}`chapters/no-such-page`": "no-such-page",
    "{numref}`no-such-figure`": "no-such-figure",
    "{eq}`no-such-equation`": "no-such-equation",
    "{term}`no such term`": "no such term",
    "{cite}`no-such-paper`": "no-such-paper",
    "[text](no-such-file.md)": "no-such-file",
}


@dataclass(frozen=True)
class Canary:
    """One way to break the book.

    Args:
        prepare: cuts the copy down, so that the command is quick.
        damage: breaks one thing in the copy.
        command: what has to see it.
        signs: patterns that the red command's output must hold.
    """

    name: str
    prepare: Callable[[Path], None]
    damage: Callable[[Path], None]
    command: Callable[[Path], list[list[str | Path]]]
    signs: tuple[str, ...]


def copy(root: Path, target: Path) -> None:
    """Copy what git knows or would add, and the scripts of the pages."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        source, place = root / name, target / name
        if source.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place)
    offline = root / "assets" / "offline"
    if offline.exists():
        shutil.copytree(offline, target / "assets" / "offline", dirs_exist_ok=True)


def first(root: Path) -> Path:
    return sorted((root / "chapters").glob("*.ipynb"))[0]


def edit(path: Path, change: Callable[[nbformat.NotebookNode], None]) -> None:
    """Change a notebook on disk."""
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def printing(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the last cell that printed something."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in reversed(cells):
        if any(output.output_type == "stream" for output in cell.outputs):
            return cell
    raise LookupError("no cell of the first chapter stores something printed")


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    if text.count(old) < 1:
        raise LookupError(f"{path.name} no longer holds {old!r}: write this canary again")
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


# How the copies are cut down


def nothing(root: Path) -> None:
    """Leave the copy whole."""


def one_short_notebook(root: Path) -> None:
    """Keep the first chapter up to the first cells that print."""
    path = first(root)
    for other in root.glob("chapters/*.ipynb"):
        if other != path:
            other.unlink()

    def cut(notebook: nbformat.NotebookNode) -> None:
        count, printed = 0, False
        for position, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                count += 1
                printed = printed or any(o.output_type == "stream" for o in cell.outputs)
            if count >= CUT_CELLS and printed:
                notebook.cells = notebook.cells[: position + 1]
                return

    edit(path, cut)


def small_book(root: Path) -> None:
    """Keep a page, the title of one chapter, the glossary, and the papers."""
    one_short_notebook(root)
    name = first(root).stem

    def cut(notebook: nbformat.NotebookNode) -> None:
        notebook.cells = [nbformat.v4.new_markdown_cell("# A chapter", id="title")]
        notebook.metadata.pop("widgets", None)

    edit(first(root), cut)
    (root / "index.md").write_text(PAGE.replace("NAME", name), encoding="utf-8")
    (root / "_toc.yml").write_text(TOC.replace("NAME", name), encoding="utf-8")


# The commands


def nbval(root: Path) -> list[list[str | Path]]:
    return [[sys.executable, "-m", "pytest", "-q", "--color=no", *tasks.NBVAL]]


def pytest(*arguments: str) -> Callable[[Path], list[list[str | Path]]]:
    return lambda root: [[sys.executable, "-m", "pytest", "-q", "--color=no", *arguments]]


def rules(root: Path) -> list[list[str | Path]]:
    return pytest("tests/test_notebooks.py", "-k", f"keeps_the_rules and {first(root).stem}")(root)


def build(root: Path) -> list[list[str | Path]]:
    shutil.rmtree(root / "_build", ignore_errors=True)
    program = Path(sys.executable).with_name("jupyter-book" + (".exe" if os.name == "nt" else ""))
    return [[program, *tasks.BOOK_BUILD]]


def build_and_links(root: Path) -> list[list[str | Path]]:
    test = "tests/tools/test_colab.py::test_the_button_of_each_chapter_opens_its_export"
    return [*build(root), *pytest(test)(root)]


def export(root: Path) -> list[list[str | Path]]:
    return [[sys.executable, "tools/colab.py", "--check"]]


# What is broken


def fail_a_cell(root: Path) -> None:
    def damage(notebook: nbformat.NotebookNode) -> None:
        printing(notebook).source += '\nraise RuntimeError("canary")'

    edit(first(root), damage)


def change_an_output(root: Path) -> None:
    def damage(notebook: nbformat.NotebookNode) -> None:
        output = next(o for o in printing(notebook).outputs if o.output_type == "stream")
        output.text = "canary " + output.text

    edit(first(root), damage)


def strip_an_output(root: Path) -> None:
    def damage(notebook: nbformat.NotebookNode) -> None:
        printing(notebook).outputs = []

    edit(first(root), damage)


def break_references(root: Path) -> None:
    with (root / "index.md").open("a", encoding="utf-8") as page:
        page.write("\n" + "\n\n".join(MISSING) + "\n")


def remove_an_export(root: Path) -> None:
    (root / "colab" / first(root).name).unlink()


def change_a_chapter(root: Path) -> None:
    def damage(notebook: nbformat.NotebookNode) -> None:
        notebook.cells[-1].source += "\n\nA canary sings.\n"

    edit(first(root), damage)


def forget_the_scale(root: Path) -> None:
    replace(root / "src/llm_anatomy/attention.py", "q.shape[-1] ** -0.5", "1.0")


CANARIES = (
    Canary("failing cell", one_short_notebook, fail_a_cell, nbval, ("RuntimeError", "canary")),
    Canary("changed output", one_short_notebook, change_an_output, nbval, ("canary",)),
    Canary("stripped output", nothing, strip_an_output, rules, ("output was stripped",)),
    Canary(
        "broken cross-references",
        small_book,
        break_references,
        build,
        tuple(re.escape(sign) for sign in MISSING.values()),
    ),
    Canary("dead Colab link", small_book, remove_an_export, build_and_links, (r"colab/.*\.ipynb",)),
    Canary("stale export", nothing, change_a_chapter, export, ("not what its chapter gives",)),
    Canary(
        "mutant of src",
        nothing,
        forget_the_scale,
        pytest("-x", "tests/test_attention.py"),
        (r"FAILED tests/test_attention\.py",),
    ),
)


def run(root: Path, canary: Canary) -> tuple[bool, str]:
    """Return whether the commands are green in a copy, and what they say."""
    environment = os.environ | tasks.ENVIRONMENT | {"PYTHONPATH": str(root / "src")}
    environment["IPYTHONDIR"] = str(root / "_build" / "ipython")
    said = ""
    for command in canary.command(root):
        done = subprocess.run(
            [str(part) for part in command],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        said += done.stdout
        if done.returncode:
            return False, said
    return True, said


def judge(root: Path, canary: Canary) -> str:
    """Return what is wrong with a canary, or nothing where it does its work."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        try:
            copy(root, folder)
            canary.prepare(folder)
            green, said = run(folder, canary)
            if not green:
                return "red before anything was broken:\n" + tail(said)
            canary.damage(folder)
            green, said = run(folder, canary)
        except subprocess.TimeoutExpired as error:
            return f"took more than {error.timeout:.0f} s"
        except LookupError as error:
            return str(error)
    if green:
        return "NOT SEEN: the command stays green"
    missing = [sign for sign in canary.signs if not re.search(sign, said)]
    return f"red, but without a word on {', '.join(missing)}:\n{tail(said)}" if missing else ""


def tail(text: str, lines: int = 25) -> str:
    return "\n".join("  | " + line for line in text.strip().splitlines()[-lines:])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("only", nargs="*", help="words of the canaries to run")
    options = parser.parse_args(arguments)
    chosen = [c for c in CANARIES if not options.only or any(w in c.name for w in options.only)]
    if not chosen:
        sys.exit("there is no such canary: " + ", ".join(canary.name for canary in CANARIES))
    seen = 0
    for canary in chosen:
        start = time.monotonic()
        print(f"  {canary.name} ... ", end="", flush=True)
        fault = judge(ROOT, canary)
        seen += not fault
        print(f"{fault or 'seen'} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{seen} of {len(chosen)} canaries seen")
    sys.exit(0 if seen == len(chosen) else 1)


if __name__ == "__main__":
    main()
