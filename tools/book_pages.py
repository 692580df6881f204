"""Sphinx extension: what the pages of this book need beyond the theme.

- The repository's address is read from pyproject.toml, the one place where it stands.
- Each chapter gets a button that opens its Colab export, colab/NAME.ipynb.
- Scripts and fonts are fetched into assets/offline, so that a page asks no other host.
- An interactive figure shows its first frame until its script has started, and without JavaScript.
- The search index finds Chinese words, and a reader program hears that they are Chinese.
- The icon script of the theme is cut down to the icons that occur on the pages.
- What the theme and docutils leave to be desired in roles and headers is put right.
"""

import html
import json
import os
import re
import sys
import tomllib
from pathlib import Path, PurePosixPath

from docutils import nodes
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ConfigError
from sphinx.search.en import SearchEnglish
from sphinx.writers.html5 import HTML5Translator

sys.path.insert(0, str(Path(__file__).parent))

import vendor_assets

BRANCH = "main"
CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")
VIEW = re.compile(
    r'<script type="application/vnd\.jupyter\.widget-view\+json">(.*?)</script>', re.DOTALL
)


def repository(root: Path) -> str:
    """Return the repository's address from pyproject.toml, without a slash at its end."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].rstrip("/")


def colab_address(root: Path, page: str) -> str:
    """Return where Colab opens the export of a chapter; `page` is like "chapters/01-attention"."""
    owner_and_name = "/".join(repository(root).split("/")[-2:])
    notebook = f"colab/{PurePosixPath(page).name}.ipynb"
    return f"https://colab.research.google.com/github/{owner_and_name}/blob/{BRANCH}/{notebook}"


def tested_with(root: Path) -> str:
    """Return a sentence on the versions that requirements.txt pins."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (root / "requirements.txt").read_text(), re.M))
    names = [f"{name} {pins[name]}" for name in ("torch", "transformers") if name in pins]
    return f"Every output was computed and tested with {' and '.join(names)}."


def configure(app: Sphinx, config: Config) -> None:
    """Fetch the scripts of the pages and fill in what is written elsewhere."""
    root = Path(app.srcdir)
    try:
        vendor_assets.ensure(root)
    except vendor_assets.VendorError as error:
        raise ConfigError(str(error)) from error
    options = dict(config.html_theme_options)
    options |= {
        "repository_url": repository(root),
        "repository_branch": BRANCH,
        "path_to_docs": "",
        "use_repository_button": True,
        "use_issues_button": True,
        "extra_footer": f"<p>{html.escape(tested_with(root))}</p>",
        "navbar_persistent": [],  # the sidebar holds the search already
    }
    config.html_theme_options = options
    config.html_favicon = "assets/icon.svg"  # without one, each browser asks for a file in vain
    config.html_context["default_mode"] = "auto"  # light or dark as the reader's system is
    if os.environ.get("BOOK_HIDE_SOLUTIONS", "0") not in ("", "0"):
        config.hide_solutions = True


