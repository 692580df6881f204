"""The rules see what they are there to see; the chapters themselves are in test_notebooks.py."""

import nbformat
import pytest

from tools import chapter_rules

STATEMENT = "```{exercise} Mask\n:label: ex-attention-causal-mask\n\n● ○ ○ · 5 minutes\n```"
HELP = "```{exercise-help} attention causal_mask\n```"


def code(source: str, *, count: int = 1, **metadata) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(source, execution_count=count, metadata=metadata)


def markdown(source: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_markdown_cell(source)


def notebook(*cells: nbformat.NotebookNode) -> nbformat.NotebookNode:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return nbformat.v4.new_notebook(cells=list(cells), metadata=kernel)


def test_exercise_cells_are_statement_stub_and_help():
    exercise = [markdown(STATEMENT), code("def f(): ..."), markdown(HELP)]
    chapter = notebook(markdown("# Title"), code("1"), *exercise, code("2"), markdown("end"))
    assert chapter_rules.exercise_cells(chapter) == 3


def test_help_may_stand_over_the_next_statement():
    first = [markdown(STATEMENT), code("def f(): ...")]
    second = [markdown(HELP + "\n\n" + STATEMENT), code("def g(): ..."), markdown(HELP)]
    assert chapter_rules.exercise_cells(notebook(*first, *second)) == 5


@pytest.mark.parametrize(("others", "too_long"), [(60, False), (61, True)])
def test_only_other_cells_are_limited(others: int, too_long: bool):
    exercises = [
        cell
        for _ in range(10)
        for cell in (markdown(STATEMENT), code("def f(): ..."), markdown(HELP))
    ]
    cells = [markdown("# Title"), *(markdown("text") for _ in range(others - 1)), *exercises]
    found = [f for f in chapter_rules.form(notebook(*cells), "x.ipynb", None) if "cells" in f]
    assert bool(found) == too_long


@pytest.mark.parametrize(
    ("rule", "cell", "fault"),
    [
        (chapter_rules.run_state, code("1", count=None), "never executed"),
        (chapter_rules.run_state, code("1", count=7), "executed as number 7"),
        (chapter_rules.run_state, code(" "), "is empty"),
        (chapter_rules.outputs, code("print(1)"), "was stripped"),
        (chapter_rules.outputs, code("for i in (1, 2):\n    print(i)"), "was stripped"),
        (chapter_rules.outputs, code('attention.check("causal_mask", f)'), "was stripped"),
        (chapter_rules.outputs, code("figures.show(figure, alt='x')"), "was stripped"),
        (chapter_rules.tags, code("1", tags=["nbval-skip"]), "skipped by nbval"),
        (chapter_rules.tags, code("1", tags=["nbval-ignore-output"]), "gives no `reason`"),
        (chapter_rules.tags, code("# NBVAL_IGNORE_OUTPUT\n1"), "use a tag"),
        (chapter_rules.pictures, markdown("![](a.png)"), "no alt text"),
        (chapter_rules.pictures, markdown("```{figure} a.png\ncaption\n```\n"), "no :alt:"),
        (chapter_rules.private, markdown("see /home/me/notes"), "a path of one machine"),
        (chapter_rules.exercises, markdown("```{exercise} A\n:label: ex-no\n```"), "not in the"),
        (
            chapter_rules.quiz,
            markdown('Why?\n<details class="quiz"><summary>a</summary>\n\nYes\n\n</details>'),
            "has 1 options",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_rule_sees_its_fault(rule, cell, fault):
    assert any(fault in text for text in rule(notebook(cell)))


def test_nothing_is_wrong_with_a_cell_in_order():
    cell = code("print(1)")
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="1\n")]
    chapter = notebook(markdown("# Title"), cell)
    rules = (chapter_rules.run_state, chapter_rules.outputs, chapter_rules.tags)
    assert [fault for rule in rules for fault in rule(chapter)] == []
