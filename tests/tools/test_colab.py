"""The export to Colab: every construct has a plain form, and colab/ is what the chapters give."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

from tools import colab

ROOT = Path(__file__).resolve().parents[2]
EXPORTS = sorted((ROOT / "colab").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/who/book/blob/main/colab/"
PAGES = "https://who.github.io/book/"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
OTHER = """\
(sec-masks)=
## Masks

```{math}
:label: eq-other
x
```
"""
PAPERS = """\
@article{solo, author = {Doe, Jane}, title = {Alone}, journal = {J}, year = 2001}
@article{many, author = {Lebr{\\'o}n, F. and B, C. and D, E.}, title = {{RNN} Team}, journal = {J},
  year = 2017, url = {https://example.org/many}}
"""
PROJECT = """\
[project]
dependencies = ["einops>=0.7", "torch>=2.5"]
[project.urls]
Repository = "https://github.com/who/book"
"""


GLOSSARY = """\
# Glossary

:::{glossary}
query
查询
  What a token looks for.

attention score
注意力分数
  How well two match.

KV cache
键值缓存
  What was computed already.
:::
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A book of two chapters, whose first is empty and there to be written."""
    for folder in ("chapters", "reference", "assets"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "references.bib").write_text(PAPERS)
    (tmp_path / "reference" / "glossary.md").write_text(GLOSSARY)
    (tmp_path / "assets" / "dot.png").write_bytes(PNG)
    save(tmp_path, "02-other", "# Other chapter\n\n" + OTHER)
    return tmp_path


def save(root: Path, name: str, *texts: str, metadata: dict | None = None) -> None:
    cells = [nbformat.v4.new_markdown_cell(text, id=f"m{i}") for i, text in enumerate(texts)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata or {})
    nbformat.write(notebook, root / "chapters" / f"{name}.ipynb")


def exported(root: Path, text: str) -> str:
    """The Markdown that a cell becomes."""
    save(root, "01-here", "# Here", text)
    notebook = nbformat.reads(colab.exports(root)["01-here.ipynb"], as_version=4)
    return notebook.cells[2].source


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{term}`query`", f"[query]({PAGES}reference/glossary.html#term-query)"),
        ("{term}`kv cache`", f"[kv cache]({PAGES}reference/glossary.html#term-KV-cache)"),
        (
            "{term}`Attention\n<attention score>`",
            f"[Attention]({PAGES}reference/glossary.html#term-attention-score)",
        ),
        ("{doc}`02-other`", f"[Other chapter]({COLAB}02-other.ipynb)"),
        ("{doc}`terms <../reference/glossary>`", f"[terms]({PAGES}reference/glossary.html)"),
        ("[terms](../reference/glossary.md#x)", f"[terms]({PAGES}reference/glossary.html#x)"),
        ("[next](02-other.ipynb)", f"[next]({COLAB}02-other.ipynb)"),
        ("[out](https://example.org/a)", "[out](https://example.org/a)"),
        ("see {cite}`many`", "see ([Lebrón et al., 2017](https://example.org/many))"),
        (
            "{cite}`many,solo`",
            "([Lebrón et al., 2017](https://example.org/many); Doe, 2001)",
        ),
        ("{cite:t}`solo` says", "Doe (2001) says"),
        ("{ref}`sec-masks`", f"[Masks]({COLAB}02-other.ipynb) in Other chapter"),
        ("{eq}`eq-other`", f"[(1)]({COLAB}02-other.ipynb) in Other chapter"),
        ("{math}`x^2`", "$x^2$"),
        ("`{term}` and ``{cite}`solo` ``", "`{term}` and ``{cite}`solo` ``"),
        ("costs $a_{term}$ `x`", "costs $a_{term}$ `x`"),
        ("% a note to ourselves\ntext", "\ntext".strip("\n")),
    ],
)
def test_inside_a_line(repository: Path, text: str, expected: str):
    assert exported(repository, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```{note}\nMind {cite}`solo`.\n```", "> **Note**\n>\n> Mind (Doe, 2001)."),
        (":::{tip}\na\n\nb\n:::", "> **Tip**\n>\n> a\n>\n> b"),
        ("```{note} on one line\n```", "> **Note**\n>\n> on one line"),
        ("```{warning}\nx\n```", "> **Warning**\n>\n> x"),
        ("````{admonition} Why?\n```{tip}\nx\n```\n````", "> **Why?**\n>\n> > **Tip**\n> >\n> > x"),
        (
            "```{admonition} Answer\n:class: tip dropdown\n\n$x$\n```",
            "<details><summary>Answer</summary>\n\n$x$\n\n</details>",
        ),
        ("```{math}\nx\n```", "$$\nx\n$$"),
        (
            "```{math}\na &= b \\\\\nc\n```",
            "$$\n\\begin{aligned}\na &= b \\\\\nc\n\\end{aligned}\n$$",
        ),
        (
            "```{math}\n:label: eq-x\nx\n```\nby {eq}`eq-x`",
            '<a id="eq-x" name="eq-x"></a>\n\n$$\nx\n\\tag{1}\n$$\nby [(1)](#eq-x)',
        ),
        ("```{code-block} python\nx\n```", "```python\nx\n```"),
        ("```python\n{term}`query`\n```", "```python\n{term}`query`\n```"),
        ("- one\n\n  ```{math}\n  x\n  ```\n- two", "- one\n\n  $$\n  x\n  $$\n- two"),
        ("(sec-a)=\n## A\n{ref}`sec-a`", '<a id="sec-a" name="sec-a"></a>\n## A\n[A](#sec-a)'),
        ("## A b\n[x](#a-b)", '<a id="a-b" name="a-b"></a>\n\n## A b\n[x](#a-b)'),
    ],
)
def test_blocks(repository: Path, text: str, expected: str):
    assert exported(repository, text) == expected


def test_exercise_and_its_help(repository: Path):
    statement = "```{exercise} Mask it\n:label: ex-a\n\n● ○ ○ · 5 minutes\n\nUse {math}`x`.\n```"
    text = f"{statement}\n\n```{{exercise-help}} attention causal_mask\n```\n\n{{numref}}`ex-a`"
    made = exported(repository, text)
    assert made.startswith('<a id="ex-a" name="ex-a"></a>\n\n### Exercise 1. Mask it\n\n● ○ ○ · 5')
    assert "Use $x$." in made
    assert '`attention.hint("causal_mask")`' in made
    assert '`attention.solution("causal_mask")`' in made
    assert made.endswith("[Exercise 1](#ex-a)")


def test_pictures_travel_with_the_notebook(repository: Path):
    data = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    assert exported(repository, "![dot](../assets/dot.png)") == f"![dot]({data})"
    figure = "```{figure} /assets/dot.png\n:alt: a dot\n:name: fig-dot\nOne *dot*.\n```"
    made = exported(repository, f"{figure}\n\n{{numref}}`fig-dot`")
    anchor = '<a id="fig-dot" name="fig-dot"></a>'
    caption = "**Figure 1.** One *dot*."
    assert made == f"![a dot]({data})\n\n{anchor}\n\n{caption}\n\n[Figure 1](#fig-dot)"


@pytest.mark.parametrize(
    "text",
    [
        "```{tableofcontents}\n```",
        "{kbd}`x`",
        "{cite}`nobody`",
        "{term}`nothing`",
        "{doc}`03-nowhere`",
        "{numref}`fig-none`",
        "![x](../assets/none.png)",
        "term\n: its definition",
    ],
)
def test_what_has_no_plain_form_is_refused(repository: Path, text: str):
    with pytest.raises(colab.ColabError, match="chapters/01-here"):
        exported(repository, text)


def code_notebook(metadata: dict, data: dict, widgets: dict) -> nbformat.NotebookNode:
    output = nbformat.v4.new_output("display_data", data=data)
    cell = nbformat.v4.new_code_cell("draw()", id="c1", metadata=metadata, outputs=[output])
    title = nbformat.v4.new_markdown_cell("# Here\n\n{numref}`fig-a`", id="t")
    return nbformat.v4.new_notebook(cells=[title, cell], metadata={"widgets": widgets})


def test_outputs_captions_and_first_frames(repository: Path):
    state = {"1": {"model_name": "HTMLModel", "state": {"value": "<b>frame</b>"}}}
    notebook = code_notebook(
        {"mystnb": {"figure": {"name": "fig-a", "caption": "All of {term}`it <query>`"}}},
        {colab.VIEW: {"model_id": "1"}, "text/plain": "about"},
        {colab.STATE: {"state": state, "version_major": 2, "version_minor": 0}},
    )
    nbformat.write(notebook, repository / "chapters" / "01-here.ipynb")
    text = colab.exports(repository)["01-here.ipynb"]
    made = nbformat.reads(text, as_version=4)
    install, title, code, caption, end = made.cells
    assert "widgets" not in made.metadata and code.metadata == {}
    assert code.outputs[0].data["text/plain"] == "about"
    assert "<b>frame</b>" in code.outputs[0].data["text/html"]
    assert colab.VIEW not in code.outputs[0].data
    assert "[Figure 1](#fig-a)" in title.source
    assert caption.source.startswith('<a id="fig-a" name="fig-a"></a>\n\n**Figure 1.** All of [it]')
    assert install.source == colab.install_cell(repository).source and not install.outputs
    assert f"[Here]({PAGES}chapters/01-here.html)" in end.source


def test_papers_are_listed_once(repository: Path):
    save(repository, "01-here", "# Here", "{cite}`many` {cite}`solo`", "{cite}`many`")
    notebook = nbformat.reads(colab.exports(repository)["01-here.ipynb"], as_version=4)
    papers = [line for line in notebook.cells[-1].source.split("\n") if line.startswith("- ")]
    assert len(papers) == 2 and "RNN team" in papers[1] and "Doe" in papers[0]


def test_a_stale_missing_or_extra_export_is_told(repository: Path):
    assert colab.write(repository) == ["02-other.ipynb"]
    assert colab.stale(repository) == [] and colab.write(repository) == []
    path = repository / "chapters" / "02-other.ipynb"
    path.write_text(path.read_text().replace("Masks", "Veils"))
    assert "is not what its chapter gives" in colab.stale(repository)[0]
    path.rename(path.with_name("03-other.ipynb"))
    assert len(colab.stale(repository)) == 2
    assert sorted(colab.write(repository)) == ["02-other.ipynb", "03-other.ipynb"]
    assert colab.stale(repository) == []


# The committed exports


def test_colab_is_what_the_chapters_give():
    assert EXPORTS, "colab/ is empty"
    assert colab.stale(ROOT) == []


def unresolved(source: str) -> list[str]:
    """Directives and roles that a Markdown cell still holds, outside code."""
    found = []
    parser = MarkdownIt("commonmark").use(dollarmath_plugin, double_inline=True)
    for token in parser.parse(source):
        if token.type == "fence" and token.info.lstrip().startswith("{"):
            found.append(token.info)
        if token.type == "html_block":
            found += re.findall(r"\{[\w:-]+\}`", token.content)
        for child in token.children or ():
            if child.type == "text":
                found += re.findall(r"\{[a-z][\w:-]*\}$|:::|^\([\w-]+\)=$", child.content)
    return found


@pytest.mark.parametrize(
    "source",
    ["```{note}\nx\n```", "a {term}`query`", "<p>{cite}`x`</p>", ":::{tip}\nx\n:::", "(sec)=\n# A"],
)
def test_what_is_left_over_is_seen(source: str):
    assert unresolved(source)


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.stem)
def test_nothing_of_the_book_is_left_over(path: Path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert [fault for cell in cells for fault in unresolved(cell.source)] == []
    names = set(re.findall(r'<a id="([^"]+)"', "\n".join(cell.source for cell in cells)))
    links = {m for cell in cells for m in re.findall(r"\]\(#([^)\s]+)\)", cell.source)}
    assert links <= names, f"links to nowhere: {links - names}"
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", "\n".join(cell.source for cell in cells))
    assert all(target.startswith(("data:", "https:")) for target in pictures)


def test_every_first_cell_is_the_same_and_names_no_torch():
    first = {nbformat.read(path, as_version=4).cells[0].source for path in EXPORTS}
    assert first == {colab.install_cell(ROOT).source}
    command = next(line for line in first.pop().splitlines() if "%pip" in line)
    assert "--no-deps" in command and "torch" not in command and "numpy" not in command


@pytest.mark.book
def test_the_button_of_each_chapter_opens_its_export():
    head = colab.colab_address(ROOT, "chapters/x").removesuffix("colab/x.ipynb")
    pages = sorted((ROOT / "_build/html/chapters").glob("*.html"))
    assert pages, "no chapter was built"
    for page in pages:
        links = set(re.findall(rf'href="{re.escape(head)}([^"]+)"', page.read_text("utf-8")))
        assert f"colab/{page.stem}.ipynb" in links, f"{page.name} has no Colab button"
        dead = [name for name in sorted(links) if not (ROOT / name).is_file()]
        assert not dead, f"{page.name} links to {dead}"


@pytest.mark.book
def test_links_to_terms_lead_somewhere():
    glossary = (ROOT / "_build/html/reference/glossary.html").read_text(encoding="utf-8")
    known = set(re.findall(r'id="(term-[^"]+)"', glossary))
    text = "".join(path.read_text(encoding="utf-8") for path in EXPORTS)
    wanted = set(re.findall(r"glossary\.html#(term-[\w-]+)", text))
    assert wanted and wanted <= known, wanted - known


# As on Colab: outside the repository, torch and numpy there, the package not


def fingerprint(*packages: str) -> str:
    """Names, sizes and times of all files of installed packages."""
    found = []
    for package in packages:
        folder = Path(sys.modules[package].__file__).parent
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                status = path.stat()
                found.append(f"{path} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Path:
    """Python of a fresh environment with the same libraries as here, and without the package."""
    folder = tmp_path_factory.mktemp("service")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", query], check=True, capture_output=True, text=True)
    # addsitedir would also read the editable install of the package; a plain path does not.
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site.stdout.strip(), "shared.pth").write_text("\n".join(sorted(shared)) + "\n")
    return python


def in_service(python: Path, folder: Path, *command: str) -> str:
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    variables = {key: value for key, value in os.environ.items() if key not in hidden}
    variables |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    variables["IPYTHONDIR"] = str(folder / "ipython")
    done = subprocess.run(
        [str(python), *command], cwd=folder, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


RUN = """\
import json, sys, nbformat
from nbclient import NotebookClient
from jupyter_client.manager import KernelManager
from jupyter_client.kernelspec import KernelSpec
notebook = nbformat.read(sys.argv[1], as_version=4)
kernel = KernelManager()
kernel._kernel_spec = KernelSpec(
    argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python"
)
client = NotebookClient(notebook, km=kernel, timeout=240)
client.execute()
first = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
print(json.dumps({"first": first}))
"""
WHERE = "import llm_anatomy, torch, numpy; print(llm_anatomy.__path__[0], torch.__version__)"


@pytest.mark.slow
@pytest.mark.network
def test_an_export_runs_outside_the_repository(service: Path, tmp_path: Path):
    import numpy  # noqa: F401
    import torch  # noqa: F401

    before = fingerprint("torch", "numpy"), version("torch"), version("numpy")
    path = EXPORTS[0]
    notebook = nbformat.read(path, as_version=4)
    # The address is the only thing that is not yet published: the same commands from a clone.
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--no-local", ROOT, clone], check=True)
    branch = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    commit = subprocess.run(branch, check=True, capture_output=True, text=True).stdout.strip()
    address = f"llm-anatomy @ git+{colab.repository(ROOT)}@{colab.BRANCH}"
    assert address in notebook.cells[0].source
    local = f"git+{clone.as_uri()}@{commit}"
    notebook.cells[0].source = notebook.cells[0].source.replace(address, local)
    away = tmp_path / "away"
    away.mkdir()
    nbformat.write(notebook, away / path.name)
    gone = "import importlib.util; print(importlib.util.find_spec('llm_anatomy'))"
    assert in_service(service, away, "-c", gone).strip() == "None"
    ran = json.loads(in_service(service, away, "-c", RUN, path.name).strip().splitlines()[-1])
    assert "error" not in ran["first"].lower()
    package, torch_version = in_service(service, away, "-c", WHERE).split()
    assert package.startswith(str(service.parent.parent)) and torch_version == version("torch")
    listed = in_service(service, away, "-m", "pip", "list", "--local", "--format=freeze")
    names = {line.partition("==")[0].partition(" @")[0].lower() for line in listed.splitlines()}
    assert not names & {"torch", "numpy"}
    assert (fingerprint("torch", "numpy"), version("torch"), version("numpy")) == before