def add_colab_button(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Put a Colab button first in the header of each page that is a notebook."""
    if page.startswith("chapters/") and app.env.doc2path(page).endswith(".ipynb"):
        button = {
            "type": "link",
            "url": colab_address(Path(app.srcdir), page),
            "tooltip": "Open this chapter in Colab and run it",
            "text": "Colab",
            "icon": "fas fa-rocket",
            "label": "colab",
        }
        context["header_buttons"].insert(0, button)


def leave_thebe_out(app: Sphinx, config: Config) -> None:
    """Keep the "run it here" of jupyter-book off the pages.

    It would run a kernel on another host, and its scripts come twice: a script error on each page.
    """
    for listeners in app.events.listeners.values():
        listeners[:] = [
            one for one in listeners if getattr(one.handler, "__module__", "") != "sphinx_thebe"
        ]
    files = app.registry.css_files
    files[:] = [file for file in files if file[0] != "sphinx-thebe.css"]


# Interactive figures: the first frame, as plain HTML


def first_frame(model_id: str, state: dict) -> str:
    """Return what a widget shows at first, as HTML that needs no script.

    Boxes show their children, a Stack its selected child, HTML and images themselves, and a
    control its label and value as text.
    """
    model = state.get(model_id, {})
    name, values = model.get("model_name", ""), model.get("state", {})
    children = [child.removeprefix("IPY_MODEL_") for child in values.get("children", [])]
    if name == "StackModel":
        selected = values.get("selected_index")
        children = children[selected : selected + 1] if selected is not None else []
    if children:
        classes = " ".join(["first-frame-box", *values.get("_dom_classes", [])])
        inner = "".join(first_frame(child, state) for child in children)
        return f'<div class="{html.escape(classes)}">{inner}</div>'
    if name in ("HTMLModel", "HTMLMathModel"):
        return f"<div>{values.get('value', '')}</div>"
    if name == "ImageModel":
        data = next((b["data"] for b in model.get("buffers", []) if b["path"] == ["value"]), None)
        kind = values.get("format", "png")
        alt = html.escape(values.get("alt") or values.get("description") or "first frame")
        return f'<img alt="{alt}" src="data:image/{kind};base64,{data}">' if data else ""
    label = html.escape(str(values.get("description") or ""))
    labels = values.get("_options_labels")
    if labels:
        value = labels[values.get("index") or 0]
    elif name == "LabelModel" or name.endswith(("SliderModel", "TextModel")):
        value = values.get("value", "")
    else:
        return ""
    return f'<p class="first-frame-control">{label} <b>{html.escape(str(value))}</b></p>'


def add_first_frames(app: Sphinx, doctree: nodes.document) -> None:
    """Put the first frame of each widget in front of the place where its script will draw it."""
    scripts = NbMetadataCollector.get_js_files(app.env, app.env.docname)
    if "ipywidgets_state" not in scripts:
        return
    state = json.loads(scripts["ipywidgets_state"][1]["body"])["state"]
    for node in list(doctree.findall(nodes.raw)):
        found = VIEW.search(node.astext())
        if found and (frame := first_frame(json.loads(found[1])["model_id"], state)):
            frame = f'<div class="first-frame">{frame}</div>'
            node.parent.insert(node.parent.index(node), nodes.raw("", frame, format="html"))


# Chinese words in English text


class EnglishWithChinese(SearchEnglish):
    """The English search index, with every Chinese word of two to six characters findable.

    Chinese is written without spaces, so a run of characters enters the index with all its parts
    of that length. The book holds Chinese only as names of terms, so this stays small.
    """

    def split(self, text: str) -> list[str]:
        words = super().split(CHINESE.sub(" ", text))
        for run in CHINESE.findall(text):
            spans = range(2, min(len(run), 6) + 1)
            parts = {run[i : i + n] for n in spans for i in range(len(run) - n + 1)}
            words += sorted(parts | {run})
        return words


def mark_chinese(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Give runs of Chinese characters in the text their language (`lang="zh"`)."""
    for text in list(doctree.findall(nodes.Text)):
        skip = (nodes.FixedTextElement, nodes.literal, nodes.raw, nodes.math, nodes.title)
        ancestors, node = [], text.parent
        while node is not None:
            ancestors.append(node)
            node = node.parent
        if not CHINESE.search(text) or any(isinstance(node, skip) for node in ancestors):
            continue
        if isinstance(text.parent, nodes.term) and CHINESE.fullmatch(text.strip()):
            text.parent["classes"].append("language-zh")
            continue
        parts, end = [], 0
        for found in CHINESE.finditer(text):
            parts.append(nodes.Text(text[end : found.start()]))
            parts.append(nodes.inline("", found[0], classes=["language-zh"]))
            end = found.end()
        parts.append(nodes.Text(text[end:]))
        text.parent.replace(text, [part for part in parts if part.astext()])


# Roles and headers


def visit_entry(translator: HTML5Translator, node: nodes.entry) -> None:
    """Write a cell of a table; an empty corner is no header, for it names nothing."""
    start = len(translator.body)
    HTML5Translator.visit_entry(translator, node)
    if not node.astext().strip() and translator.body[start].startswith("<th"):
        translator.body[start] = "<td" + translator.body[start].removeprefix("<th")
        translator.context[-1] = translator.context[-1].replace("</th>", "</td>")


def visit_citation(translator: HTML5Translator, node: nodes.citation) -> None:
    """Write an entry of the bibliography; docutils gives it a role that ARIA has withdrawn."""
    HTML5Translator.visit_citation(translator, node)
    translator.body[-1] = translator.body[-1].replace("doc-biblioentry", "listitem")


# Icons


ICON = re.compile(
    r'(?:"([a-z0-9-]+)"|\b([a-z0-9]+)):'  # name
    r'\[\d+,\d+,\[([^\]]*)\],"[0-9a-f]+",(?:"[^"]*"|\[[^\]]*\])\],?'  # size, other names, paths
)


def keep_icons(script: str, used: set[str]) -> str:
    """Return the theme's icon script without the icons that no page uses."""

    def decide(icon: re.Match) -> str:
        names = {icon[1] or icon[2], *re.findall(r'"([a-z0-9-]+)"', icon[3])}
        return icon[0] if names & used else ""

    return ICON.sub(decide, script)


def cut_icons(app: Sphinx, error: Exception | None) -> None:
    """Cut the icon script of the built book (1.5 MB) down to the icons that occur in it."""
    if error or app.builder.format != "html":
        return
    out = Path(app.outdir)
    scripts = [*out.glob("_static/scripts/fontawesome.js")]
    sources = [*out.rglob("*.html"), *out.glob("_static/**/*.js")]
    used = set()
    for path in sources:
        if path not in scripts and "offline" not in path.parts:
            used.update(re.findall(r"\bfa-([a-z0-9-]+)", path.read_text(encoding="utf-8")))
    for path in scripts:
        path.write_text(keep_icons(path.read_text(encoding="utf-8"), used), encoding="utf-8")


def setup(app: Sphinx) -> dict:
    """Connect everything above."""
    app.add_search_language(EnglishWithChinese)
    app.add_node(nodes.entry, override=True, html=(visit_entry, HTML5Translator.depart_entry))
    app.add_node(
        nodes.citation, override=True, html=(visit_citation, HTML5Translator.depart_citation)
    )
    app.connect("config-inited", configure, priority=100)
    app.connect("config-inited", leave_thebe_out, priority=100)
    app.connect("doctree-read", add_first_frames)
    app.connect("doctree-resolved", mark_chinese)
    app.connect("html-page-context", add_colab_button, priority=900)
    app.connect("build-finished", cut_icons)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
