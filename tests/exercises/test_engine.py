"""The engine by itself: what it says, and that it leaves nothing behind."""

import sys

import pytest
import torch

from llm_anatomy.exercises import _engine
from llm_anatomy.exercises._engine import (
    Chapter,
    Exercise,
    Mistake,
    agree,
    call,
    case,
    mixed,
    normal,
    one_of,
    require,
    same_function,
    same_value,
    unrepaired,
)


def exercise(check, name="double", **changes) -> Exercise:
    parts = {
        "title": "Twice",
        "level": 1,
        "minutes": 2,
        "task": "Double it.",
        "stub": f"def {name}(x):\n    raise NotImplementedError",
        "hints": ("What is x plus x?", "Multiply by two."),
        "solution": f"def {name}(x):\n    return 2 * x",
        "why": "Twice is two times.",
        "point": "Doubling is linear.",
        "check": check,
    }
    return Exercise(name=name, **(parts | changes))


def doubled(x):
    return 2 * x.double()


DOUBLE = same_function(
    doubled,
    [case("x of shape (2, 3)", normal(2, 3)), case("x of shape (4,)", normal(4, seed=1))],
    [
        Mistake("It is the square.", lambda x: x**2),
        Mistake("It is unchanged.", lambda x: x, hint=2),
        Mistake("It is upside down.", when=lambda got, want: bool((got * want <= 0).all())),
    ],
)
NUMBER = same_value(64.0, [Mistake("The root was taken.", 8.0)])
LETTER = one_of("b", {"a": "A is too small.", "c": "C is too large."})


@pytest.fixture
def demo() -> Chapter:
    return Chapter(
        "package.demo",
        [exercise(DOUBLE), exercise(NUMBER, "number"), exercise(LETTER, "letter")],
    )


# --- What it says ------------------------------------------------------------------------------


def test_a_right_answer_is_told_the_point(demo, capsys):
    assert demo.check("double", lambda x: x + x) is None
    assert capsys.readouterr().out == (
        'double: right.\n  Doubling is linear.\n  Compare with demo.solution("double").\n'
    )


def test_an_undone_stub_is_one_line(demo, capsys):
    def double(x):
        raise NotImplementedError

    demo.check("double", double)
    assert capsys.readouterr().out == 'double: not done yet. Stuck? demo.hint("double", 1)\n'


def test_a_mistake_is_located_and_named(demo, capsys):
    demo.check("double", lambda x: x)
    got, want = f"{normal(2, 3)[0, 0]:.4g}", f"{2 * normal(2, 3)[0, 0]:.4g}"
    assert capsys.readouterr().out == (
        "double: not right yet.\n"
        f"  Found: For x of shape (2, 3): at [0, 0] got {got}, expected {want} (6 of 6 entries\n"
        "    differ).\n"
        "  Likely cause: It is unchanged.\n"
        '  Help: demo.hint("double", 2)\n'
    )


def test_a_mistake_has_to_fit_every_case(demo):
    only_once = demo.grade("double", lambda x: x**2 if x.ndim == 2 else x**3)
    assert only_once.status == "failed"
    assert only_once.cause is None
    assert "cause" not in only_once.message


def test_a_test_of_got_and_expected_names_a_mistake_too(demo):
    assert demo.grade("double", lambda x: -x.sign() * x**4).cause == "It is upside down."


def test_the_first_entry_that_differs_is_shown_not_the_first_entry(demo):
    def last_wrong(x):
        y = 2 * x
        y.view(-1)[-1] += 1
        return y

    assert "at [1, 2] got" in demo.grade("double", last_wrong).message
    assert "(1 of 6 entries differ)" in " ".join(demo.grade("double", last_wrong).message.split())


