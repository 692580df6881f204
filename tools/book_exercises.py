"""Sphinx extension: hints and worked solutions of an exercise, folded away under it.

    ```{exercise-help} attention causal_mask
    ```

The text comes from `llm_anatomy.exercises.attention`, where the checker and its tests live too, so
the page cannot say anything else than `attention.solution("causal_mask")` does. It is plain
`<details>`, which needs no JavaScript. With `hide_solutions` (the class edition) the solution never
enters the page, and neither does it enter `_sources`, where only the directive stands.
"""

import html
import importlib
import sys
from pathlib import Path
from types import ModuleType

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

SOURCE = Path(__file__).resolve().parents[1] / "src"


def load(chapter: str) -> ModuleType:
    """Import an exercise module from this repository's src/, whatever else is installed."""
    if str(SOURCE) not in sys.path:
        sys.path.insert(0, str(SOURCE))
    return importlib.import_module(f"llm_anatomy.exercises.{chapter}")


class ExerciseHelp(SphinxDirective):
    """Two hints and the solution of one exercise, each closed until it is asked for."""

    required_arguments = 2
    has_content = False

    def run(self) -> list[nodes.Node]:
        chapter, name = self.arguments
        try:
            module = load(chapter)
        except ModuleNotFoundError as error:
            raise self.error(f"there is no exercise module {chapter!r}: {error}") from error
        engine = importlib.import_module("llm_anatomy.exercises._engine")
        book = next(item for item in vars(module).values() if isinstance(item, engine.Chapter))
        exercise = book.by_name.get(name)
        if exercise is None:
            known = ", ".join(book.by_name)
            raise self.error(f"{chapter} has no exercise {name!r}; it has: {known}")
        self.env.note_dependency(module.__file__)
        self.env.note_dependency(engine.__file__)

        box = nodes.container(classes=["exercise-help"])
        for number, hint in enumerate(exercise.hints, 1):
            box += self._fold("hint", f"Hint {number}", exercise.title, self._markdown(hint))
        if self.env.config.hide_solutions:
            return [box]
        code = nodes.literal_block(exercise.solution, exercise.solution, language="python")
        solution = [code, *self._markdown(exercise.why)]
        box += self._fold("solution", "Solution", exercise.title, solution)
        return [box]

    def _fold(
        self, kind: str, label: str, title: str, content: list[nodes.Node]
    ) -> list[nodes.Node]:
        """Wrap nodes in a closed `<details>` whose name says which exercise it belongs to."""
        name = f'{label}<span class="visually-hidden"> for {html.escape(title)}</span>'
        head = f'<details class="{kind}"><summary>{name}</summary>'
        return [
            nodes.raw("", head, format="html"),
            *content,
            nodes.raw("", "</details>", format="html"),
        ]

    def _markdown(self, text: str) -> list[nodes.Node]:
        """Parse the Markdown of a hint or an explanation."""
        holder = nodes.Element()
        lines = StringList(text.splitlines(), source=self.env.doc2path(self.env.docname))
        self.state.nested_parse(lines, self.content_offset, holder)
        return holder.children


def setup(app: Sphinx) -> dict:
    """Register the directive; `hide_solutions` is an option of sphinx-exercise already."""
    app.add_directive("exercise-help", ExerciseHelp)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
