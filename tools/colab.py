"""Export the chapters to colab/, in the plain Markdown that Colab shows.

    python tools/colab.py              write colab/ again
    python tools/colab.py --check      compare colab/ with what the chapters give

Colab knows no directives and no roles of the book, no pictures beside the notebook, and not the
package. So directives become quotations, headings and formulas; terms and other pages become links;
citations become links to the papers, with a list at the end; pictures are embedded; and a first
cell, the same in every chapter, installs the package and leaves torch and numpy alone. Hints and
solutions stay in the package, one call away. Outputs are kept; an interactive figure shows its
first frame until its cell is run. The same chapters always give the same bytes.
"""

import argparse
import base64
import copy
import hashlib
import itertools
import mimetypes
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import nbformat
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors.index import slugify
from mdit_py_plugins.colon_fence import colon_fence_plugin
from mdit_py_plugins.deflist import deflist_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin
from pybtex.database import BibliographyData, Entry, parse_file
from pybtex.plugin import find_plugin
from pybtex.richtext import Text
from sphinx.util.nodes import _make_id

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.book_pages import BRANCH, colab_address, first_frame, repository

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python", "pygments_lexer": "ipython3"}
VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
ASIDES = {
    "caution": "Caution",
    "important": "Important",
    "note": "Note",
    "seealso": "See also",
    "tip": "Tip",
    "warning": "Warning",
}
OPTION = re.compile(r":([\w-]+):(?: +(.*))?$")
INLINE = re.compile(
    r"(?P<code>(?<![`}])(?P<ticks>`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)(?P=ticks)(?!`))"
    r"|(?P<math>(?<![\\$])\$(?![\s$])(?:\\.|[^$\\])+?(?<!\s)\$(?![\d$]))"
    r"|(?<!\\)\{(?P<role>[\w:-]+)\}(?P<fence>`+)(?P<content>(?:(?!\n\s*\n).)+?)(?P=fence)(?!`)"
    r"|!\[(?P<alt>[^\]]*)\]\((?P<image>[^)\s]+)\)"
    r"|\]\((?P<target>[^)\s]+)\)",
    re.DOTALL,
)
TITLED = re.compile(r"(?P<text>.*\S)\s*<(?P<target>[^<>]+)>", re.DOTALL)


class ColabError(Exception):
    """A chapter holds something that has no plain form; the message says what and where."""


def parser() -> MarkdownIt:
    """Return a parser of the same Markdown as the book's."""
    made = MarkdownIt("commonmark").enable("table")
    made.use(colon_fence_plugin).use(deflist_plugin).use(myst_block_plugin)
    return made.use(dollarmath_plugin, double_inline=True)


@dataclass(frozen=True)
class Label:
    """What a reference can point at: its kind, its number or title, and where it stands."""

    kind: str
    page: str
    text: str


