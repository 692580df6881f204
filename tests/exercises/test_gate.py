"""The gate that every exercise of every chapter passes through.

The untouched stub is not done; the solution and a different right answer pass; recorded wrong
answers fail with the message that names the mistake; garbage never passes and never raises.
"""

import contextlib
import inspect
import io
import math

import pytest
import torch
from torch import Tensor

from llm_anatomy.exercises import _engine


def flat(text: str) -> str:
    return " ".join(text.split())


# --- What is recorded --------------------------------------------------------------------------


def test_the_gate_sees_a_chapter(chapter):
    assert len(chapter.by_name) >= 10


def test_answers_are_recorded_for_each_exercise_and_no_other(chapter, answers):
    assert set(answers.ALTERNATIVES) == set(chapter.by_name)
    assert set(answers.WRONG) == set(chapter.by_name)


def test_enough_answers_are_recorded(chapter, exercise, answers):
    fragments = [fragment for _, fragment in answers.WRONG[exercise.name]]
    assert len(answers.ALTERNATIVES[exercise.name]) >= 1
    assert len(fragments) >= 4
    assert len(set(fragments)) == len(fragments), "each mistake has words of its own"


def test_the_parts_exist(chapter, exercise):
    assert exercise.level in (1, 2, 3)
    assert 1 <= exercise.minutes <= 30
    assert len(exercise.hints) == 2
    assert len(set(exercise.hints)) == 2
    assert exercise.title
    for part in (*exercise.hints, exercise.task, exercise.why, exercise.point):
        assert len(part.split()) >= 8
    assert "```" not in exercise.task, "the statement stands inside a fence"


def test_all_three_levels_occur(chapter):
    assert {e.level for e in chapter.by_name.values()} == {1, 2, 3}


# --- The three ways ----------------------------------------------------------------------------


def test_the_untouched_stub_is_not_done(chapter, exercise, stub):
    result = chapter.grade(exercise.name, stub)
    assert result.status == "not done", result.message
    assert result.message.startswith(f"{exercise.name}: not done yet.")


def test_the_stub_s_cell_runs_and_says_that_it_is_not_done(chapter, exercise):
    out = io.StringIO()
    scope = {"__name__": "__main__", chapter.name: chapter}
    with contextlib.redirect_stdout(out):
        exec(_engine.PRELUDE + exercise.cell(chapter.name), scope)
    assert out.getvalue().startswith(f"{exercise.name}: not done yet.")


def test_the_solution_passes(chapter, exercise, solved):
    result = chapter.grade(exercise.name, solved)
    assert result.status == "passed", result.message
    assert flat(exercise.point) in flat(result.message)


def test_a_different_right_answer_passes(chapter, exercise, alternative):
    result = chapter.grade(exercise.name, alternative)
    assert result.status == "passed", result.message


def test_a_typical_wrong_answer_fails_and_is_named(chapter, exercise, wrong):
    answer, fragment = wrong
    result = chapter.grade(exercise.name, answer)
    assert result.status == "failed", result.message
    assert not result.fault
    assert result.cause is not None, result.message
    assert flat(fragment) in flat(result.cause), result.message
    assert flat(fragment) in flat(result.message)
    assert f'{chapter.name}.hint("{exercise.name}", ' in result.message


def test_judging_is_the_same_every_time(chapter, exercise, answers, messages):
    again = [chapter.grade(exercise.name, a).message for a, _ in answers.WRONG[exercise.name]]
    assert again == messages


# --- Checks that check, and messages that keep the answer --------------------------------------


def test_every_check_compares(chapter, exercise, solved):
    assert chapter.grade(exercise.name, solved).comparisons >= 1


def code_lines(exercise) -> list[str]:
    """The lines that a solution adds to its stub, long enough to be recognised."""
    given = {flat(line) for line in exercise.stub.splitlines()}
    lines = (flat(line.partition("  #")[0]) for line in exercise.solution.splitlines())
    return [line for line in lines if line not in given and len(line) >= 20]


def test_hints_and_messages_keep_the_solution_to_themselves(chapter, exercise, messages):
    texts = [*exercise.hints, exercise.point, *messages]
    for line in code_lines(exercise):
        for text in texts:
            assert line not in flat(text)


def test_a_function_s_solution_keeps_the_signature_of_its_stub(chapter, exercise, stub, solved):
    if inspect.isfunction(stub):
        assert str(inspect.signature(stub)) == str(inspect.signature(solved))


# --- Garbage -----------------------------------------------------------------------------------


def spoiled(value, how):
    """A right result, made wrong."""
    if isinstance(value, tuple | list):
        return type(value)(spoiled(part, how) for part in value)
    return how(value)


def nan(value):
    if isinstance(value, Tensor):
        return torch.full(value.shape, math.nan)
    return math.nan


def another_type(value):
    if isinstance(value, Tensor):
        return value.double().to(torch.complex64) if value.is_floating_point() else value * 1.5
    return str(value) + "!"


def another_shape(value):
    return value[None, ..., None] if isinstance(value, Tensor) else [value]


def meta(value):
    return value.to("meta") if isinstance(value, Tensor) else torch.tensor(1.0, device="meta")


def text(value):
    return "12 o'clock"


def sparse(value):
    return value.to_sparse() if isinstance(value, Tensor) else torch.ones(2).to_sparse()


def endless(*args, **kwargs):
    while True:
        pass


def endless_and_stubborn(*args, **kwargs):
    while True:
        with contextlib.suppress(Exception):
            args = args[:]


