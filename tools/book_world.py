"""Sphinx extension: the page of the tiny world, made from the package when the book is built.

    ```{world-entropy}
    ```

is a table of the exact entropies of the stories, and

    ```{world-examples} labels
    ```

shows every kind of data of one module of `llm_anatomy.tiny_world`: what its docstring says, and its
first examples for seed 0. So the page says what the package does, and nothing else.
"""

import dataclasses
import importlib
import inspect
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

SOURCE = Path(__file__).resolve().parents[1] / "src"
SHOWN = 3
FOLDER = "src/llm_anatomy/tiny_world"


def load(name: str) -> ModuleType:
    """Import a module of this repository's tiny world, whatever else is installed."""
    if str(SOURCE) not in sys.path:
        sys.path.insert(0, str(SOURCE))
    return importlib.import_module(f"llm_anatomy.tiny_world.{name}")


def generators(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Yield the public functions of a module that draw examples: those with a seed."""
    for name, function in vars(module).items():
        if inspect.isfunction(function) and function.__module__ == module.__name__:
            seed = inspect.signature(function).parameters.get("seed")
            if not name.startswith("_") and seed is not None and seed.default == 0:
                yield name, function


def line(example: object) -> str:
    """Write one example: its texts as text, and what is known about it behind them."""
    if isinstance(example, tuple):
        return " ".join(example)
    parts, facts = [], []
    for field in dataclasses.fields(example):
        value = getattr(example, field.name)
        if isinstance(value, tuple):
            parts.append(" ".join(value))
        else:
            facts.append(f"{field.name} {value}")
    return "\n    ".join([" | ".join(parts), *([", ".join(facts)] if facts else [])])


def section(name: str, function: object) -> str:
    """Return the Markdown of one kind of data."""
    about = inspect.getdoc(function).partition("\n\nRaises:")[0]
    examples = "\n".join(line(example) for example in function(SHOWN, seed=0))
    title = name.replace("_", " ").capitalize()
    return f"### {title}\n\n{about}\n\n```text\n{examples}\n```\n"


def entropies() -> str:
    """Return a table of what the best possible model loses on the stories."""
    stories = load("stories").STORIES
    rows = {
        "the next word, from the words before it": stories.entropy(),
        "one hidden word, from all the others": stories.cross_entropy(),
    }
    lines = ["| predicted | nats a token | perplexity |", "|:--|--:|--:|"]
    for name, found in rows.items():
        value = found.per_token
        lines.append(f"| {name} | {value:.4f} | {math.exp(value):.2f} |")
    return "\n".join(lines)


class WorldDirective(SphinxDirective):
    """What both directives share: they depend on the package."""

    def markdown(self, text: str) -> list[nodes.Node]:
        """Parse Markdown that may hold headings."""
        for path in sorted((SOURCE.parent / FOLDER).glob("*.py")):
            self.env.note_dependency(str(path))
        holder = nodes.section()
        holder.document = self.state.document
        lines = StringList(text.splitlines(), source=self.env.doc2path(self.env.docname))
        self.state.nested_parse(lines, self.content_offset, holder, match_titles=True)
        return holder.children


class WorldExamples(WorldDirective):
    """Every kind of data of one module."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        try:
            found = list(generators(load(self.arguments[0])))
        except ModuleNotFoundError as error:
            raise self.error(f"there is no such module: {error}") from error
        if not found:
            raise self.error(f"{self.arguments[0]} draws no examples")
        return self.markdown("\n".join(section(*one) for one in found))


class WorldEntropy(WorldDirective):
    """The exact entropies."""

    def run(self) -> list[nodes.Node]:
        return self.markdown(entropies())


def setup(app: Sphinx) -> dict:
    """Register the directives."""
    app.add_directive("world-examples", WorldExamples)
    app.add_directive("world-entropy", WorldEntropy)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