@dataclass
class Book:
    """What an export has to know beyond its own chapter: addresses, papers, labels, titles."""

    root: Path
    papers: BibliographyData
    labels: dict[str, Label] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    terms: dict[str, str] = field(
        default_factory=dict
    )  # in small letters -> as the glossary has it

    @classmethod
    def read(cls, root: Path) -> "Book":
        """Collect the titles and labels of every page."""
        book = cls(root, parse_file(root / "references.bib", bib_format="bibtex"))
        for path in chapters(root):
            page = path.relative_to(root).with_suffix("").as_posix()
            book.collect(page, nbformat.read(path, as_version=4).cells)
        for path in sorted([*root.glob("reference/*.md"), root / "index.md"]):
            if path.exists():
                cell = nbformat.v4.new_markdown_cell(path.read_text(encoding="utf-8"))
                book.collect(path.relative_to(root).with_suffix("").as_posix(), [cell])
        return book

    def collect(self, page: str, cells: list[nbformat.NotebookNode]) -> None:
        counts = dict.fromkeys(("equation", "figure", "exercise"), 0)

        def add(kind: str, name: str | None, text: str = "") -> None:
            if kind in counts:
                counts[kind] += 1
                text = str(counts[kind])
            if name:
                if name in self.labels:
                    raise ColabError(f"{page}: the label {name} is given twice")
                self.labels[name] = Label(kind, page, text)

        for cell in cells:
            if cell.cell_type == "code":
                if figure := cell.metadata.get("mystnb", {}).get("figure"):
                    add("figure", figure.get("name"))
                continue
            self._collect_markdown(page, cell.source, add)

    def _collect_markdown(self, page: str, text: str, add: Callable[..., None]) -> None:
        pending: list[str] = []
        tokens = parser().parse(text)
        for token, after in itertools.zip_longest(tokens, tokens[1:]):
            if token.type == "myst_target":
                pending.append(token.content)
            elif token.type == "heading_open":
                self.titles.setdefault(page, after.content)
                for name in pending:
                    add("section", name, after.content)
                pending = []
            elif token.type == "math_block_label":
                add("equation", token.info)
            elif directive := Directive.of(token):
                if directive.name == "math" and "label" in directive.options:
                    add("equation", directive.options["label"])
                elif directive.name == "figure":
                    add("figure", directive.options.get("name"))
                elif directive.name == "exercise":
                    add("exercise", directive.options.get("label"))
                elif directive.name == "glossary":
                    entries = re.split(r"\n{2,}", directive.body.strip())
                    names = [entry.partition("\n")[0].strip() for entry in entries]
                    self.terms.update((name.lower(), name) for name in names)
                if directive.name in ("admonition", "exercise", *ASIDES):
                    self._collect_markdown(page, directive.body, add)

    def page_address(self, page: str) -> str:
        """Where a page stands in the published book."""
        return f"{self.pages(self.root)}{page}.html"

    @staticmethod
    def pages(root: Path) -> str:
        """Where the published book begins."""
        owner, name = repository(root).split("/")[-2:]
        return f"https://{owner.lower()}.github.io/{name}/"

    def address(self, page: str) -> str:
        """Where a link from an export leads: chapters open in Colab, other pages in the book."""
        if page.startswith("chapters/"):
            return colab_address(self.root, page)
        return self.page_address(page)


@dataclass
class Directive:
    """A directive taken apart: name, argument, options and body."""

    name: str
    argument: str
    options: dict[str, str]
    body: str

    @classmethod
    def of(cls, token: Token) -> "Directive | None":
        """Return the directive that a token of a fence holds, if it holds one."""
        if token.type not in ("fence", "colon_fence"):
            return None
        head = re.fullmatch(r"\{([\w:-]+)\}\s*(.*)", token.info.strip())
        if not head:
            return None
        lines = token.content.rstrip("\n").split("\n")
        options: dict[str, str] = {}
        if lines[0].strip() == "---" and "---" in lines[1:]:
            end = lines.index("---", 1)
            given = yaml.safe_load("\n".join(lines[1:end])) or {}
            options = {key: str(value) for key, value in given.items()}
            lines = lines[end + 1 :]
        while lines and (option := OPTION.match(lines[0].strip())):
            options[option[1]] = (option[2] or "").strip()
            lines.pop(0)
        return cls(head[1], head[2].strip(), options, "\n".join(lines).strip("\n"))