@pytest.mark.parametrize(
    ("spoil", "clue"),
    [
        (lambda y: y * 3, "3 times what is expected"),
        (lambda y: y + 5, "5 more than expected"),
        (lambda y: y * 0, "Every entry is zero"),
        (lambda y: y / 0, "infinite"),
        (lambda y: y * torch.nan, "nan"),
        (lambda y: y.flip(-1), "right numbers in the wrong places"),
        (lambda y: y[None], "Only the axes of size 1 differ"),
        (lambda y: y.flatten(), "It has 1 axis where 2 are expected"),
        (lambda y: y[:, :2], None),
        (lambda y: y.half().long(), None),
    ],
)
def test_a_clue_is_read_off_the_numbers(spoil, clue):
    check = same_function(doubled, [case("x", normal(2, 3))])
    result = Chapter("demo", [exercise(check)]).grade("double", lambda x: spoil(2 * x))
    assert result.status == "failed"
    assert (result.cause is None) if clue is None else clue in result.cause


def test_a_transpose_and_swapped_axes_are_seen():
    check = same_function(lambda x: x, [case("x", normal(3, 3))])
    assert "transpose" in Chapter("demo", [exercise(check)]).grade("double", lambda x: x.mT).cause
    check = same_function(lambda x: x, [case("x", normal(3, 4))])
    assert "swapped" in Chapter("demo", [exercise(check)]).grade("double", lambda x: x.mT).cause


def test_swapped_truth_values_are_seen():
    check = same_function(lambda x: x > 0, [case("x", normal(3, 4))])
    cause = Chapter("demo", [exercise(check)]).grade("double", lambda x: x <= 0).cause
    assert "True and False are swapped" in cause


def test_both_shapes_are_shown(demo):
    message = demo.grade("double", lambda x: x.sum(0)).message
    assert "The shape is (3,), expected (2, 3)" in message


def test_an_error_names_its_line_and_shows_no_traceback(demo):
    def double(x):
        y = x + x
        return y @ y

    message = demo.grade("double", double).message
    line = double.__code__.co_firstlineno + 2
    assert f"It raised RuntimeError in line {line}, `return y @ y`" in message
    assert "Traceback" not in message
    assert ".py" not in message


def test_an_error_in_a_library_names_the_line_that_called_it(demo):
    def double(x):
        return torch.nn.functional.layer_norm(x, (99,))

    assert "`return torch.nn.functional.layer_norm(x, (99,))`" in " ".join(
        demo.grade("double", double).message.split()
    )


def test_what_torch_does_not_implement_is_wrong_and_not_undone(demo):
    def double(x):
        return torch.empty(2, device="meta").to("cpu")  # raises NotImplementedError

    assert demo.grade("double", double).status == "failed"


def test_no_address_is_printed(demo):
    def double(x):
        raise ValueError(f"bad {object()!r}")

    message = demo.grade("double", double).message
    assert "0x…" in message


def test_returning_nothing_is_not_done(demo):
    result = demo.grade("double", lambda x: None)
    assert result.status == "not done"
    assert "a `return` is missing" in " ".join(result.message.split())


def test_returning_nothing_now_and_then_is_wrong(demo):
    result = demo.grade("double", lambda x: 2 * x if x.ndim == 2 else None)
    assert result.status == "failed"
    assert "A branch without a `return`" in result.message


def test_the_wrong_number_of_arguments_is_explained(demo):
    message = " ".join(demo.grade("double", lambda x, y: x).message.split())
    assert "It takes (x, y); the check calls it with 1 argument" in message


def test_a_class_or_a_value_for_a_function(demo):
    assert "the class int" in demo.grade("double", int).message
    message = " ".join(demo.grade("double", torch.ones(2)).message.split())
    assert "a tensor of shape (2,)" in message
    assert "without brackets" in message


def test_a_predicted_number_is_not_given_away(demo):
    result = demo.grade("number", 8)
    assert result.cause == "The root was taken."
    assert "64" not in result.message
    assert demo.grade("number", torch.tensor(64)).status == "passed"
    assert demo.grade("number", 64.01).status == "passed"
    assert demo.grade("number", 65).status == "failed"
    assert "more digits" in demo.grade("number", 64.4).cause