def raising(*args, **kwargs):
    raise KeyError("no such thing")


def leaving(*args, **kwargs):
    raise SystemExit(3)


def not_written_in_torch(*args, **kwargs):
    torch.ones(2).to_sparse().view(2)


def deep(*args, **kwargs):
    return deep(*args, **kwargs)


class SomeClass:
    """Not an answer."""


class Awkward:
    """Fails at whatever is done with it."""

    def __getattr__(self, name):
        raise RuntimeError("hands off")

    def __repr__(self):
        raise RuntimeError("hands off")

    def __eq__(self, other):
        raise RuntimeError("hands off")

    __hash__ = None


GARBAGE = {
    "nan": math.nan,
    "infinity": math.inf,
    "a negative number": -123456789,
    "a large integer": 10**400,
    "true": True,
    "text": "forty-two",
    "bytes": b"42",
    "empty list": [],
    "nested list": [[1, [2]], "x"],
    "dictionary": {"a": 1},
    "set": {1, 2},
    "complex number": 1j,
    "empty tensor": torch.empty(0),
    "nan tensor": torch.full((2, 3), math.nan),
    "meta tensor": torch.empty(2, 3, device="meta"),
    "sparse tensor": torch.eye(3).to_sparse(),
    "a class": SomeClass,
    "the class int": int,
    "an object": SomeClass(),
    "an awkward object": Awkward(),
    "a module of Python": math,
    "a generator": (i for i in range(3)),
    "no argument": lambda: 1,
    "one argument too many": lambda a, b, c, d, e, f, g, h, i: a,
    "only by name": lambda *, x: x,
    "raises": raising,
    "leaves": leaving,
    "torch refuses": not_written_in_torch,
    "endless": endless,
    "endless and stubborn": endless_and_stubborn,
    "too deep": deep,
    "returns a function": lambda *a: raising,
    "returns text": lambda *a: "x",
    "returns a class": lambda *a: SomeClass,
    "returns an awkward object": lambda *a: Awkward(),
    "returns the input": lambda *a: a[0] if a else 0,
    "returns all inputs": lambda *a: a,
    "print": print,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_never_passes_and_never_raises(chapter, exercise, name, monkeypatch, capsys):
    monkeypatch.setattr(_engine, "CPU_SECONDS", 0.05)
    result = chapter.grade(exercise.name, GARBAGE[name])
    assert result.status != "passed"
    assert not result.fault, result.message
    assert "Traceback" not in result.message
    assert " at 0x" not in result.message


@pytest.mark.parametrize("nothing", [None, ..., NotImplemented, ""], ids=repr)
def test_nothing_is_not_done(chapter, exercise, nothing):
    result = chapter.grade(exercise.name, nothing)
    if nothing == "":
        assert result.status in ("not done", "failed")
    else:
        assert result.status == "not done"


@pytest.mark.parametrize("how", [nan, another_type, another_shape, meta, text, sparse])
def test_a_spoiled_solution_fails(chapter, exercise, solved, how):
    if callable(solved):

        def answer(*args, **kwargs):
            return spoiled(solved(*args, **kwargs), how)

    else:
        answer = spoiled(solved, how)
    result = chapter.grade(exercise.name, answer)
    assert result.status == "failed", result.message
    assert not result.fault, result.message


def test_a_solution_that_changes_its_inputs_fails(chapter, exercise, solved):
    changed = 0

    def answer(*args, **kwargs):
        nonlocal changed
        result = spoiled(solved(*args, **kwargs), lambda t: t.clone() if torch.is_tensor(t) else t)
        for argument in args:
            if isinstance(argument, Tensor) and argument.numel():
                changed += 1
                argument.copy_(~argument if argument.dtype == torch.bool else argument + 1)
        return result

    result = chapter.grade(exercise.name, answer)
    if not callable(solved):
        assert "is expected, and this is a function" in flat(result.message)
    elif changed:
        assert "in place" in flat(result.message)
    assert result.status == ("failed" if changed or not callable(solved) else "passed")


def test_a_solution_that_wavers_fails(chapter, exercise, solved):
    calls = 0

    def answer(*args, **kwargs):
        nonlocal calls
        calls += 1
        result = solved(*args, **kwargs)
        return result if calls % 2 else spoiled(result, lambda t: t * 0 if t is not None else t)

    assert chapter.grade(exercise.name, answer).status == "failed"


# --- What a learner types ----------------------------------------------------------------------


def test_hint_and_solution_print_the_text(chapter, exercise, capsys):
    for level in (1, 2):
        chapter.hint(exercise.name, level)
        assert flat(exercise.hints[level - 1]) in flat(capsys.readouterr().out)
    chapter.solution(exercise.name)
    out = capsys.readouterr().out
    assert exercise.solution in out
    assert flat(exercise.why) in flat(out)


def test_every_exercise_is_listed(chapter, capsys):
    chapter.exercises()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(chapter.by_name)
    for line, exercise in zip(lines, chapter.by_name.values(), strict=True):
        assert line.startswith(exercise.dots)
        assert f"{exercise.minutes} min" in line
        assert exercise.title in line


def test_printed_lines_are_not_wider_than_a_page(chapter, exercise, messages, capsys):
    assert all(len(line) <= 100 for message in messages for line in message.splitlines())
    chapter.hint(exercise.name, 1)
    chapter.hint(exercise.name, 2)
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines())
    assert all(len(line) <= 100 for line in exercise.cell(chapter.name).splitlines())
    assert all(len(line) <= 100 for line in exercise.solution.splitlines())
