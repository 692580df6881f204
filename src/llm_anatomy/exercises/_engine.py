"""The engine behind `check`, `hint` and `solution`: it judges what an answer does, never its text.

A chapter module writes `Exercise`s and hands them to `Chapter`. What an exercise checks is made by
one of three factories:

* `same_function(expected, cases, mistakes)`: the answer is a function, compared with an independent
  oracle on several cases;
* `same_value(expected, mistakes)`: the answer is a number, a tensor, or a tuple of them;
* `one_of(right, wrong)`: the answer is the letter of an option;

or is a plain function of the answer that uses `call`, `agree`, `require` and `fail`. A `Mistake`
says what a typical wrong answer would return, so that a failing answer can be recognised and named.

An answer runs under a limit of CPU time. `signal.alarm` exists on Unix only and a thread cannot be
stopped from outside, so the limit is a trace function (`sys.settrace`): it works in the main thread
of any notebook, interrupts between two lines of Python, and leaves nothing running behind. Where a
debugger or a coverage tool traces already, it keeps its place and there is no limit.
"""

import contextlib
import difflib
import inspect
import itertools
import linecache
import math
import numbers
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

__all__ = [
    "PRELUDE",
    "Case",
    "Chapter",
    "Exercise",
    "Mistake",
    "Result",
    "agree",
    "call",
    "case",
    "fail",
    "mixed",
    "need_function",
    "normal",
    "not_done",
    "one_of",
    "require",
    "same",
    "same_function",
    "same_value",
    "unrepaired",
]

PRELUDE = """\
import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
"""  # what a stub and a solution may use without importing it; each chapter starts with these lines

CPU_SECONDS = 5.0  # of one call of an answer
WALL_SECONDS = 60.0  # of one call of an answer that waits instead of computing
WIDTH = 88  # characters in a printed line

_LIBRARIES = {"torch", "numpy", "einops", "jaxtyping", "beartype"}  # their code is no answer's


# --- What an exercise is -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """One exercise, whole: what the chapter shows, what the checker does, and what it says.

    Args:
        name: what a learner types; `stub` and `solution` both define something of this name.
        level: 1 (apply), 2 (derive) or 3 (extend).
        minutes: what a first-time reader needs.
        task: the statement, in Markdown, as the chapter shows it.
        stub: code that runs, and raises NotImplementedError or holds `...` where the answer goes.
        hints: two, graded: the first points the way, the second leaves little to find.
        why: what the solution's code does not say.
        check: takes the answer; returns if it is right, else calls `fail` or `not_done`.
        point: one sentence that is said after success.

    Raises:
        ValueError: for a level outside 1 to 3, other than two hints, or an empty part.
    """

    name: str
    title: str
    level: int
    minutes: int
    task: str
    stub: str
    hints: tuple[str, str]
    solution: str
    why: str
    point: str
    check: Callable[[Any], None] = field(repr=False)

    def __post_init__(self) -> None:
        if self.level not in (1, 2, 3):
            raise ValueError(f"{self.name}: level must be 1, 2 or 3, got {self.level}")
        if self.minutes < 1:
            raise ValueError(f"{self.name}: minutes must be at least 1, got {self.minutes}")
        if len(self.hints) != 2:
            raise ValueError(f"{self.name}: there must be 2 hints, got {len(self.hints)}")
        for part in ("title", "task", "stub", "solution", "why", "point"):
            text = inspect.cleandoc(getattr(self, part)).strip()
            if not text:
                raise ValueError(f"{self.name}: {part} is empty")
            object.__setattr__(self, part, text)
        object.__setattr__(self, "hints", tuple(inspect.cleandoc(h).strip() for h in self.hints))

    @property
    def dots(self) -> str:
        """The level as three dots, the filled ones first."""
        return " ".join("●" * self.level + "○" * (3 - self.level))

    def markdown(self, chapter: str) -> str:
        """The statement as a Markdown cell of the chapter's notebook."""
        label = f"ex-{chapter}-{self.name}".replace("_", "-")
        return (
            f"```{{exercise}} {self.title}\n:label: {label}\n\n{self.dots} · {self.minutes} "
            f"minute{'s' * (self.minutes != 1)}\n\n{self.task}\n```"
        )

    def cell(self, chapter: str) -> str:
        """The code cell under the statement: the stub, then the check."""
        return f'{self.stub}\n\n\n{chapter}.check("{self.name}", {self.name})'


