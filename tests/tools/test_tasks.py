"""The commands of the Makefile: they stop where they must, and count what went wrong."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tools import tasks

REPORT = """<testsuites><testsuite tests="9" failures="2" errors="1" skipped="3"/></testsuites>"""


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """A root of its own, and this Python in place of that of .venv."""
    for name, path in {
        "ROOT": "",
        "BUILD": "b",
        "HTML": "b/html",
        "LOGS": "b/logs",
        "VENV": "v",
    }.items():
        monkeypatch.setattr(tasks, name, tmp_path / path)
    monkeypatch.setattr(tasks, "PYTHON", Path(sys.executable))
    return tmp_path


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_leaves_its_output_in_a_log(apart):
    assert tasks.call("x", python("print('hello')")) == "hello\n"
    assert (apart / "b" / "logs" / "x.log").read_text() == "hello\n"


def test_a_command_that_fails_shows_the_end_of_its_output():
    code = "print('\\n'.join(map(str, range(99)))); raise SystemExit(3)"
    with pytest.raises(tasks.StepError) as caught:
        tasks.call("x", python(code), tail=2)
    said = str(caught.value)
    assert "| 98" in said and "| 97" in said and "| 96" not in said
    assert "exit status 3" in said and "x.log" in said


def test_a_program_that_is_missing_is_named():
    with pytest.raises(tasks.StepError, match="'no-such-program' was not found"):
        tasks.call("x", ["no-such-program"])


def test_commands_see_no_network_hub_and_no_foreign_packages(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    code = "import os; print(os.environ.get('PYTHONPATH'), os.environ['HF_HUB_OFFLINE'])"
    assert tasks.call("x", python(code)).strip() == "None 1"


def test_the_fingerprint_sees_names_and_contents(apart):
    (apart / "d").mkdir()
    (apart / "d" / "a").write_text("1")
    first = tasks.digest([apart / "d"])
    (apart / "d" / "__pycache__").mkdir()
    (apart / "d" / "__pycache__" / "a.pyc").write_text("x")
    assert tasks.digest([apart / "d"]) == first
    (apart / "d" / "a").rename(apart / "d" / "b")
    renamed = tasks.digest([apart / "d"])
    (apart / "d" / "b").write_text("2")
    assert len({first, renamed, tasks.digest([apart / "d"])}) == 3


def test_a_red_step_makes_the_whole_red(capsys):
    def fail() -> str:
        raise tasks.StepError("  what went wrong")

    steps = tasks.Steps(2)
    assert not steps.run("one", fail)
    assert steps.run("two", lambda: "done")
    with pytest.raises(SystemExit) as caught:
        tasks.finish(steps)
    said = capsys.readouterr().out
    assert caught.value.code == 1 and "Red: one" in said and "what went wrong" in said
    assert "[1/2] one ... FAILED" in said and "[2/2] two ..." in said


def test_steps_side_by_side_run_at_once_and_are_each_reported(capsys, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    both = threading.Barrier(2, timeout=30)  # passes only where two steps run at the same time

    def fail() -> str:
        both.wait()
        raise tasks.StepError("  what went wrong")

    def work() -> str:
        both.wait()
        steps.count(3, 0)
        return "3 passed"

    steps = tasks.Steps(2)
    steps.together(("one", fail), ("two", work))
    said = capsys.readouterr().out
    assert steps.red == ["one"] and (steps.done, steps.passed) == (2, 3)
    assert "[1/2] one ... FAILED" in said and "what went wrong" in said
    assert re.search(r"\[2/2\] two \.\.\. \d+ s, 3 passed", said)


def test_all_green_ends_with_zero(capsys):
    steps = tasks.Steps(1)
    steps.count(5, 0, 2)
    with pytest.raises(SystemExit) as caught:
        tasks.finish(steps)
    assert caught.value.code == 0 and capsys.readouterr().out.endswith(
        "2 skipped, 5 passed, 0 failed\n"
    )


def test_a_step_that_the_others_need_ends_all():
    def fail() -> str:
        raise tasks.StepError("no")

    with pytest.raises(SystemExit, match="1"):
        tasks.need(tasks.Steps(1), "one", fail)


def test_a_report_is_counted(apart):
    (apart / "r.xml").write_text(REPORT)
    steps = tasks.Steps(1)
    assert tasks.tally(steps, apart / "r.xml") == (3, 3, 3)
    assert (steps.passed, steps.failed, steps.skipped) == (3, 3, 3)
    assert tasks.tally(steps, apart / "none.xml") == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "counts"),
    [
        ("def test_a(): pass", (1, 0)),
        ("def test_a(): pass\ndef test_b(): assert 0", (1, 1)),
        ("import no_such_module", (0, 1)),
        ("", (0, 1)),  # nothing ran
    ],
)
def test_pytest_is_counted_even_when_it_dies(apart, source, counts):
    (apart / "test_x.py").write_text(source)
    steps = tasks.Steps(1)
    green = steps.run("x", tasks.run_pytest(steps, "x", ["test_x.py"]))
    assert (steps.passed, steps.failed) == counts and green is (counts == (1, 0))


def fake_book(apart, monkeypatch, code: str) -> None:
    """A jupyter-book that runs some Python, beside a Python that is not there."""
    script = apart / "jupyter-book"
    script.write_text(f"#!{sys.executable}\n{code}")
    script.chmod(0o755)
    monkeypatch.setattr(tasks, "PYTHON", apart / "python")
    monkeypatch.setattr(tasks, "WINDOWS", False)
    monkeypatch.setattr(tasks, "BOOK_INPUTS", ("page.md",))
    (apart / "page.md").write_text("1")


MAKE_PAGE = (
    "import pathlib; p = pathlib.Path('b/html'); p.mkdir(parents=True); (p / 'index.html').touch()"
)


@pytest.mark.skipif(sys.platform == "win32", reason="runs a script by its first line")
def test_pages_are_built_clean_and_only_when_something_changed(apart, monkeypatch):
    fake_book(apart, monkeypatch, MAKE_PAGE)  # fails where b/html is still there
    assert tasks.build() == "1 pages"
    assert tasks.build() == "nothing has changed since the last build"
    (apart / "page.md").write_text("2")
    assert tasks.build() == "1 pages"


@pytest.mark.skipif(sys.platform == "win32", reason="runs a script by its first line")
@pytest.mark.parametrize(
    ("code", "said"),
    [(MAKE_PAGE + "; raise SystemExit(1)", "exit status 1"), ("", "made no")],
)
def test_a_failed_build_is_not_taken_for_a_built_book(apart, monkeypatch, code, said):
    fake_book(apart, monkeypatch, code)
    for _ in range(2):
        with pytest.raises(tasks.StepError, match=said):
            tasks.build()


def test_warnings_fail_the_build_and_nbval_is_strict():
    assert "-W" in tasks.BOOK_BUILD
    assert "--nbval" in tasks.NBVAL and "--nbval-lax" not in tasks.NBVAL


@pytest.mark.parametrize("built", [True, False])
def test_the_pages_are_not_tested_where_they_were_not_built(monkeypatch, built):
    ran = []

    def build() -> str:
        if not built:
            raise tasks.StepError("  no pages")
        return ""

    def record(steps, name, arguments):
        ran.append((name, arguments))
        return lambda: steps.count(1, 0) or ""

    for name in ("environment", "vendor", "chromium"):
        monkeypatch.setattr(tasks, name, lambda: "")
    monkeypatch.setattr(tasks, "lint", lambda steps, *rest: lambda: "")
    monkeypatch.setattr(tasks, "build", build)
    monkeypatch.setattr(tasks, "run_pytest", record)
    with pytest.raises(SystemExit) as caught:
        tasks.command_test()
    assert caught.value.code == (0 if built else 1)
    assert ran == [("tests", [] if built else ["--ignore=tests/book"]), ("notebooks", tasks.NBVAL)]


def test_a_missing_chromium_is_fetched_or_told_early(monkeypatch):
    def refuse(name, command, **options):
        raise tasks.StepError("  no network")

    monkeypatch.setattr(tasks.shutil, "which", lambda name: None)
    monkeypatch.setenv("CHROMIUM", "/somewhere/chrome")
    assert tasks.chromium() == ""
    monkeypatch.delenv("CHROMIUM")
    monkeypatch.setattr(tasks, "call", refuse)
    with pytest.raises(tasks.StepError, match=r"(?s)apt-get install chromium.*no network"):
        tasks.chromium()
    monkeypatch.setattr(tasks, "call", lambda name, command, **options: "/fetched/chrome\n")
    assert tasks.chromium() == "fetched" and os.environ["CHROMIUM"] == "/fetched/chrome"


@pytest.mark.parametrize("arguments", [["run"], ["run", "; rm"], ["run", "x.sh"], ["nothing"], []])
def test_what_is_no_command_is_refused(arguments):
    with pytest.raises(SystemExit) as caught:
        tasks.main(arguments)
    assert caught.value.code == 2


def test_every_command_of_the_makefile_is_there():
    root = Path(__file__).resolve().parents[2]
    lines = (root / "Makefile").read_text().splitlines()
    used = [line.split("$(TASKS)")[1].split() for line in lines if line.startswith("\t@$(TASKS)")]
    assert len(used) > 8
    for command, *rest in used:
        assert command == "run" or command in tasks.COMMANDS
        if command == "run":
            assert (root / rest[0]).is_file()


def test_tasks_needs_nothing_but_the_standard_library():
    """It makes the environment that the libraries are installed into."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])"
    command = [sys.executable, "-I", "-S", "-c", code, tasks.__file__]
    subprocess.run(command, check=True, capture_output=True)
