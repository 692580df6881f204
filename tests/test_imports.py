"""The package is a house whose imports run one way: what is built never feeds its own bricks."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "llm_anatomy"

# A module imports from the floors below its own, and on its own floor only where it is said here.
FLOORS = [
    {"masks", "cache", "norms", "feedforward", "positions", "weights", "tokenization"},
    {"attention"},
    {"models"},
    {"objectives", "decoding", "training", "peft", "tiny_world"},
    {"figures"},
    {"exercises"},
]
ON_ONE_FLOOR = {
    ("peft", "objectives"),  # distillation is a loss
    ("objectives", "tokenization"),
}
# What the package needs at run time. Everything else that it imports is Python's own.
THIRD_PARTY = {"einops", "jaxtyping", "safetensors", "tokenizers", "torch", "tqdm"}
FIGURES = {"IPython", "ipywidgets", "matplotlib"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The module or subpackage of a file: models/gpt.py lies in the room models."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if name in rooms)


def imported(path: Path) -> list[tuple[int, str]]:
    """Line and absolute name of everything that a file imports, wherever in the file."""
    found = []
    package = ["llm_anatomy", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            if name in ("llm_anatomy", "llm_anatomy.models", "llm_anatomy.peft"):
                found += [(node.lineno, f"{name}.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, name))
    return found


def test_every_module_has_a_floor():
    rooms = {room(path) for path in MODULES} - {"__init__"}
    assert rooms, "no module found"
    assert rooms <= set().union(*FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path):
    here = room(path)
    for line, name in imported(path):
        top, _, rest = name.partition(".")
        if top != "llm_anatomy" or not rest:
            continue
        there = rest.partition(".")[0]
        if here == "__init__":
            pytest.fail(f"{path.name}:{line} re-exports {name}; an import names its module")
        allowed = there == here or (here, there) in ON_ONE_FLOOR or floor(there) < floor(here)
        assert allowed, f"{path.name}:{line}: {here} must not import {there}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_third_party_imports_are_declared(path: Path):
    allowed = THIRD_PARTY | (FIGURES if room(path) == "figures" else set())
    for line, name in imported(path):
        top = name.partition(".")[0]
        known = top in sys.stdlib_module_names or top == "llm_anatomy"
        assert known or top in allowed, f"{path.name}:{line} imports {top}"
