"""Choose the learning rate of each method in the chapter that compares them, on validation data.

    python -m tools.peft_rates

The chapter states the rates; this is where they come from. The recipe is the chapter's own: its
cells with the tag `recipe` are executed, so there is no second copy of it. Every method gets the
same grid and the same two seeds, which are none of those that the chapter reports; a tie goes to
the smaller rate. It takes a few minutes.
"""

import os
from pathlib import Path
from typing import Any

import nbformat

CHAPTER = Path(__file__).resolve().parents[1] / "chapters" / "14-peft-compared.ipynb"
SEEDS = (100, 101)


def recipe(path: Path = CHAPTER) -> dict[str, Any]:
    """What the chapter's cells with the tag `recipe` define."""
    os.environ["TQDM_DISABLE"] = "1"
    scope: dict[str, Any] = {"__name__": "__main__"}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and "recipe" in cell.metadata.get("tags", ()):
            exec(compile(cell.source, str(path), "exec"), scope)
    return scope


def sweep(scope: dict[str, Any], name: str, seeds: tuple[int, ...] = SEEDS) -> dict[float, float]:
    """Mean validation accuracy of a method at each rate of the chapter's grid."""
    return {
        rate: sum(
            scope["accuracy"](scope["tuned"](name, rate, seed), scope["validation"])
            for seed in seeds
        )
        / len(seeds)
        for rate in scope["GRID"]
    }


def best(means: dict[float, float]) -> float:
    """The rate with the largest mean, the smallest of several."""
    return max(sorted(means), key=means.__getitem__)


def main() -> None:
    scope = recipe()
    print("method          " + "".join(f"{rate:8.4g}" for rate in scope["GRID"]) + "   best")
    for name in scope["METHODS"]:
        means = sweep(scope, name)
        row = "".join(f"{100 * mean:8.1f}" for mean in means.values())
        print(f"{name:16}{row}   {best(means):g}", flush=True)


if __name__ == "__main__":
    main()