class Export:
    """Turn one chapter into its Colab notebook."""

    def __init__(self, book: Book, page: str) -> None:
        self.book, self.page = book, page
        self.counts = dict.fromkeys(("equation", "figure", "exercise"), 0)
        self.cited: list[str] = []
        self.linked: set[str] = set()  # headings that a link of this chapter points at
        self.directives: dict[str, Callable[[Directive], str]] = {
            "admonition": self.aside,
            "code": self.code_block,
            "code-block": self.code_block,
            "exercise": self.exercise,
            "exercise-help": self.exercise_help,
            "figure": self.figure,
            "image": self.figure,
            "math": self.equation,
            **dict.fromkeys(ASIDES, self.aside),
        }

    def notebook(self, source: nbformat.NotebookNode) -> nbformat.NotebookNode:
        """Return the export of a chapter."""
        state = source.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
        text = "\n".join(cell.source for cell in source.cells if cell.cell_type == "markdown")
        self.linked = set(re.findall(r"\]\(#([^)\s]+)\)", text))
        cells = [install_cell(self.book.root)]
        for cell in source.cells:
            made = copy.deepcopy(cell)
            made.metadata = nbformat.from_dict({})
            if cell.cell_type == "markdown":
                made.source = self.markdown(cell.source)
                cells.append(made)
                continue
            made.outputs = [plain_output(output, state) for output in made.outputs]
            cells.append(made)
            if figure := cell.metadata.get("mystnb", {}).get("figure"):
                caption = self.caption(figure)
                cells.append(nbformat.v4.new_markdown_cell(caption, id=f"{cell.id}-caption"))
        cells.append(nbformat.v4.new_markdown_cell(self.ending(), id="references"))
        made = nbformat.v4.new_notebook(cells=cells)
        name = PurePosixPath(self.page).name + ".ipynb"
        made.metadata = nbformat.from_dict(
            {
                "colab": {"name": name, "provenance": [], "toc_visible": True},
                "kernelspec": KERNEL,
                "language_info": LANGUAGE,
            }
        )
        made.nbformat_minor = 5
        nbformat.validate(made)
        return made

    # Blocks

    def markdown(self, text: str) -> str:
        """Return Markdown of the book as plain Markdown."""
        lines = text.split("\n")
        edits: list[tuple[int, int, str | None]] = []  # lines, and what replaces them or None
        tokens = parser().parse(text)
        for token, after in itertools.zip_longest(tokens, tokens[1:]):
            if token.map is None:
                continue
            start, end = token.map
            if directive := Directive.of(token):
                if directive.name not in self.directives:
                    raise ColabError(f"{self.page}: Colab has no form of {{{directive.name}}}")
                indent = re.match(r"\s*", lines[start])[0]
                made = self.directives[directive.name](directive)
                made = "\n".join(indent + line if line else "" for line in made.split("\n"))
                edits.append((start, end, made))
            elif token.type in ("fence", "colon_fence", "code_block", "html_block"):
                edits.append((start, end, None))
            elif token.type in ("math_block", "math_block_label"):
                label = token.info if token.type == "math_block_label" else None
                edits.append((start, end, self.formula(token.content.strip("\n"), label)))
            elif token.type == "myst_target":
                edits.append((start, end, anchor(token.content)))
            elif token.type == "myst_line_comment":
                edits.append((start, end, ""))
            elif token.type == "heading_open" and slugify(after.content) in self.linked:
                heading = self.inline("\n".join(lines[start:end]))
                edits.append((start, end, f"{anchor(slugify(after.content))}\n\n{heading}"))
            elif token.type == "dl_open":
                raise ColabError(f"{self.page}: Colab shows no definition lists: {lines[start]!r}")
        done, position = [], 0
        for start, end, replacement in sorted(edits, key=lambda edit: edit[:2]):
            if start < position:
                continue
            if start > position:
                done.append(self.inline("\n".join(lines[position:start])))
            done.append("\n".join(lines[start:end]) if replacement is None else replacement)
            position = end
        done.append(self.inline("\n".join(lines[position:])))
        return "\n".join(done).strip("\n")

    def aside(self, directive: Directive) -> str:
        title = self.inline(directive.argument) or ASIDES.get(directive.name, "")
        body = self.markdown(directive.body)
        if directive.name != "admonition" and directive.argument:  # text may start on this line
            title, body = ASIDES[directive.name], f"{title}\n{body}".strip()
        if "dropdown" in directive.options.get("class", ""):
            return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"
        return quoted(f"**{title}**\n\n{body}")

    def code_block(self, directive: Directive) -> str:
        return f"```{directive.argument}\n{directive.body}\n```"

    def exercise(self, directive: Directive) -> str:
        self.counts["exercise"] += 1
        head = f"### Exercise {self.counts['exercise']}. {self.inline(directive.argument)}"
        parts = [head, self.markdown(directive.body)]
        if label := directive.options.get("label"):
            parts.insert(0, anchor(label))
        return "\n\n".join(parts)

    def exercise_help(self, directive: Directive) -> str:
        module, name = directive.argument.split()
        return (
            f'Stuck? `{module}.hint("{name}")` prints a hint, `{module}.hint("{name}", 2)` says '
            f'more, and `{module}.solution("{name}")` prints a worked solution.'
        )

    def equation(self, directive: Directive) -> str:
        return self.formula(
            "\n".join(part for part in (directive.argument, directive.body) if part),
            directive.options.get("label"),
        )

    def formula(self, content: str, label: str | None) -> str:
        content = "\n".join(line for line in content.split("\n") if line.strip())
        if r"\\" in content and r"\begin{" not in content:
            content = f"\\begin{{aligned}}\n{content}\n\\end{{aligned}}"
        if not label:
            return f"$$\n{content}\n$$"
        self.counts["equation"] += 1
        return f"{anchor(label)}\n\n$$\n{content}\n\\tag{{{self.counts['equation']}}}\n$$"

    def figure(self, directive: Directive) -> str:
        image = f"![{directive.options.get('alt', '')}]({self.embed(directive.argument)})"
        if directive.name == "image" or not directive.body:
            return image
        caption = {"caption": directive.body, "name": directive.options.get("name")}
        return f"{image}\n\n{self.caption(caption)}"

    def caption(self, figure: dict) -> str:
        self.counts["figure"] += 1
        caption = self.markdown(figure.get("caption", ""))
        text = f"**Figure {self.counts['figure']}.** {caption}".strip()
        return f"{anchor(figure['name'])}\n\n{text}" if figure.get("name") else text

    def embed(self, target: str) -> str:
        """Return a picture as a data address, so that it travels with the notebook."""
        if re.match(r"https?:|data:", target):
            return target
        path = (self.book.root / PurePosixPath(self.page).parent / target).resolve()
        if target.startswith("/"):
            path = self.book.root / target.lstrip("/")
        if not path.is_file():
            raise ColabError(f"{self.page}: there is no picture {target}")
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

    # Inside a line

    def inline(self, text: str) -> str:
        """Resolve roles, links and pictures in text that holds no block of its own."""
        return INLINE.sub(self._inline, text)

    def _inline(self, found: re.Match[str]) -> str:
        if found["code"] or found["math"]:
            return found[0]
        if found["image"]:
            return f"![{found['alt']}]({self.embed(found['image'])})"
        if found["target"]:
            return f"]({self.link(found['target'])})"
        role, content = found["role"], " ".join(found["content"].split())
        titled = TITLED.fullmatch(content)
        text, target = (titled["text"], titled["target"]) if titled else (None, content)
        if role in ("cite", "cite:p", "cite:t", "cite:ps", "cite:ts"):
            return self.citation(content, textual=role.startswith("cite:t"))
        if role == "term":
            name = self.book.terms.get(target.lower())
            if name is None:
                raise ColabError(f"{self.page}: the glossary has no term {target}")
            glossary = self.book.page_address("reference/glossary")
            return f"[{text or target}]({glossary}#{_make_id(f'term-{name}')})"  # as Sphinx does
        if role == "doc":
            page = self.resolve(target)
            return f"[{text or self.book.titles[page]}]({self.book.address(page)})"
        if role in ("ref", "numref", "eq"):
            return self.reference(role, text, target)
        if role == "math":
            return f"${content}$"
        raise ColabError(f"{self.page}: Colab has no form of {{{role}}}`{content}`")

    def resolve(self, target: str) -> str:
        """Return the page that a path names, seen from this chapter."""
        parts: list[str] = []
        base = "" if target.startswith("/") else PurePosixPath(self.page).parent.as_posix()
        for part in f"{base}/{target}".split("/"):
            if part == "..":
                parts.pop()
            elif part not in ("", "."):
                parts.append(part)
        page = re.sub(r"\.(ipynb|md)$", "", "/".join(parts))
        if page not in self.book.titles:
            raise ColabError(f"{self.page}: there is no page {target}")
        return page

    def link(self, target: str) -> str:
        """Return where a Markdown link leads from an export."""
        if re.match(r"[a-z]+:|#", target):
            return target
        path, _, fragment = target.partition("#")
        address = self.book.address(self.resolve(path))
        return f"{address}#{fragment}" if fragment else address

    def reference(self, role: str, text: str | None, target: str) -> str:
        label = self.book.labels.get(target)
        if label is None:
            raise ColabError(f"{self.page}: {{{role}}} points at {target}, which does not exist")
        names = {"equation": f"({label.text})", "figure": f"Figure {label.text}"}
        shown = names.get(label.kind, label.text)
        if label.kind == "exercise":
            shown = f"Exercise {label.text}"
        if text:
            shown = text.replace("%s", label.text).replace("{number}", label.text)
        if label.page == self.page:
            return f"[{shown}](#{target})"
        return f"[{shown}]({self.book.address(label.page)}) in {self.book.titles[label.page]}"

    # Papers

    def citation(self, keys: str, textual: bool) -> str:
        """Return a citation as a link to each paper."""
        shown = []
        for key in keys.split(","):
            entry = self.book.papers.entries.get(key.strip())
            if entry is None:
                raise ColabError(f"{self.page}: references.bib has no {key.strip()}")
            if key.strip() not in self.cited:
                self.cited.append(key.strip())
            year = entry.fields.get("year", "n.d.")
            text = f"{authors(entry)} ({year})" if textual else f"{authors(entry)}, {year}"
            url = address_of(entry)
            shown.append(f"[{text}]({url})" if url else text)
        return ", ".join(shown) if textual else f"({'; '.join(shown)})"

    def ending(self) -> str:
        """Return the list of references and a word on where the notebook comes from."""
        parts = []
        if self.cited:
            style = find_plugin("pybtex.style.formatting", "plain")()
            backend = find_plugin("pybtex.backends", "markdown")("utf-8")
            bibliography = style.format_bibliography(self.book.papers, self.cited)
            texts = [" ".join(entry.text.render(backend).split()) for entry in bibliography]
            items = ["- " + re.sub(r"\\([-.:()!#+])", r"\1", text) for text in texts]
            parts.append("## Papers cited\n\n" + "\n".join(items))
        chapter = self.book.titles.get(self.page, self.page)
        source = f"{repository(self.book.root)}/blob/{BRANCH}/{self.page}.ipynb"
        parts.append(
            f"This notebook is made from [{chapter}]({self.book.page_address(self.page)}), a "
            f"chapter of The Anatomy of Language Models ([source]({source})). Text and figures: "
            "CC BY 4.0. Code: Apache-2.0."
        )
        return "\n\n".join(parts)


