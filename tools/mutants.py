"""Check that the tests catch every known bug of tests/mutants.

    python tools/mutants.py               every mutant
    python tools/mutants.py causal rope   those whose file name or name holds one of the words

A mutant is a patch to src/ that puts in a bug which somebody once had:

    # name: scale by the width of the model
    # why: the scores then shrink with the number of heads
    # tests: tests/test_attention.py [tests/test_b.py::test_c ...]
    --- a/src/llm_anatomy/attention.py
    +++ b/src/llm_anatomy/attention.py
    @@ ...

Each is applied to a copy of the package. The named tests must pass without it, or their red would
prove nothing, and fail with it. A test that cannot even be collected counts as no proof either.
"""

import argparse
import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("src", "tests", "tools", "pyproject.toml")
HEADER = re.compile(r"^# (name|why|tests): *(\S.*)$", re.MULTILINE)
TIMEOUT_SECONDS = 240
# Most of a run's time; never the package, which each run imports anew from its copy.
PRELOADED = [
    *("pytest", "nbval.plugin", "hypothesis", "beartype", "jaxtyping"),
    *("torch", "einops", "safetensors.torch", "tqdm.auto"),
    *(
        f"transformers.models.{m}.modeling_{m}"
        for m in ("bart", "bert", "bloom", "gpt2", "llama", "mamba", "marian", "openai", "t5")
    ),
    "peft",
]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRELOADED)
TESTS_FAILED, INTERRUPTED, NO_TESTS, CRASHED = 1, 2, 5, -1  # pytest's exit statuses, and none


class MutantError(Exception):
    """A mutant that cannot be judged; the message says why."""


@dataclass(frozen=True)
class Mutant:
    """One known bug: where its patch is, what it is, and which tests must see it."""

    path: Path
    name: str
    why: str
    tests: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "Mutant":
        """Read the header of a patch.

        Raises:
            MutantError: a line of the header is missing, or there is no patch to src/.
        """
        text = path.read_text(encoding="utf-8")
        head, found, _ = text.partition("\n--- ")
        fields = dict(HEADER.findall(head))
        missing = {"name", "why", "tests"} - fields.keys()
        if missing:
            raise MutantError(f"its header lacks {', '.join(sorted(missing))}")
        touched = re.findall(r"^\+\+\+ b/(\S+)", text, re.MULTILINE)
        if not found or not touched or not all(name.startswith("src/") for name in touched):
            raise MutantError("it is no patch to src/ with the paths a/src/… and b/src/…")
        return cls(path, fields["name"], fields["why"], tuple(fields["tests"].split()))


def copy(root: Path, target: Path) -> None:
    """Copy what the tests need; a change there never reaches the repository."""
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(
                source,
                target / name,
                ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", ".hypothesis"),
            )
        elif source.exists():
            shutil.copy2(source, target / name)


def apply(mutant: Mutant, folder: Path) -> None:
    """Apply a patch in a copy.

    Raises:
        MutantError: the patch does not fit the code any more.
    """
    command = ["git", "apply", "--recount", "--whitespace=nowarn", str(mutant.path.resolve())]
    # Without a repository around it, git would skip files silently: it works on plain folders
    # only when no parent is a repository, so it gets told that there is none.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise MutantError(f"the patch does not apply: {done.stderr.strip()}")


