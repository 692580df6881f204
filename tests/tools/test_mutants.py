"""The judge of mutants: it kills what a test sees and reports what no test sees."""

import re
from pathlib import Path

import pytest

from tools import mutants

ROOT = Path(__file__).resolve().parents[2]
PATCH = """\
# name: {name}
# why: it happens
# tests: {tests}
--- a/src/double.py
+++ b/src/double.py
@@ -1,2 +1,2 @@
 def double(x):
-    {old}
+    {new}
"""
TRUE = "return 2 * x"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for folder in ("src", "tests/mutants"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["src"]\n')
    (tmp_path / "src/double.py").write_text(f"def double(x):\n    {TRUE}\n")
    test = "from double import double\n\n\ndef test_two():\n    assert double(2) == 4\n"
    (tmp_path / "tests/test_double.py").write_text(test)
    return tmp_path


def judged(repository: Path, capsys, *, new: str, old: str = TRUE, tests="tests/test_double.py"):
    patch = PATCH.format(name="square", tests=tests, old=old, new=new)
    (repository / "tests/mutants/square.patch").write_text(patch)
    with pytest.raises(SystemExit) as ended:
        mutants.main(["--root", str(repository)])
    return ended.value.code, capsys.readouterr().out


def test_a_bug_that_a_test_sees_is_killed(repository: Path, capsys):
    code, said = judged(repository, capsys, new="return 3 * x")
    assert code == 0 and "1 of 1 killed" in said
    assert "killed by tests/test_double.py::test_two" in said
    assert TRUE in (repository / "src/double.py").read_text()  # only the copy was changed


def test_a_bug_that_no_test_sees_survives(repository: Path, capsys):
    code, said = judged(repository, capsys, new="return x**2")
    assert code == 1 and "SURVIVED" in said and "0 of 1 killed" in said


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"new": "return 0", "old": "return x + x"}, "does not apply"),
        ({"new": "return 0", "tests": "tests/test_gone.py"}, "red without any mutant"),
        ({"new": "return (", "tests": "tests/test_double.py"}, "could not be collected"),
        ({"new": "import os; os.abort()"}, "could not run"),
    ],
)
def test_what_proves_nothing_is_red(repository: Path, capsys, change: dict, why: str):
    code, said = judged(repository, capsys, **change)
    assert code == 1 and why in said


def test_a_bug_that_hangs_is_stopped(repository: Path, capsys, monkeypatch):
    monkeypatch.setattr(mutants, "TIMEOUT_SECONDS", 1)
    monkeypatch.setattr(mutants, "baseline", lambda root, judged: "")
    code, said = judged(repository, capsys, new="import time; time.sleep(60)")
    assert code == 0 and "stopped after 1 s" in said


def test_red_tests_prove_nothing(repository: Path, capsys):
    (repository / "tests/test_double.py").write_text("def test_no():\n    assert False\n")
    code, said = judged(repository, capsys, new="return 3 * x")
    assert code == 1 and "red without any mutant" in said


@pytest.mark.parametrize("line", ["name", "why", "tests"])
def test_a_header_must_be_whole(repository: Path, capsys, line: str):
    path = repository / "tests/mutants/square.patch"
    patch = PATCH.format(name="n", tests="tests/test_double.py", old=TRUE, new="return 0")
    path.write_text(re.sub(rf"^# {line}: .*\n", "", patch, flags=re.MULTILINE))
    with pytest.raises(mutants.MutantError, match=line):
        mutants.Mutant.read(path)


def test_only_the_package_is_changed(repository: Path):
    path = repository / "tests/mutants/square.patch"
    patch = PATCH.format(name="n", tests="tests/test_double.py", old=TRUE, new="return 0")
    path.write_text(patch.replace("/src/", "/tests/"))
    with pytest.raises(mutants.MutantError, match="no patch to src/"):
        mutants.Mutant.read(path)


def test_without_mutants_there_is_no_green(repository: Path):
    with pytest.raises(SystemExit, match="no such mutant"):
        mutants.main(["--root", str(repository)])


def test_the_committed_mutants_are_whole_and_name_tests_that_exist():
    paths = sorted((ROOT / "tests" / "mutants").glob("*.patch"))
    assert paths, "tests/mutants is empty"
    for path in paths:
        for test in mutants.Mutant.read(path).tests:
            assert (ROOT / test.partition("::")[0]).exists(), f"{path.name} names {test}"
