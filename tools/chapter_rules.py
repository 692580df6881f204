"""The rules that a committed chapter keeps, as functions that return what is wrong.

nbval runs the cells; these rules see what nbval lets through: cells that never ran, outputs that
were stripped, pictures without a text alternative, metadata of somebody's editor, exercises that
differ from the package. tests/test_notebooks.py applies them to every chapter.
"""

import ast
import copy
import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import nbformat

import llm_anatomy.exercises
from llm_anatomy.exercises._engine import Chapter, Exercise
from tools import execute

MAX_CELLS = 60
MAX_IGNORED_SHARE = 0.03

LOCAL_PATH = re.compile(
    r"(?<![\w.:/])/(?:home|Users|root|tmp|work|mnt|private|var)/\w|\b[A-Z]:\\\w"
)
CELL_PATH = re.compile(r"ipykernel_\d+|<ipython-input-")
TIMESTAMP = re.compile(r"\b20\d\d-[01]\d-[0-3]\d[T ][0-2]\d:[0-5]\d")
COMMENT_MARK = re.compile(r"^\s*#\s*(NBVAL_\w+|PYTEST_VALIDATE_IGNORE_OUTPUT)", re.MULTILINE)
SHOWING = {"print", "display", "check", "hint", "solution", "exercises", "show"}
MARKDOWN_IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<target>[^)\s]+)")
DIRECTIVE = re.compile(
    r"^(?P<fence>`{3,}|:{3,})\{(?P<name>[\w:-]+)\} *(?P<title>.*)\n"
    r"(?P<body>(?:.*\n)*?)(?P=fence) *$",
    re.MULTILINE,
)
EXERCISE_LINE = re.compile(r"^(?P<dots>[●○] [●○] [●○]) · (?P<minutes>\d+) minutes?$", re.MULTILINE)
OPTION = re.compile(
    r'<details class="quiz">\s*<summary>(?P<label>.*?)</summary>(?P<text>.*?)</details>', re.DOTALL
)


def faults(notebook: nbformat.NotebookNode, name: str, raw: str | None = None) -> list[str]:
    """Everything that is wrong with one chapter, as sentences; empty when nothing is.

    Args:
        raw: the file's text, to see whether it stands as `make notebooks` writes it.
    """
    found = [
        *run_state(notebook),
        *outputs(notebook),
        *tags(notebook),
        *pictures(notebook),
        *private(notebook),
        *form(notebook, name, raw),
        *exercises(notebook),
        *quiz(notebook),
    ]
    return [f"{name}: {fault}" for fault in found]


def numbered(notebook: nbformat.NotebookNode) -> Iterator[tuple[int, nbformat.NotebookNode]]:
    """Code cells with their numbers, which are what their counts should be."""
    yield from enumerate(execute.code_cells(notebook), start=1)