def test_options(demo):
    assert demo.grade("letter", " B) ").status == "passed"
    assert demo.grade("letter", "a").cause == "A is too small."
    assert '"a", "b", "c"' in demo.grade("letter", "z").message
    assert demo.grade("letter", ...).status == "not done"


def test_an_unknown_name_is_answered_with_the_nearest(demo, capsys):
    demo.check("duoble", None)
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith('Did you mean "double"? There are: double, number, letter.')
    demo.hint("nothing like it")
    assert "There are: double" in capsys.readouterr().out
    demo.solution(3)
    assert "name comes first" in capsys.readouterr().out


def test_name_and_answer_the_wrong_way_round(demo, capsys):
    demo.check(lambda x: x, "double")
    assert "name comes first" in capsys.readouterr().out


def test_a_third_hint_is_the_solution(demo, capsys):
    demo.hint("double", 3)
    assert 'demo.solution("double")' in capsys.readouterr().out


def test_what_is_solved_is_marked(demo, capsys):
    demo.exercises()
    assert "(solved)" not in capsys.readouterr().out
    demo.grade("number", 64)
    demo.exercises()
    (line,) = (row for row in capsys.readouterr().out.splitlines() if "(solved)" in row)
    assert "number" in line


# --- What it leaves behind ---------------------------------------------------------------------


def test_inputs_that_are_changed_in_place_are_noticed(demo):
    result = demo.grade("double", lambda x: x.mul_(2))
    assert "changes its first argument in place" in result.message


def test_a_random_answer_is_noticed(demo):
    result = demo.grade("double", lambda x: 2 * x + torch.rand(()))
    assert "two different results" in " ".join(result.message.split())


def test_the_learner_s_random_numbers_go_on_as_they_were(demo):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    demo.grade("double", lambda x: 2 * x + torch.rand(()))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("answer", ["loop", "one instruction", "in a helper", "stubborn"])
def test_an_endless_loop_is_stopped(demo, monkeypatch, answer):
    monkeypatch.setattr(_engine, "CPU_SECONDS", 0.1)

    def loop(x):
        while True:
            x = x + 1

    scope = {}
    exec("def one_instruction(x):\n    while True: pass", scope)  # it jumps to itself: no new line

    def in_a_helper(x):
        return [loop(x) for _ in range(3)]

    def stubborn(x):
        while True:
            try:
                x = x + 1
            except Exception:
                x = x - 1

    answers = {
        "loop": loop,
        "one instruction": scope["one_instruction"],
        "in a helper": in_a_helper,
        "stubborn": stubborn,
    }
    result = demo.grade("double", answers[answer])
    assert result.status == "failed"
    assert "still running after" in result.message
    assert sys.gettrace() is None


def test_a_slow_wait_is_stopped(demo, monkeypatch):
    monkeypatch.setattr(_engine, "WALL_SECONDS", 0.1)

    def wait(x):
        import time

        while True:
            time.sleep(0.02)

    assert "still running" in demo.grade("double", wait).message


def test_a_debugger_keeps_its_place(demo):
    seen = []

    def tracer(frame, event, arg):
        seen.append(frame.f_code.co_name)

    def double(x):
        return x + x

    sys.settrace(tracer)
    try:
        result = demo.grade("double", double)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(None)
    assert result.status == "passed"
    assert "double" in seen


def test_no_trace_is_left_after_an_error(demo):
    for answer in (lambda x: 1 / 0, lambda x: sys.exit(), lambda x: x):
        demo.grade("double", answer)
        assert sys.gettrace() is None


