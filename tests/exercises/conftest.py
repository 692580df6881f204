"""Every exercise of every chapter module, and the recorded answers that go with it.

A chapter `llm_anatomy.exercises.NAME` has its recorded answers beside this file, in
`answers_NAME.py`:

    ALTERNATIVES = {"causal_mask": [right, but written differently, ...]}
    WRONG = {"causal_mask": [(a typical wrong answer, "words of the message that names it"), ...]}
"""

import functools
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import llm_anatomy.exercises
from llm_anatomy.exercises._engine import PRELUDE, Chapter, Exercise, Result

HERE = Path(__file__).parent


def chapter_names() -> list[str]:
    return [
        module.name
        for module in pkgutil.iter_modules(llm_anatomy.exercises.__path__)
        if not module.name.startswith("_")
    ]


def load_chapter(name: str) -> Chapter:
    module = importlib.import_module(f"llm_anatomy.exercises.{name}")
    (chapter,) = (item for item in vars(module).values() if isinstance(item, Chapter))
    return chapter


def load_answers(name: str) -> ModuleType:
    path = HERE / f"answers_{name}.py"
    spec = importlib.util.spec_from_file_location(f"answers_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_code(code: str, name: str):
    """What a notebook's cell of this code leaves behind under a name."""
    scope: dict = {"__name__": "__main__"}
    exec(compile(PRELUDE + code, f"<{name}>", "exec"), scope)
    return scope[name]


@functools.cache
def graded(chapter: Chapter, name: str) -> tuple[Result, ...]:
    """What the recorded wrong answers to an exercise get."""
    return tuple(chapter.grade(name, answer) for answer, _ in ANSWERS[chapter.name].WRONG[name])


CHAPTERS = {name: load_chapter(name) for name in chapter_names()}
ANSWERS = {name: load_answers(name) for name in CHAPTERS}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Feed `chapter`, `exercise`, `alternative` and `wrong` with all that there is."""
    wanted = set(metafunc.fixturenames)
    pairs = [(c, e) for c in CHAPTERS.values() for e in c.by_name.values()]
    if "alternative" in wanted:
        rows = [
            pytest.param(c, e, answer, id=f"{c.name}-{e.name}-{i}")
            for c, e in pairs
            for i, answer in enumerate(ANSWERS[c.name].ALTERNATIVES.get(e.name, []))
        ]
        metafunc.parametrize(("chapter", "exercise", "alternative"), rows)
    elif "wrong" in wanted:
        rows = [
            pytest.param(c, e, pair, id=f"{c.name}-{e.name}-{i}")
            for c, e in pairs
            for i, pair in enumerate(ANSWERS[c.name].WRONG.get(e.name, []))
        ]
        metafunc.parametrize(("chapter", "exercise", "wrong"), rows)
    elif "exercise" in wanted:
        rows = [pytest.param(c, e, id=f"{c.name}-{e.name}") for c, e in pairs]
        metafunc.parametrize(("chapter", "exercise"), rows)
    elif "chapter" in wanted:
        metafunc.parametrize("chapter", CHAPTERS.values(), ids=CHAPTERS.keys())


@pytest.fixture
def answers(chapter: Chapter) -> ModuleType:
    return ANSWERS[chapter.name]


@pytest.fixture
def messages(chapter: Chapter, exercise: Exercise) -> list[str]:
    """What the recorded wrong answers are told."""
    return [result.message for result in graded(chapter, exercise.name)]


@pytest.fixture
def stub(exercise: Exercise):
    return run_code(exercise.stub, exercise.name)


@pytest.fixture
def solved(exercise: Exercise):
    return run_code(exercise.solution, exercise.name)