@dataclass(frozen=True)
class Mistake:
    """A typical wrong answer: how it is recognised, and what to say.

    Args:
        cause: the mistake in one or two sentences, for the learner.
        gives: what the mistake returns: a function of the same arguments as the answer, or a value.
        when: instead of `gives`, a test of (got, expected) that must hold wherever they differ; it
            is asked only about things of the expected type and shape.
        hint: which hint helps.
        untouched: this is the code as it was given, so the exercise is not done yet.
    """

    cause: str
    gives: Any = None
    when: Callable[[Any, Any], bool] | None = None
    hint: Literal[1, 2] = 1
    untouched: bool = False


@dataclass(frozen=True)
class Case:
    """Arguments to call an answer with, and a label such as "T=5, S=7" for the message."""

    label: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def case(label: str, *args: Any, **kwargs: Any) -> Case:
    """Make a case: the label, then the arguments exactly as the answer will get them."""
    return Case(label, args, kwargs)


@dataclass(frozen=True)
class Result:
    """What became of an answer.

    Args:
        message: the text that `check` prints.
        cause: the likely cause where a mistake was recognised, else a clue where there is one.
        comparisons: how many comparisons were made; a passed answer has at least one.
        fault: the checker itself went wrong, which is a defect of the course.
    """

    status: Literal["passed", "failed", "not done"]
    message: str
    cause: str | None = None
    comparisons: int = 0
    fault: bool = False


class _Verdict(Exception):  # noqa: N818  not an error: the way out of a checker
    """Leaves a checker with what it found."""

    def __init__(
        self,
        what: str,
        cause: str | None = None,
        hint: int = 1,
        done: bool = True,
        recognised: bool = True,
    ) -> None:
        super().__init__(what)
        self.what, self.cause, self.hint, self.done = what, cause, hint, done
        self.recognised = recognised  # the cause is a known mistake, not a guess from the numbers
        self.out_of_time = False


class _TimeUp(BaseException):
    """The answer used up its time. Not an Exception, so that `except Exception` lets it through."""


_comparisons: ContextVar[list[int] | None] = ContextVar("comparisons", default=None)


def _count() -> None:
    counter = _comparisons.get()
    if counter is not None:
        counter[0] += 1


# --- Many mistakes at once ------------------------------------------------------------------------


def mixed(*parts: Mapping[str, Callable[..., Any]]) -> list[Mistake]:
    """A mistake for each mixture of right and wrong parts of a tuple, fewest wrong ones first.

    Each mapping holds the right version of its part under "", and wrong ones under what to say.
    """
    rows = sorted(itertools.product(*parts), key=lambda row: sum(map(bool, row)))
    return [
        Mistake(
            " ".join(text for text in row if text),
            lambda *args, row=row: tuple(
                part[text](*args) for part, text in zip(parts, row, strict=True)
            ),
        )
        for row in rows
        if any(row)
    ]


def unrepaired(bugs: Mapping[str, str], broken: Callable[..., Callable[..., Any]]) -> list[Mistake]:
    """A mistake for each set of bugs that may be left in code that is to be repaired.

    Args:
        bugs: what to say of each bug, in a clause; fewer than six of them.
        broken: makes the code that has the bugs of these names. With all it is the code as given.
    """
    mistakes = [Mistake("", broken(*bugs), untouched=True)]
    for n in range(1, len(bugs)):
        count = ("One mistake is", "Two mistakes are", "Three mistakes are", "Four mistakes are")
        for names in itertools.combinations(bugs, n):
            text = "; ".join(bugs[name] for name in names)
            mistakes.append(Mistake(f"{count[n - 1]} left: {text}.", broken(*names), hint=2))
    return mistakes


# --- What a checker says -------------------------------------------------------------------------


def fail(what: str, cause: str | None = None, hint: int = 1) -> NoReturn:
    """End the check: the answer is wrong. `what` differs, `cause` is why, `hint` helps."""
    raise _Verdict(what, cause, hint)


def not_done(reason: str = "") -> NoReturn:
    """End the check: there is no answer yet. `reason` is a whole sentence, if one is needed."""
    raise _Verdict(reason, done=False)


def require(condition: bool, what: str, cause: str | None = None, hint: int = 1) -> None:
    """Count one comparison, and fail unless it holds."""
    _count()
    if not condition:
        fail(what, cause, hint)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same on every machine."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64).to(dtype)


# --- Running an answer ---------------------------------------------------------------------------


def need_function(answer: Any) -> None:
    """End the check unless the answer can be called."""
    if answer is None or answer is ... or answer is NotImplemented:
        not_done()
    if isinstance(answer, type):
        fail(
            f"A function is expected, and this is the class {answer.__name__}.",
            "Pass the function itself, or an instance of the class that can be called.",
        )
    if not callable(answer):
        fail(
            f"A function is expected, and this is {_describe(answer)}.",
            "Pass the function itself, by its name and without brackets: the check calls it.",
        )