def pytest(folder: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run tests in a copy until one fails, in a fork that has the heavy imports behind it.

    Raises:
        subprocess.TimeoutExpired: they were still running after TIMEOUT_SECONDS.
    """
    command = ["-q", "-x", "--color=no", "--tb=line", "-p", "no:cacheprovider", *tests]
    with tempfile.TemporaryDirectory() as scratch:
        # the status goes through a file: two threads that wait may take each other's exit code
        said, ended = Path(scratch) / "said.txt", Path(scratch) / "status.txt"
        run = FORKS.Process(target=_pytest, args=(folder, command, said, ended))
        run.start()
        run.join(TIMEOUT_SECONDS)
        if run.is_alive():
            run.kill()
            run.join()
            raise subprocess.TimeoutExpired(command, TIMEOUT_SECONDS)
        text = said.read_text(encoding="utf-8") if said.exists() else ""
        status = int(ended.read_text()) if ended.exists() else CRASHED
        return subprocess.CompletedProcess(command, status, text)


def _pytest(folder: Path, command: list[str], said: Path, ended: Path) -> None:
    """In the fork: see the copy alone, run, and leave the output and the exit status."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(folder)
    sys.dont_write_bytecode = True
    ours = {ROOT, ROOT / "src", ROOT / "tools"}
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in ours]
    status = importlib.import_module("pytest").main(command)
    ended.write_text(str(int(status)))
    sys.stdout.flush()
    os._exit(status)


def killed(root: Path, mutant: Mutant) -> str:
    """Return which test caught a mutant.

    Raises:
        MutantError: none did, the patch does not apply, or the tests could not run.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copy(root, folder)
        apply(mutant, folder)
        try:
            done = pytest(folder, mutant.tests)
        except subprocess.TimeoutExpired:
            return f"stopped after {TIMEOUT_SECONDS} s"
    if done.returncode == 0:
        raise MutantError(f"SURVIVED {' '.join(mutant.tests)}")
    caught = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    if done.returncode != TESTS_FAILED or not caught:
        reason = {INTERRUPTED: "could not be collected", NO_TESTS: "do not exist"}
        last = "\n".join(done.stdout.strip().splitlines()[-8:])
        raise MutantError(f"its tests {reason.get(done.returncode, 'could not run')}:\n{last}")
    return caught[0]


def baseline(root: Path, mutants: list[Mutant]) -> str:
    """Return what is red without any mutant; nothing should be."""
    tests = tuple(sorted({test for mutant in mutants for test in mutant.tests}))
    with tempfile.TemporaryDirectory() as scratch:
        copy(root, Path(scratch))
        done = pytest(Path(scratch), tests)
    return "" if done.returncode == 0 else "\n".join(done.stdout.strip().splitlines()[-15:])


def judge(root: Path, paths: list[Path], workers: int) -> int:
    """Judge mutants, say how each fared, and return how many are not killed."""
    mutants, failed = [], 0
    for path in paths:
        try:
            mutants.append(Mutant.read(path))
        except MutantError as error:
            failed += 1
            print(f"  {path.name}: {error}", flush=True)
    if mutants and (red := baseline(root, mutants)):
        print(f"The tests are red without any mutant:\n{red}")
        return len(paths)

    def one(mutant: Mutant) -> tuple[Mutant, str, bool]:
        try:
            return mutant, killed(root, mutant), True
        except MutantError as error:
            return mutant, str(error), False

    with ThreadPoolExecutor(workers) as pool:
        for mutant, remark, good in pool.map(one, mutants):
            failed += not good
            mark = "killed by " if good else ""
            print(f"  {mutant.path.name}: {mutant.name}: {mark}{remark}", flush=True)
    return failed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("only", nargs="*", help="words of the mutants to judge")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=max(1, min(4, os.cpu_count() or 1)))
    options = parser.parse_args(arguments)
    paths = sorted((options.root / "tests" / "mutants").glob("*.patch"))
    if options.only:
        words = [word.lower() for word in options.only]
        texts = {path: (path.name + path.read_text(encoding="utf-8")).lower() for path in paths}
        paths = [path for path in paths if any(word in texts[path] for word in words)]
    if not paths:
        sys.exit("there is no such mutant in tests/mutants")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # the progress bars of the imports leave a lock behind, which is nobody's concern
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    start = time.monotonic()
    failed = judge(options.root, paths, options.workers)
    seconds = time.monotonic() - start
    print(f"{len(paths) - failed} of {len(paths)} killed ({seconds:.0f} s)")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