def anchor(name: str) -> str:
    """Return a mark that a link can lead to, in Colab and in Jupyter."""
    return f'<a id="{name}" name="{name}"></a>'


def quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.strip().split("\n"))


def authors(entry: Entry) -> str:
    """Return the surnames as a citation shows them."""
    people = entry.persons.get("author", [])
    names = [str(" ".join(person.prelast_names + person.last_names)) for person in people]
    names = [latex_to_text(name) for name in names]
    if len(names) > 2 or "others" in names:
        return f"{names[0]} et al."
    return " and ".join(names) or latex_to_text(entry.fields.get("title", entry.key))


def latex_to_text(text: str) -> str:
    return str(Text.from_latex(text))


def address_of(entry: Entry) -> str:
    if "url" in entry.fields:
        return entry.fields["url"]
    return f"https://doi.org/{entry.fields['doi']}" if "doi" in entry.fields else ""


def plain_output(output: nbformat.NotebookNode, state: dict) -> nbformat.NotebookNode:
    """Return an output without a widget's live view, which Colab cannot draw from a file."""
    if VIEW not in output.get("data", {}):
        return output
    view = output.data.pop(VIEW)
    if frame := first_frame(view["model_id"], state):
        note = "<p><i>Run this cell to make the figure move.</i></p>"
        output.data["text/html"] = frame + note
    return output