def call(answer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an answer safely: under a time limit, with errors turned into a message.

    An answer that raises NotImplementedError itself is not done yet; one that torch refuses with
    that error is wrong.
    """
    _bind(answer, args, kwargs)
    cpu_end = time.thread_time() + CPU_SECONDS
    wall_end = time.monotonic() + WALL_SECONDS

    opcodes = 0

    def watch(frame, event, arg):
        nonlocal opcodes
        if frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
            return None
        if event == "opcode":
            opcodes += 1
            if opcodes % 256:
                return watch
        frame.f_trace_opcodes = True  # `while True: pass` is one instruction: no new line, ever
        if time.thread_time() > cpu_end or time.monotonic() > wall_end:
            raise _TimeUp
        return watch

    traced_already = sys.gettrace() is not None
    if not traced_already:
        sys.settrace(watch)
    try:
        return answer(*args, **kwargs)
    except (KeyboardInterrupt, _Verdict):
        raise
    except BaseException as error:
        if not traced_already:
            sys.settrace(None)
        _explain(answer, error)
    finally:
        if not traced_already:
            sys.settrace(None)


def _bind(answer: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    target = answer.forward if isinstance(answer, nn.Module) else answer
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # built-in functions have none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = [f"{len(args)} argument{'s' * (len(args) != 1)}"] if args else []
        given += [f"{key}=…" for key in kwargs]
        names = ", ".join(signature.parameters)
        fail(
            f"It takes ({names}); the check calls it with {', '.join(given) or 'no argument'}: "
            f"{error}.",
            "The arguments must stay as they stand in the stub.",
        )


def _explain(answer: Callable[..., Any], error: BaseException) -> NoReturn:
    """Say what an answer raised, and in which of its own lines."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    if isinstance(error, NotImplementedError):
        raised_by = frames[-1][0].f_code
        if "NotImplementedError" in raised_by.co_names:
            not_done()
    own = [(f, n) for f, n in frames[1:] if _is_learners(f)]
    place = ""
    if own:
        frame, line = own[-1]
        source = linecache.getline(frame.f_code.co_filename, line).strip()
        place = f" in line {line}" + (f", `{_shorten(source, 70)}`" if source else "")
    if isinstance(error, _TimeUp):
        verdict = _Verdict(
            f"It is still running after {CPU_SECONDS:.0f} seconds{place}, and was stopped.",
            "A loop that never ends, or far more work than these small inputs need.",
        )
        verdict.out_of_time = True
        raise verdict
    fail(_what_it_raised(error, place))


def _what_it_raised(error: BaseException, place: str = "") -> str:
    text = _shorten(_plain("" if isinstance(error, SystemExit) else str(error)), 300)
    return f"It raised {type(error).__name__}{place}" + (f": {text}" if text else ".")


def _is_learners(frame: Any) -> bool:
    name = frame.f_globals.get("__name__", "")
    root = name.partition(".")[0]
    return root not in sys.stdlib_module_names and root not in {*_LIBRARIES, "llm_anatomy"}


def _plain(text: str) -> str:
    """One line, without the memory addresses that would differ in every run."""
    return re.sub(r"0x[0-9a-fA-F]{4,}", "0x…", " ".join(text.split()))


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


# --- Comparing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Difference:
    what: str
    clue: str | None = None  # what the numbers alone suggest, where no known mistake fits


def _describe(value: Any) -> str:
    """Name any value in a few words, without addresses."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {_shape(value)} and type {_dtype(value)}"
    if isinstance(value, nn.Module):
        return f"a module {type(value).__name__}"
    if inspect.isroutine(value):
        return f"a function ({getattr(value, '__name__', 'without a name')})"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or value is ...:
        return "None" if value is None else "..."
    if isinstance(value, bool | numbers.Real):
        return f"the number {_number(value)}" if not isinstance(value, bool) else f"{value}"
    if isinstance(value, str):
        return f'the text "{_shorten(_plain(value), 40)}"'
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    kind = type(value)
    full = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"an object of type {full}"


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _number(value: Any, digits: int = 4) -> str:
    if isinstance(value, bool):
        return str(value)
    if _is_huge(value):
        return "an integer of hundreds of digits"
    if isinstance(value, int):
        return f"{value}"
    value = float(value)
    return f"{value:.{digits}g}" if math.isfinite(value) else str(value)


def _is_huge(value: Any) -> bool:
    """Whether it is an integer that no float can hold."""
    return isinstance(value, int) and abs(value) > 2**1000


def _pair(got: Any, expected: Any) -> str:
    """Both numbers, with as many digits as it takes to see that they differ."""
    for digits in range(4, 10):
        left, right = _number(got, digits), _number(expected, digits)
        if left != right:
            break
    return f"got {left}, expected {right}"


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    if dtype.is_complex:
        return "complex"
    return "float" if dtype.is_floating_point else "integer"


def _as_scalar(value: Any) -> Any:
    """A Python number for whatever is a single number; else the value itself."""
    if isinstance(value, Tensor) and value.ndim == 0 and value.device.type != "meta":
        return value.item()
    if isinstance(value, numbers.Integral) and not isinstance(value, bool | int):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool | int | float):
        return float(value)
    return value


def _difference(
    got: Any,
    expected: Any,
    rtol: float,
    atol: float,
    names: Sequence[str] = (),
    reveal: bool = True,
) -> _Difference | None:
    """How two values differ. `reveal` says whether a number that is wrong may be corrected."""
    if isinstance(expected, Tensor):
        return _tensor_difference(got, expected, rtol, atol)
    if isinstance(expected, tuple | list):
        if not isinstance(got, tuple | list):
            listing = f" ({', '.join(names)})" if names else ""
            kind = "tuple" if isinstance(expected, tuple) else "list"
            return _Difference(
                f"It should be a {kind} of {len(expected)}{listing}, and is {_describe(got)}."
            )
        if len(got) != len(expected):
            return _Difference(f"It should hold {len(expected)} things, and holds {len(got)}.")
        for i, (one, other) in enumerate(zip(got, expected, strict=True)):
            found = _difference(one, other, rtol, atol, (), reveal)
            if found is not None:
                label = names[i] if names else f"part {i}"
                return _Difference(f"{label}: {found.what}", found.clue)
        return None
    if isinstance(expected, str):
        if isinstance(got, str) and got.strip().casefold() == expected.strip().casefold():
            return None
        return _Difference(f"got {_describe(got)}.")
    return _number_difference(_as_scalar(got), expected, rtol, atol, reveal)


def _number_difference(
    got: Any, expected: Any, rtol: float, atol: float, reveal: bool
) -> _Difference | None:
    if isinstance(expected, bool):
        if not isinstance(got, bool):
            return _Difference(f"It should be True or False, and is {_describe(got)}.")
        return None if got is expected else _Difference(f"got {got}, which is not right.")
    if isinstance(got, bool) or not isinstance(got, int | float):
        return _Difference(f"It should be a number, and is {_describe(got)}.")
    if _is_huge(got):
        return _Difference(f"got {_number(got)}, which is not right.")
    if math.isnan(got):
        return _Difference("It is nan, not a number.")
    if abs(got - expected) <= atol + rtol * abs(expected):
        return None
    clue = None
    if got * expected <= 0 and expected != 0:
        clue = "Look at the sign, and at zero."
    elif abs(got - expected) <= 0.01 * abs(expected):
        clue = "It is close, but not exact enough: give more digits, or look for a small term."
    if reveal:
        return _Difference(f"{_pair(got, expected)}.", clue)
    return _Difference(f"got {_number(got, 6)}, which is not right.", clue)


def _tensor_difference(got: Any, expected: Tensor, rtol: float, atol: float) -> _Difference | None:
    if not isinstance(got, Tensor):
        advice = ""
        if isinstance(got, list | tuple) or type(got).__module__ == "numpy":
            advice = " Make a tensor of it: torch.as_tensor(...)."
        return _Difference(f"A torch.Tensor is expected, and this is {_describe(got)}.{advice}")
    if got.layout != torch.strided:
        return _Difference("An ordinary (dense) tensor is expected, and this one is sparse.")
    if got.device.type != "cpu":
        return _Difference(
            f"The result is on {got.device}, the inputs were on the cpu.",
            "Make new tensors on the device of the inputs, with device=x.device.",
        )
    got, expected = got.detach(), expected.detach()
    if got.shape != expected.shape:
        return _Difference(
            f"The shape is {_shape(got)}, expected {_shape(expected)}.",
            _shape_clue(got, expected, rtol, atol),
        )
    if _kind(got.dtype) != _kind(expected.dtype):
        clue = None
        if _kind(got.dtype) != "complex" and not _unequal(got, expected, rtol, atol).any():
            clue = f"The values are right; only the type is not: .to(torch.{_dtype(expected)})."
        return _Difference(
            f"The type is {_dtype(got)}, expected {_dtype(expected)}.",
            clue,
        )
    unequal = _unequal(got, expected, rtol, atol)
    if not unequal.any():
        return None
    index = tuple(unequal.nonzero()[0].tolist())
    where = f"at {list(index)} " if index else ""
    count, total = int(unequal.sum()), unequal.numel()
    return _Difference(
        f"{where}{_pair(got[index].item(), expected[index].item())} "
        f"({count} of {total} entries differ).",
        _value_clue(got, expected, rtol, atol),
    )


def _unequal(got: Tensor, expected: Tensor, rtol: float, atol: float) -> Tensor:
    if _kind(expected.dtype) != "float" and _kind(got.dtype) != "float":
        return got.to(torch.int64) != expected.to(torch.int64)
    return ~torch.isclose(got.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


def _close(got: Tensor, expected: Tensor, rtol: float, atol: float) -> bool:
    return got.shape == expected.shape and not bool(_unequal(got, expected, rtol, atol).any())


def _shape_clue(got: Tensor, expected: Tensor, rtol: float, atol: float) -> str | None:
    if got.squeeze().shape == expected.squeeze().shape:
        return "Only the axes of size 1 differ: one is missing, or one too many."
    if got.ndim != expected.ndim:
        axes = "1 axis" if got.ndim == 1 else f"{got.ndim} axes"
        return f"It has {axes} where {expected.ndim} are expected."
    if sorted(got.shape) == sorted(expected.shape):
        return "These are the right sizes in another order: two axes are swapped."
    return None


def _value_clue(got: Tensor, expected: Tensor, rtol: float, atol: float) -> str | None:
    """What can be read off the numbers when no known mistake fits."""
    if expected.dtype == torch.bool:
        if torch.equal(got, ~expected):
            return "Every entry is the opposite of what is expected: True and False are swapped."
        if got.all() or not got.any():
            return f"Every entry is {bool(got.all())}."
        if got.ndim >= 2 and _close(got.mT, expected, rtol, atol):
            return "It is the transpose of what is expected: the last two axes are swapped."
        return None
    got, expected = got.double(), expected.double()
    if got.isnan().any() and not expected.isnan().any():
        return "There are nan values: a division 0/0, or a softmax over nothing but -inf."
    if got.isinf().any() and not expected.isinf().any():
        return "There are infinite values: an overflow, a division by 0, or a log of 0."
    if not got.any():
        return "Every entry is zero."
    if _close(got, -expected, rtol, atol):
        return "Every sign is the opposite of what is expected."
    if got.ndim >= 2 and _close(got.mT, expected, rtol, atol):
        return "It is the transpose of what is expected: the last two axes are swapped."
    large = expected.abs() > 1e-3
    if large.sum() > 1:
        ratio = (got[large] / expected[large]).median()
        if abs(ratio - 1) > 0.02 and _close(got, ratio * expected, rtol, atol):
            return f"Every entry is {_number(ratio)} times what is expected: look for a factor."
    shift = (got - expected).median()
    if got.numel() > 1 and _close(got, expected + shift, rtol, atol):
        return f"Every entry is {_number(shift)} more than expected."
    if got.numel() > 1 and _close(
        got.flatten().sort().values, expected.flatten().sort().values, rtol, atol
    ):
        return "These are the right numbers in the wrong places: a reshape or an axis is mixed up."
    return None


def same(got: Any, expected: Any, *, rtol: float = 1e-4, atol: float = 1e-5) -> bool:
    """Whether an answer equals what is expected: type, shape, kind of number and values."""
    return _difference(got, expected, rtol, atol) is None


def agree(
    got: Any,
    expected: Any,
    *,
    mistakes: Iterable[Mistake] = (),
    label: str = "",
    names: Sequence[str] = (),
    rtol: float = 1e-4,
    atol: float = 1e-5,
    reveal: bool = True,
) -> None:
    """Count one comparison of two values, and fail with the likely cause where they differ.

    Here a mistake's `gives` is the value that it leads to. Without `reveal` the message says that
    a number is wrong, not which one is right.
    """
    _count()
    found = _difference(got, expected, rtol, atol, names, reveal)
    if found is None:
        return
    for mistake in mistakes:
        if mistake.when is None:
            matches = same(got, mistake.gives, rtol=rtol, atol=atol)
        else:
            matches = _comparable(got, expected) and mistake.when(got, expected)
        if matches:
            _blame(found, mistake, label)
    _blame(found, None, label)


def _blame(found: _Difference, mistake: Mistake | None, label: str) -> NoReturn:
    if mistake is not None and mistake.untouched:
        not_done("It still behaves exactly like the code as it was given.")
    what = f"For {label}: {found.what}" if label else found.what
    if mistake is None:
        raise _Verdict(what, found.clue, recognised=False)
    fail(what, mistake.cause, mistake.hint)


# --- Factories of checks -------------------------------------------------------------------------


def same_function(
    expected: Callable[..., Any],
    cases: Iterable[Case] | Callable[[], Iterable[Case]],
    mistakes: Sequence[Mistake] = (),
    *,
    names: Sequence[str] = (),
    rtol: float = 1e-4,
    atol: float = 1e-5,
    again: bool = True,
) -> Callable[[Any], None]:
    """Check a function against an oracle, case by case.

    A mistake is named only if it gives what the answer gave in every case, right ones included.

    Args:
        cases: the cases, or a function that makes them (so that importing a chapter stays cheap).
        names: of the parts, where the function returns a tuple.
        again: call the first case twice, and fail if the two results differ.
    """

    def check(answer: Any) -> None:
        need_function(answer)
        rows = list(cases() if callable(cases) else cases)
        outcomes = []
        for row in rows:
            outcomes.append(_outcome(answer, row))
            last = outcomes[-1]
            if isinstance(last, _Verdict) and last.out_of_time:
                _blame(_Difference(last.what, last.cause), None, row.label)
        wanted = [expected(*row.args, **row.kwargs) for row in rows]
        errors = [o for o in outcomes if isinstance(o, _Verdict)]
        if any(not e.done for e in errors):
            raise next(e for e in errors if not e.done)
        if all(o is None or o is ... for o in outcomes):
            not_done("It returns nothing: if it computes something, a `return` is missing.")
        if again and not isinstance(outcomes[0], _Verdict):
            second = _outcome(answer, rows[0])
            _count()
            if not _repeats(second, outcomes[0]):
                fail(
                    f"For {rows[0].label}: called twice with the same input, it gives two "
                    "different results.",
                    "Something random in it, or something that it keeps from call to call.",
                )
        for row, got, want in zip(rows, outcomes, wanted, strict=True):
            _count()
            if isinstance(got, _Verdict):
                found = _Difference(got.what, got.cause)
            elif got is None:
                found = _Difference("It returns nothing here.", "A branch without a `return`.")
            else:
                found = _difference(got, want, rtol, atol, names)
            if found is not None:
                mistake = _recognise(mistakes, rows, outcomes, wanted, rtol, atol)
                _blame(found, mistake, row.label)

    return check


def _outcome(answer: Callable[..., Any], row: Case, ours: bool = False) -> Any:
    """What an answer returns for a case; a verdict if it raises or changes its inputs.

    A function of ours, which shows what a mistake would give, needs no time limit.
    """
    args = tuple(_copy(a) for a in row.args)
    kwargs = {key: _copy(value) for key, value in row.kwargs.items()}
    try:
        result = answer(*args, **kwargs) if ours else call(answer, *args, **kwargs)
    except _Verdict as verdict:
        return verdict
    except Exception as error:  # only of ours: `call` turns those of an answer into a verdict
        return _Verdict(_what_it_raised(error))
    before = [*row.args, *row.kwargs.values()]
    for i, (old, new) in enumerate(zip(before, [*args, *kwargs.values()], strict=True)):
        if isinstance(old, Tensor) and not _untouched(old, new):
            return _Verdict(
                f"It changes its {_ordinal(i)} argument in place.",
                "An operation that ends in _ (such as masked_fill_), an assignment x[...] = ..., "
                "or an operator like += writes into the caller's tensor. Use the form that returns "
                "a new tensor, or work on x.clone().",
            )
    return result


def _repeats(one: Any, other: Any) -> bool:
    """Whether two results of the same call agree; true of what cannot be compared."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if one.layout != torch.strided or one.device.type == "meta":
            return True
        return torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_repeats(a, b) for a, b in pairs)
    if isinstance(one, str | int) and isinstance(other, str | int):
        return one == other
    return isinstance(other, _Verdict) == isinstance(one, _Verdict)