def test_the_stop_button_still_works(demo):
    def double(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.grade("double", double)
    assert sys.gettrace() is None


def test_another_default_device_does_no_harm(demo):
    torch.set_default_device("meta")
    try:
        result = demo.grade("double", lambda x: x + x + torch.zeros(x.shape))
    finally:
        torch.set_default_device(None)
    assert result.status == "passed", result.message


def test_gradients_and_inference_mode_do_no_harm(demo):
    layer = torch.nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.zero_()
    learner = torch.nn.Sequential(torch.nn.Unflatten(-1, (-1, 1)), layer, torch.nn.Flatten(-2))
    assert demo.grade("double", learner).status == "passed"
    with torch.no_grad():
        assert demo.grade("double", lambda x: x + x).status == "passed"


# --- Many mistakes at once ----------------------------------------------------------------------


def test_each_mixture_of_wrong_parts_is_named_with_the_fewest_first():
    first = {"": lambda x: x, "The first is negated.": lambda x: -x}
    second = {"": lambda x: 2 * x, "The second is x.": lambda x: x}
    mistakes = mixed(first, second)
    found = {mistake.cause: mistake.gives(3) for mistake in mistakes}
    assert found == {
        "The second is x.": (3, 3),
        "The first is negated.": (-3, 6),
        "The first is negated. The second is x.": (-3, 3),
    }
    assert list(found)[-1] == "The first is negated. The second is x."


def test_each_set_of_bugs_that_may_be_left_is_named_and_all_of_them_are_untouched():
    bugs = {"sign": "the sign is wrong", "two": "the factor 2 is missing"}

    def broken(*names):
        return lambda x: (-1) ** ("sign" in names) * (2 - ("two" in names)) * x

    given, *left = unrepaired(bugs, broken)
    assert given.untouched and given.gives(3) == -3
    assert {mistake.cause: mistake.gives(3) for mistake in left} == {
        "One mistake is left: the sign is wrong.": -6,
        "One mistake is left: the factor 2 is missing.": 3,
    }
    assert not any(mistake.untouched for mistake in left)


# --- What an author can get wrong --------------------------------------------------------------


def test_a_checker_that_compares_nothing_is_a_fault():
    result = Chapter("demo", [exercise(lambda answer: None)]).grade("double", 1)
    assert result.status == "failed"
    assert result.fault
    assert "fault of the course" in result.message


def test_a_checker_that_raises_is_a_fault_and_no_traceback():
    def check(answer):
        raise LookupError("lost")

    result = Chapter("demo", [exercise(check)]).grade("double", 1)
    assert result.fault
    assert "LookupError: lost" in result.message


def test_a_checker_of_one_s_own():
    def check(answer):
        value = call(answer, 3)
        require(value > 0, f"got {value}.", "It is not positive.", hint=2)
        agree(value, 6, label="x=3", mistakes=[Mistake("Three times.", 9)])

    own = Chapter("own", [exercise(check)])
    passed = own.grade("double", lambda x: 2 * x)
    assert (passed.status, passed.comparisons) == ("passed", 2)
    assert own.grade("double", lambda x: -x).cause == "It is not positive."
    assert own.grade("double", lambda x: 3 * x).cause == "Three times."
    assert "For x=3: got 7, expected 6" in own.grade("double", lambda x: x + 4).message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"level": 4}, "level must be 1, 2 or 3, got 4"),
        ({"minutes": 0}, "minutes must be at least 1, got 0"),
        ({"why": " "}, "why is empty"),
        ({"task": ""}, "task is empty"),
    ],
)
def test_an_incomplete_exercise_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        exercise(DOUBLE, **changes)


def test_two_exercises_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two exercises are called double"):
        Chapter("demo", [exercise(DOUBLE), exercise(DOUBLE)])


def test_the_cells_of_a_notebook():
    one = exercise(DOUBLE, "two_words")
    assert one.markdown("attention") == (
        "```{exercise} Twice\n:label: ex-attention-two-words\n\n● ○ ○ · 2 minutes\n\n"
        "Double it.\n```"
    )
    assert one.cell("attention").endswith('\n\n\nattention.check("two_words", two_words)')