def needs(root: Path) -> list[str]:
    """Return what the package needs at run time and Colab may lack: all but torch."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.match(r"[\w-]+", line)[0] for line in project["dependencies"]]
    # --no-deps installs no dependency of a dependency: jaxtyping has this one.
    return [name for name in names if name != "torch"] + ["wadler-lindig"]


def install_cell(root: Path) -> nbformat.NotebookNode:
    """Return the first cell: it installs the package where it is missing, and nothing else."""
    source = f'''\
# Run this cell first. Where the course's package is missing, it is installed from its repository;
# --no-deps keeps the torch and the numpy that are already here.
import importlib.util


def missing(name):
    return importlib.util.find_spec(name.replace("-", "_")) is None


if missing("llm_anatomy"):
    wanted = " ".join(filter(missing, {" ".join(needs(root))!r}.split()))
    %pip install -q --no-deps {{wanted}} "llm-anatomy @ git+{repository(root)}@{BRANCH}"'''
    return nbformat.v4.new_code_cell(source, id="install")


def chapters(root: Path) -> list[Path]:
    return sorted((root / "chapters").glob("*.ipynb"))


def exports(root: Path) -> dict[str, str]:
    """Return the name and text of every export."""
    book = Book.read(root)
    made = {}
    for path in chapters(root):
        export = Export(book, path.relative_to(root).with_suffix("").as_posix())
        notebook = export.notebook(nbformat.read(path, as_version=4))
        made[path.name] = nbformat.writes(notebook) + "\n"
    return made


def stale(root: Path) -> list[str]:
    """Return what is wrong with colab/: exports that are missing, old, or of no chapter."""
    made = exports(root)
    found = {path.name: path.read_text(encoding="utf-8") for path in root.glob("colab/*.ipynb")}
    problems = [f"colab/{name} is missing" for name in sorted(made.keys() - found.keys())]
    problems += [f"colab/{name} has no chapter" for name in sorted(found.keys() - made.keys())]
    for name in sorted(made.keys() & found.keys()):
        if made[name] != found[name]:
            digest = hashlib.sha256(made[name].encode()).hexdigest()[:8]
            problems.append(f"colab/{name} is not what its chapter gives ({digest})")
    return problems


def write(root: Path) -> list[str]:
    """Write every export and remove those of chapters that are gone; return what changed."""
    folder = root / "colab"
    folder.mkdir(exist_ok=True)
    made, changed = exports(root), []
    for path in sorted(folder.glob("*.ipynb")):
        if path.name not in made:
            path.unlink()
            changed.append(path.name)
    for name, text in made.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8", newline="\n")
            changed.append(name)
    return changed


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--check", action="store_true", help="compare, write nothing")
    options.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    given = options.parse_args(arguments)
    try:
        if given.check:
            problems = stale(given.root)
            print("\n".join(problems) or "colab/ is what the chapters give")
            if problems:
                print("Run make colab.")
            sys.exit(1 if problems else 0)
        changed = write(given.root)
    except ColabError as error:
        sys.exit(str(error))
    print(f"{len(changed)} of {len(chapters(given.root))} exports changed")


if __name__ == "__main__":
    main()