def _comparable(got: Any, expected: Any) -> bool:
    """Whether a mistake's `when` can be asked: the same kind of thing, of the same shape."""
    if isinstance(expected, Tensor):
        dense = isinstance(got, Tensor) and got.layout == torch.strided
        return dense and got.device.type == "cpu" and got.shape == expected.shape
    if isinstance(expected, tuple | list):
        if not isinstance(got, tuple | list) or len(got) != len(expected):
            return False
        return all(_comparable(one, other) for one, other in zip(got, expected, strict=True))
    if isinstance(expected, str | bool):
        return isinstance(got, type(expected))
    got = _as_scalar(got)
    return isinstance(got, int | float) and not isinstance(got, bool) and not _is_huge(got)


def _untouched(old: Tensor, new: Tensor) -> bool:
    if old.shape != new.shape or old.dtype != new.dtype:
        return False
    return bool(torch.isclose(old, new, rtol=0, atol=0, equal_nan=True).all())


def _ordinal(i: int) -> str:
    return ("first", "second", "third", "fourth", "fifth", "sixth")[i] if i < 6 else f"{i + 1}th"


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _recognise(
    mistakes: Sequence[Mistake],
    rows: Sequence[Case],
    outcomes: Sequence[Any],
    wanted: Sequence[Any],
    rtol: float,
    atol: float,
) -> Mistake | None:
    for mistake in mistakes:
        if mistake.when is not None:
            pairs = [
                (got, want)
                for got, want in zip(outcomes, wanted, strict=True)
                if not isinstance(got, _Verdict) and not same(got, want, rtol=rtol, atol=atol)
            ]
            if pairs and all(_comparable(g, w) and mistake.when(g, w) for g, w in pairs):
                return mistake
            continue
        made = [_outcome(mistake.gives, row, ours=True) for row in rows]
        if all(_alike(got, it, rtol, atol) for got, it in zip(outcomes, made, strict=True)):
            return mistake
    return None


