"""Sphinx extension: the page of claims, made from claims.yml and from the tags of the chapters.

    ```{claims-count}
    ```

is a table of verdicts by topic, and

    ```{claims} attention
    ```

lists the claims of one topic: what the source says and with which words, the verdict, what is
true, the papers, and the evidence. Evidence is a test, linked to its line in the repository, or a
cell of a chapter, linked to its place on the page. A cell is evidence for a claim when it carries
the tag `claim:C063`.
"""

import ast
import functools
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent))

from book_pages import BRANCH, repository

LEDGER = "claims.yml"
TAG = re.compile(r"claim:(C\d{3})")
VERDICTS = ("right", "imprecise", "wrong", "unverifiable")
DOCUMENTS = {  # the sources, by the beginning of the names of their files
    "000": "LLM主要类别架构(一)",
    "001": "介绍 (LLM 语言模型的架构)",
    "002": "一文了解大模型面试最基础问题",
    "003": "transformer跟bert、gpt、大模型的联系",
    "004": "LLM(大型语言模型)",
}


@dataclass(frozen=True)
class Cell:
    """A code cell that decides a claim: its page, and its number among the page's code cells."""

    page: str
    number: int
    title: str

    def anchor(self, claim: str) -> str:
        return f"{claim.lower()}-{Path(self.page).name}-{self.number}"


def claims(root: Path) -> list[dict]:
    """Return the entries of claims.yml."""
    return yaml.safe_load((root / LEDGER).read_text(encoding="utf-8"))["claims"]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    """Return the claims that a cell says it decides."""
    found = (TAG.fullmatch(tag) for tag in cell.metadata.get("tags", ()))
    return [match[1] for match in found if match]


def evidence_cells(root: Path) -> dict[str, list[Cell]]:
    """Return for each claim the cells that carry its tag, in the order of the chapters."""
    found: dict[str, list[Cell]] = defaultdict(list)
    for path in sorted((root / "chapters").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        page = path.relative_to(root).with_suffix("").as_posix()
        title = re.sub(r"^# ", "", notebook.cells[0].source.partition("\n")[0])
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for number, cell in enumerate(code, start=1):
            for claim in tags(cell):
                found[claim].append(Cell(page, number, title))
    return dict(found)


@functools.cache
def test_lines(path: Path) -> dict[str, int]:
    """Return the line of each test function of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node.lineno for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_address(root: Path, node: str) -> str:
    """Return where the repository shows a test, given as path::name.

    Raises:
        LookupError: there is no such test.
    """
    name, _, function = node.partition("::")
    path = root / name
    line = test_lines(path).get(function) if path.is_file() else None
    if line is None:
        raise LookupError(f"{LEDGER} names {node}, which does not exist")
    return f"{repository(root)}/blob/{BRANCH}/{name}#L{line}"


def plain(text: str) -> str:
    """Return text in which Markdown finds no HTML, no emphasis and no formula."""
    return re.sub(r"([\\<*$])", r"\\\1", text)


def entry(root: Path, claim: dict, cells: list[Cell]) -> str:
    """Return one claim in the book's Markdown."""
    name = claim["id"]
    document = DOCUMENTS[claim["document"][:3]]
    text = [
        f"({name.lower()})=",
        f"### {name}: {claim['verdict']}",
        "",
        plain(claim["claim"]) + ".",
        "",
    ]
    text += [f"> {plain(claim['phrase'])}", ">", f"> — {document}", ""]
    if claim["correction"]:
        text += [f"**What is true.** {plain(claim['correction'])}", ""]
    if claim["sources"]:
        text += [f"**Papers.** {{cite}}`{','.join(claim['sources'])}`", ""]
    links = [
        f"{{ref}}`{cell.title}, cell {cell.number} <{cell.anchor(name)}>`" for cell in cells
    ] + [
        f"[{node.partition('::')[2].removeprefix('test_').replace('_', ' ')}]"
        f"({test_address(root, node)})"
        for node in claim["evidence"]
    ]
    none = "None: nothing that is published, and nothing that can be run, decides it."
    text += [f"**Evidence.** {'; '.join(links) + '.' if links else none}", ""]
    return "\n".join(text)


class ClaimsDirective(SphinxDirective):
    """What the two directives share: they depend on the ledger and the chapters."""

    def start(self) -> Path:
        root = Path(self.env.srcdir)
        for path in (root / LEDGER, *sorted((root / "chapters").glob("*.ipynb"))):
            self.env.note_dependency(str(path))
        return root

    def markdown(self, text: str) -> list[nodes.Node]:
        """Parse Markdown that may hold headings."""
        holder = nodes.section()
        holder.document = self.state.document
        lines = StringList(text.splitlines(), source=self.env.doc2path(self.env.docname))
        self.state.nested_parse(lines, self.content_offset, holder, match_titles=True)
        return holder.children


class Claims(ClaimsDirective):
    """The claims of one topic."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        root = self.start()
        chosen = [claim for claim in claims(root) if claim["topic"] == self.arguments[0]]
        if not chosen:
            raise self.error(f"{LEDGER} has no claim of the topic {self.arguments[0]!r}")
        cells = evidence_cells(root)
        try:
            text = [entry(root, claim, cells.get(claim["id"], [])) for claim in chosen]
        except LookupError as error:
            raise self.error(str(error)) from error
        return self.markdown("\n".join(text))


class ClaimsCount(ClaimsDirective):
    """How many claims of each topic have which verdict."""

    def run(self) -> list[nodes.Node]:
        every = claims(self.start())
        count = Counter((claim["topic"], claim["verdict"]) for claim in every)
        topics = list(dict.fromkeys(claim["topic"] for claim in every))
        rows = [["Topic", *VERDICTS, "all"]]
        for topic in sorted(topics):
            numbers = [count[topic, verdict] for verdict in VERDICTS]
            rows.append([topic, *map(str, [*numbers, sum(numbers)])])
        totals = [sum(count[topic, verdict] for topic in topics) for verdict in VERDICTS]
        rows.append(["all", *map(str, [*totals, sum(totals)])])
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|:--" + "|--:" * (len(rows[0]) - 1) + "|")
        return self.markdown("\n".join(lines))


def add_anchors(app: Sphinx, doctree: nodes.document) -> None:
    """Give each cell that decides a claim a place that the page of claims can link to."""
    page = app.env.docname
    if not page.startswith("chapters/"):
        return
    domain = app.env.get_domain("std")
    wanted = {
        (cell.number, claim): cell.anchor(claim)
        for claim, cells in evidence_cells(Path(app.srcdir)).items()
        for cell in cells
        if cell.page == page
    }
    code = [n for n in doctree.findall(nodes.container) if n.get("nb_element") == "cell_code"]
    for number, node in enumerate(code, start=1):
        for name in node["classes"]:
            if found := re.fullmatch("tag_" + TAG.pattern, name):
                anchor = wanted[number, found[1]]
                node["ids"].append(anchor)
                domain.anonlabels[anchor] = page, anchor


def setup(app: Sphinx) -> dict:
    """Register the directives and the anchors."""
    app.add_directive("claims", Claims)
    app.add_directive("claims-count", ClaimsCount)
    app.connect("doctree-read", add_anchors)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