def run_state(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Every code cell ran, once, in order, in one kernel named python3."""
    for number, cell in numbered(notebook):
        if not cell.source.strip():
            yield f"code cell {number} is empty"
        if cell.execution_count is None:
            yield f"code cell {number} was never executed"
        elif cell.execution_count != number:
            yield f"code cell {number} was executed as number {cell.execution_count}"
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield f"the kernel is {notebook.metadata.get('kernelspec', {}).get('name')!r}, not python3"


def outputs(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """No error, no stderr, no progress bar, no address, and nothing missing that was printed."""
    for number, cell in numbered(notebook):
        may_raise = "raises-exception" in cell.metadata.get("tags", ())
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if errors and not may_raise:
            yield f"code cell {number} stores the error {errors[0].ename}: {errors[0].evalue[:80]}"
        if may_raise and not errors:
            yield f"code cell {number} is tagged raises-exception and raises nothing"
        if not cell.outputs and prints(cell.source):
            yield f"code cell {number} prints, and its output was stripped"
    try:
        execute.inspect(notebook)
    except execute.NotebookError as error:
        yield from str(error).splitlines()


def prints(source: str) -> bool:
    """Whether a cell surely shows something: a call of print, check or the like, or a loop of them.

    Calls inside a function, a class or an `if` may never happen, and do not count.
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a magic
        return False
    while statements:
        statement = statements.pop()
        if isinstance(statement, ast.For | ast.With):
            statements += statement.body
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            function = statement.value.func
            name = getattr(function, "id", getattr(function, "attr", None))
            if name in SHOWING:
                return True
    return False


def tags(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """What nbval ignores is tagged on the cell, with a reason."""
    for number, cell in numbered(notebook):
        given = cell.metadata.get("tags", [])
        if "nbval-skip" in given:
            yield f"code cell {number} is skipped by nbval"
        if ignored(cell) and not str(cell.metadata.get("reason", "")).strip():
            yield f"code cell {number} ignores its output and gives no `reason`"
        if ignored(cell) and "raises-exception" in given:
            yield f"code cell {number} would pass whatever it raises"
        if mark := COMMENT_MARK.search(cell.source):
            yield f"code cell {number} uses the comment {mark[1]}; use a tag and a reason"


def ignored(cell: nbformat.NotebookNode) -> bool:
    return "nbval-ignore-output" in cell.metadata.get("tags", [])


def ignored_share(notebooks: Iterable[nbformat.NotebookNode]) -> float:
    """Share of all code cells whose output nbval does not look at."""
    cells = [cell for notebook in notebooks for _, cell in numbered(notebook)]
    return sum(map(ignored, cells)) / max(1, len(cells))


def pictures(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Every picture says in words what it shows."""
    for number, cell in numbered(notebook):
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "").strip()
        for output in cell.outputs:
            data = output.get("data", {})
            if any(kind.startswith("image/") for kind in data) and not described(alt):
                yield f"code cell {number} shows a picture without mystnb.image.alt"
            for fault in Pictures.check(data.get("text/html", "")):
                yield f"code cell {number} {fault}"
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        for image in MARKDOWN_IMAGE.finditer(cell.source):
            if not described(image["alt"]):
                yield f"the image {image['target']} has no alt text"
        for directive in DIRECTIVE.finditer(cell.source):
            if directive["name"] in ("figure", "image") and not re.search(
                r"^:alt:\s*\S", directive["body"], re.MULTILINE
            ):
                yield f"the {directive['name']} {directive['title']} has no :alt:"
        for fault in Pictures.check(cell.source):
            yield f"a markdown cell {fault}"


def described(alt: str) -> bool:
    """Whether an alt text says something: not empty, not a file name, not matplotlib's own."""
    return bool(alt.strip()) and not re.fullmatch(r"<Figure.*>|\S+\.(png|svg|jpe?g)", alt.strip())


class Pictures(HTMLParser):
    """Find pictures in HTML that have no text alternative."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    @classmethod
    def check(cls, text: str) -> list[str]:
        parser = cls()
        parser.feed(text)
        return parser.found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("aria-hidden") == "true":
            return
        if tag == "img" and not described(given.get("alt") or ""):
            self.found.append(f"has an <img> without alt text: {given.get('src', '')[:60]}")
        labelled = given.get("aria-label") or given.get("aria-labelledby")
        if tag == "svg" and given.get("role") == "img" and not labelled:
            self.found.append("has an <svg> with the role img and no label")


def private(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Nothing of the machine that ran the chapter, and no clock."""
    for position, cell in enumerate(notebook.cells, start=1):
        shown = [cell.source]
        if cell.cell_type == "code":
            shown += [text for output in cell.outputs for text in execute.texts(output)]
        for text in shown:
            for pattern, what in (
                (LOCAL_PATH, "a path of one machine"),
                (CELL_PATH, "the temporary name of a cell"),
                (TIMESTAMP, "a time stamp"),
            ):
                if match := pattern.search(text):
                    context = text[max(0, match.start() - 20) : match.end() + 30]
                    yield f"cell {position} shows {what}: {context!r}"


def form(notebook: nbformat.NotebookNode, name: str, raw: str | None) -> Iterator[str]:
    """The file is what `make notebooks` writes, begins with its one title, and is not too long."""
    count = len(notebook.cells) - exercise_cells(notebook)
    if count > MAX_CELLS:
        yield f"it has {count} cells apart from exercises, more than {MAX_CELLS}: split it"
    titles = [line for cell in notebook.cells for line in headings(cell)]
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or len(headings(first)) != 1:
        yield "its first cell does not hold the title"
    if len(titles) != 1:
        yield f"it has {len(titles)} titles of the first level: {titles}"
    tidy = copy.deepcopy(notebook)
    execute.normalise(tidy, name)
    if nbformat.writes(tidy) != nbformat.writes(notebook):
        yield "its metadata are stale; run make notebooks"
    elif raw is not None and raw != nbformat.writes(tidy) + "\n":
        yield "the file is not laid out as make notebooks writes it"


def exercise_cells(notebook: nbformat.NotebookNode) -> int:
    """How many cells are there for an exercise: its statement, its stub, its help."""
    count, after_statement = 0, False
    for cell in notebook.cells:
        names = set()
        if cell.cell_type == "markdown":
            names = {found["name"] for found in DIRECTIVE.finditer(cell.source + "\n")}
        is_stub = after_statement and cell.cell_type == "code"
        count += is_stub or bool(names & {"exercise", "exercise-help"})
        after_statement = "exercise" in names
    return count


def headings(cell: nbformat.NotebookNode) -> list[str]:
    """Titles of the first level in a Markdown cell, outside code."""
    if cell.cell_type != "markdown":
        return []
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1", "", cell.source, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^# .*$", text, re.MULTILINE)


def chapters_of_exercises() -> dict[str, Chapter]:
    """The exercise modules of the package, by the name that a learner imports."""
    modules = pkgutil.iter_modules(llm_anatomy.exercises.__path__)
    names = [module.name for module in modules if not module.name.startswith("_")]
    return {
        name: importlib.import_module(f"llm_anatomy.exercises.{name}").check.__self__
        for name in names
    }


def label(module: str, exercise: str) -> str:
    return f"ex-{module}-{exercise}".replace("_", "-")


def exercise_labels(notebook: nbformat.NotebookNode) -> list[str]:
    """Labels of the exercises that a chapter sets, in order."""
    return [
        match[1]
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for directive in DIRECTIVE.finditer(cell.source + "\n")
        if directive["name"] == "exercise"
        for match in re.finditer(r"^:label:\s*(\S+)", directive["body"], re.MULTILINE)
    ]


def exercises(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Each exercise is the package's own: statement, then stub with its check, then the help."""
    known = {
        label(module, name): (module, exercise)
        for module, chapter in chapters_of_exercises().items()
        for name, exercise in chapter.by_name.items()
    }
    for position, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown":
            continue
        for directive in DIRECTIVE.finditer(cell.source + "\n"):
            if directive["name"] != "exercise":
                continue
            given = re.search(r"^:label:\s*(\S+)", directive["body"], re.MULTILINE)
            if not given:
                yield f"the exercise {directive['title']!r} has no label"
            elif given[1] not in known:
                yield f"the exercise {given[1]} is not in the package"
            else:
                module, exercise = known[given[1]]
                after = notebook.cells[position + 1 : position + 3]
                yield from one_exercise(directive, module, exercise, after)


def one_exercise(
    directive: re.Match[str],
    module: str,
    exercise: Exercise,
    after: list[nbformat.NotebookNode],
) -> Iterator[str]:
    name = label(module, exercise.name)
    if directive["title"].strip() != exercise.title:
        yield f"{name} is titled {directive['title'].strip()!r}, in the package {exercise.title!r}"
    line = EXERCISE_LINE.search(directive["body"])
    if not line:
        yield f"{name} does not state its level and minutes"
    else:
        if line["dots"] != exercise.dots:
            yield f"{name} has the level {line['dots']}, in the package {exercise.dots}"
        if int(line["minutes"]) != exercise.minutes:
            yield f"{name} takes {line['minutes']} minutes, in the package {exercise.minutes}"
    if not after or after[0].cell_type != "code":
        yield f"{name} is not followed by its stub"
    elif after[0].source.strip() != exercise.cell(module).strip():
        yield f"{name} has another stub than the package, whose stub is the tested one"
    wanted = rf"^(`{{3,}}|:{{3,}})\{{exercise-help\}} {module} {exercise.name}\s*$"
    if len(after) < 2 or not re.search(wanted, after[1].source, re.MULTILINE):
        yield f"{name} has no {{exercise-help}} {module} {exercise.name} after its stub"


def quiz(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Each question has one right option, and every option says why."""
    for cell in notebook.cells:
        if cell.cell_type != "markdown" or "quiz" not in cell.source:
            continue
        starts = len(re.findall(r'<details class="quiz">', cell.source))
        if starts != len(list(OPTION.finditer(cell.source))):
            yield f"a quiz option is not closed, or has no summary: {cell.source[:60]!r}"
        for question, options in questions(cell.source):
            right = [o for o in options if o["text"].strip().startswith("**Right.**")]
            if len(options) < 2:
                yield f"the question {question[:60]!r} has {len(options)} options"
            elif len(right) != 1:
                yield f"the question {question[:60]!r} has {len(right)} right options"
            for option in options:
                verdict = re.match(
                    r"\n\s*\n\*\*(Right|Not this one)\.\*\*\s+(?P<why>\S.{14,})\n\s*\n$",
                    option["text"],
                    re.DOTALL,
                )
                if not verdict:
                    yield f"the option {option['label'][:60]!r} is not explained"


def questions(source: str) -> Iterator[tuple[str, list[re.Match[str]]]]:
    """Questions of a cell with their options: the options between one text and the next."""
    question, options, end = "", [], 0
    for option in OPTION.finditer(source):
        between = source[end : option.start()].strip()
        if between:
            if options:
                yield question, options
            question, options = between, []
        options.append(option)
        end = option.end()
    if options:
        yield question, options


def read(path: Path) -> tuple[nbformat.NotebookNode, str]:
    """A chapter and the text of its file."""
    raw = path.read_text(encoding="utf-8")
    return nbformat.reads(raw, as_version=4), raw