def _alike(got: Any, made: Any, rtol: float, atol: float) -> bool:
    """Whether an answer and a mistake end alike: the same value, or the same error."""
    if isinstance(got, _Verdict) or isinstance(made, _Verdict):
        if not (isinstance(got, _Verdict) and isinstance(made, _Verdict)):
            return False
        return _error_name(got.what) == _error_name(made.what)
    return same(got, made, rtol=rtol, atol=atol)


def _error_name(what: str) -> str:
    """The sentence without the line that it names, which is each author's own."""
    return re.sub(r" in line \d+(, `.*?`)?(?=:|\.| )", "", what)


def same_value(
    expected: Any | Callable[[], Any],
    mistakes: Sequence[Mistake] = (),
    *,
    names: Sequence[str] = (),
    rtol: float = 1e-3,
    atol: float = 1e-9,
) -> Callable[[Any], None]:
    """Check a number, a tensor, a text, or a tuple of them. `expected` may be a function of none.

    The message says that a number is wrong, not which one is right.
    """

    def check(answer: Any) -> None:
        if _missing(answer):
            not_done()
        if inspect.isroutine(answer):
            fail(
                f"A value is expected, and this is {_describe(answer)}.",
                "Pass what the function returns: call it first.",
            )
        want = expected() if callable(expected) else expected
        agree(answer, want, mistakes=mistakes, names=names, rtol=rtol, atol=atol, reveal=False)

    return check


