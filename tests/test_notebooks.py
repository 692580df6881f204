"""What every committed chapter must be, beyond running: see tools/chapter_rules.py."""

from collections import Counter
from pathlib import Path

import pytest

from tools import chapter_rules

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))


def test_there_are_chapters():
    assert CHAPTERS, "chapters/ holds no notebook, so nothing below would check anything"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_keeps_the_rules(path: Path):
    notebook, raw = chapter_rules.read(path)
    assert chapter_rules.faults(notebook, path.name, raw) == []


def test_few_outputs_are_ignored():
    share = chapter_rules.ignored_share(chapter_rules.read(path)[0] for path in CHAPTERS)
    assert share <= chapter_rules.MAX_IGNORED_SHARE


def test_each_exercise_of_the_package_is_set_once():
    found = Counter(
        label
        for path in CHAPTERS
        for label in chapter_rules.exercise_labels(chapter_rules.read(path)[0])
    )
    package = {
        chapter_rules.label(module, name): 1
        for module, chapter in chapter_rules.chapters_of_exercises().items()
        for name in chapter.by_name
    }
    assert dict(found) == package