def _missing(answer: Any) -> bool:
    if answer is None or answer is ... or answer is NotImplemented:
        return True
    if isinstance(answer, str):
        return answer.strip() in ("", "...", "?")
    if isinstance(answer, tuple | list):
        return any(_missing(part) for part in answer)
    return False


def one_of(right: str, wrong: Mapping[str, str]) -> Callable[[Any], None]:
    """Check the letter of an option; `wrong` says of each other option why it is not right."""
    options = sorted([right, *wrong])

    def check(answer: Any) -> None:
        if _missing(answer):
            not_done()
        listing = ", ".join(f'"{option}"' for option in options)
        if not isinstance(answer, str):
            fail(f"One of {listing} is expected, and this is {_describe(answer)}.")
        letter = answer.strip().strip("().").casefold()
        if letter not in options:
            fail(f"One of {listing} is expected, and this is {_describe(answer)}.")
        require(letter == right, f'"{letter}" is not the one.', wrong.get(letter))

    return check


# --- A chapter's exercises -----------------------------------------------------------------------


class Chapter:
    """The exercises of one module, and the functions that a learner calls.

    Args:
        module: the module's `__name__`; its last part is what a learner types.

    Raises:
        ValueError: if two exercises have the same name.
    """

    def __init__(self, module: str, exercises: Iterable[Exercise]) -> None:
        self.name = module.rpartition(".")[2]
        self.by_name: dict[str, Exercise] = {}
        for exercise in exercises:
            if exercise.name in self.by_name:
                raise ValueError(f"two exercises are called {exercise.name}")
            self.by_name[exercise.name] = exercise
        self._passed: set[str] = set()

    def grade(self, name: Any, answer: Any = None) -> Result:
        """Judge an answer and return what `check` would print."""
        exercise = self._find(name)
        if isinstance(exercise, str):
            return Result("failed", exercise)
        counter = [0]
        token = _comparisons.set(counter)
        default = torch.get_default_device()
        device = contextlib.nullcontext() if default.type == "cpu" else torch.device("cpu")
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad(), device:
                torch.manual_seed(0)
                exercise.check(answer)
        except _Verdict as verdict:
            return self._refuse(exercise, verdict, counter[0])
        except Exception as error:
            what = f"{type(error).__name__}: {_shorten(_plain(str(error)), 200)}"
            return self._fault(exercise, f"stopped on this answer with {what}", counter[0])
        finally:
            _comparisons.reset(token)
        if counter[0] == 0:
            return self._fault(exercise, "compared nothing", 0)
        self._passed.add(exercise.name)
        text = (
            f"{exercise.name}: right.\n"
            + _paragraph("", exercise.point)
            + _paragraph("", f'Compare with {self.name}.solution("{exercise.name}").')
        )
        return Result("passed", text.rstrip("\n"), comparisons=counter[0])

    def _refuse(self, exercise: Exercise, verdict: _Verdict, comparisons: int) -> Result:
        help_line = f'{self.name}.hint("{exercise.name}", {verdict.hint})'
        if not verdict.done:
            text = " ".join(
                part
                for part in (f"{exercise.name}: not done yet.", verdict.what, f"Stuck? {help_line}")
                if part
            )
            return Result("not done", _wrap(text), comparisons=comparisons)
        text = f"{exercise.name}: not right yet.\n" + _paragraph("Found:", verdict.what)
        if verdict.cause:
            label = "Likely cause:" if verdict.recognised else "A clue:"
            text += _paragraph(label, verdict.cause)
        text += _paragraph("Help:", help_line)
        return Result("failed", text.rstrip("\n"), verdict.cause, comparisons)

    def _fault(self, exercise: Exercise, what: str, comparisons: int) -> Result:
        text = f"{exercise.name}: the checker {what}. That is a fault of the course, not yours."
        return Result("failed", _wrap(text), "checker fault", comparisons, fault=True)

    def check(self, name: Any, answer: Any = None) -> None:
        """Say whether an answer is right, and if not, what differs and why.

        Prints one of: "right" and the point of the exercise, "not right yet" and the mistake, or
        "not done yet". Never raises for a mistake of the learner.
        """
        print(self.grade(name, answer).message)

    def hint(self, name: Any, level: Any = 1) -> None:
        """Print hint 1 (points the way) or 2 (leaves little to find)."""
        exercise = self._find(name)
        if isinstance(exercise, str):
            print(exercise)
        elif level not in (1, 2):
            print(f'There are two hints, 1 and 2. After them: {self.name}.solution("{name}")')
        else:
            print(f"{name}, hint {level} of 2\n{_wrap(exercise.hints[level - 1])}")

    def solution(self, name: Any) -> None:
        """Print a worked solution, and why it is one."""
        exercise = self._find(name)
        if isinstance(exercise, str):
            print(exercise)
        else:
            print(f"{exercise.solution}\n\n{_wrap('Why: ' + exercise.why)}")

    def exercises(self) -> None:
        """List the exercises: level, minutes, name, title, and which are solved in this session."""
        width = max(len(name) for name in self.by_name)
        for name, exercise in self.by_name.items():
            solved = "  (solved)" if name in self._passed else ""
            print(
                f"{exercise.dots}  {exercise.minutes:3d} min  {name:<{width}}  "
                f"{exercise.title}{solved}"
            )

    def _find(self, name: Any) -> Exercise | str:
        """The exercise, or what to say where there is none of this name."""
        if isinstance(name, str) and name in self.by_name:
            return self.by_name[name]
        if not isinstance(name, str):
            first = next(iter(self.by_name))
            return _wrap(
                f"The exercise's name comes first, in quotes, then the answer: "
                f'{self.name}.check("{first}", ...). Got {_describe(name)} for the name.'
            )
        close = difflib.get_close_matches(name, self.by_name, n=1)
        guess = f' Did you mean "{close[0]}"?' if close else ""
        listing = ", ".join(self.by_name)
        shown = _shorten(_plain(name), 60)
        return _wrap(f'There is no exercise "{shown}" in {self.name}.{guess} There are: {listing}.')


def _paragraph(label: str, text: str) -> str:
    """An indented, wrapped paragraph that starts with a label."""
    lead = f"  {label} " if label else "  "
    return (
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=lead,
            subsequent_indent="    " if label else "  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        + "\n"
    )


def _wrap(text: str) -> str:
    """Wrap prose, leaving indented lines (code, formulas) and empty lines as they are."""
    lines = []
    for block in re.split(r"\n(?=\s)|\n\n", text):
        if block.startswith(" ") or not block:
            lines.append(block)
        else:
            lines.append(
                textwrap.fill(block, WIDTH, break_long_words=False, break_on_hyphens=False)
            )
    return "\n".join(lines)
