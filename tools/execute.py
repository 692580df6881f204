"""Execute chapters in place and write them so that nothing but a real change shows up in git.

    python tools/execute.py                                 every chapter
    python tools/execute.py chapters/01-attention.ipynb     one of them
    python tools/execute.py --check                         compare with what is stored

nbval proves texts but looks neither at pictures nor at the state of widgets; `--check` does.
Seconds and peak memory of each notebook go to _build/notebooks.json.
"""

import argparse
import base64
import copy
import hashlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "_build" / "notebooks.json"
BUDGET_SECONDS = 60
BUDGET_MIB = 2048
CELL_TIMEOUT_SECONDS = 120

VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python", "pygments_lexer": "ipython3"}
CELL_METADATA = {"mystnb", "reason", "tags"}
REFERENCE = re.compile(r"^IPY_MODEL_(.+)$")
ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b", re.IGNORECASE)
PROGRESS = re.compile(r"\r(?!\n)|\d+%\|.*\||(?<![A-Za-z])(?:it/s|s/it)\b")


class NotebookError(Exception):
    """A notebook whose outputs may not be stored; the message says which cell and why."""


def execute(notebook: nbformat.NotebookNode, folder: Path) -> tuple[float, float]:
    """Run all cells with a fresh kernel in `folder`.

    Returns:
        Seconds from the start of the kernel, and the kernel's peak memory in MiB.
    """
    notebook.metadata.pop("widgets", None)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    os.environ.pop("MPLBACKEND", None)  # the kernel shows figures inline
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT_SECONDS,
        coalesce_streams=True,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    )
    start = time.monotonic()
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        client.set_widgets_metadata()
        peak = peak_mib(client.km.provisioner.pid)
    return time.monotonic() - start, peak


def peak_mib(pid: int) -> float:
    """Peak resident memory of a process, where the system records it, else the present one."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    memory = psutil.Process(pid).memory_info()
    return getattr(memory, "peak_wset", memory.rss) / 2**20


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def inspect(notebook: nbformat.NotebookNode) -> None:
    """Refuse outputs that no reader should see or that no second run would repeat.

    Raises:
        NotebookError: naming every offending cell.
    """
    faults = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                faults.append(f"code cell {number} writes to stderr: {output.text.strip()[:300]}")
            text = "".join(texts(output))
            if PROGRESS.search(text):
                faults.append(f"code cell {number} leaves a progress bar: {text.strip()[:120]!r}")
            if address := ADDRESS.search(text):
                faults.append(f"code cell {number} shows a memory address: {address[0]}")
    if faults:
        raise NotebookError("\n".join(faults))


def texts(output: nbformat.NotebookNode) -> Iterator[str]:
    """Everything textual that an output shows."""
    if output.output_type == "stream":
        yield output.text
    elif output.output_type == "error":
        yield output.evalue
    else:
        for kind, value in output.data.items():
            if isinstance(value, str) and not kind.startswith("image/"):
                yield value


def normalise(notebook: nbformat.NotebookNode, name: str) -> None:
    """Remove what differs from run to run and from machine to machine."""
    widgets = notebook.metadata.get("widgets")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": LANGUAGE})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: set[str] = set()
    for index, cell in enumerate(notebook.cells):
        identity = cell.get("id")
        if not identity or identity in seen:
            identity = hashlib.sha256(f"{name} {index}".encode()).hexdigest()[:8]
        cell["id"] = identity
        seen.add(identity)
        cell.metadata = nbformat.from_dict(
            {key: value for key, value in cell.metadata.items() if key in CELL_METADATA}
        )
    if widgets:
        state = tidy_widgets(notebook, copy.deepcopy(widgets[STATE]["state"]))
        if state:
            notebook.metadata["widgets"] = nbformat.from_dict(
                {STATE: {"state": state, "version_major": 2, "version_minor": 0}}
            )
    nbformat.validate(notebook)


def tidy_widgets(notebook: nbformat.NotebookNode, state: dict) -> dict:
    """Keep the widget models that the page shows, and number them in order of appearance.

    A layout or style that many widgets have alike is stored once: a stack of twenty frames has
    forty of them, nearly all the same.
    """
    views = [
        output.data[VIEW]
        for cell in code_cells(notebook)
        for output in cell.outputs
        if VIEW in output.get("data", {})
    ]
    reached: list[str] = []
    for view in views:
        reach(view["model_id"], state, reached)
    links = {
        key: list(references(model["state"]))
        for key, model in state.items()
        if model["model_name"] in ("LinkModel", "DirectionalLinkModel")
    }
    for key, ends in links.items():  # a link is shown by no output but moves those that are
        if key not in reached and ends and all(end in reached for end in ends):
            reached.append(key)

    linked = {end for ends in links.values() for end in ends}
    same: dict[str, str] = {}  # content of a layout or style -> the first model that has it
    rename: dict[str, str] = {}
    kept: list[str] = []
    for key in reached:
        model = state[key]
        if model["model_name"].endswith(("LayoutModel", "StyleModel")):
            model["state"] = {k: v for k, v in model["state"].items() if v is not None}
            content = json.dumps(model, sort_keys=True)
            if key not in linked and content in same:
                rename[key] = rename[same[content]]
                continue
            same.setdefault(content, key)
        rename[key] = f"{len(kept) + 1:032x}"
        kept.append(key)
    for view in views:
        view["model_id"] = rename[view["model_id"]]
    return {rename[key]: renamed(state[key], rename) for key in kept}


def reach(key: str, state: dict, reached: list[str]) -> None:
    """Append a model and everything it refers to, depth first, in a fixed order."""
    if key in reached:
        return
    if key not in state:
        raise NotebookError(f"an output shows widget {key}, whose state was not stored")
    reached.append(key)
    for other in references(state[key]["state"]):
        reach(other, state, reached)


def references(value: object) -> Iterator[str]:
    """Ids of the models that a state refers to, in the order of its sorted keys."""
    if isinstance(value, str) and (match := REFERENCE.match(value)):
        yield match[1]
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from references(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item)


def renamed(value: object, names: dict[str, str]) -> object:
    """Copy of a state that uses the new ids."""
    if isinstance(value, str) and (match := REFERENCE.match(value)):
        return f"IPY_MODEL_{names[match[1]]}"
    if isinstance(value, dict):
        return {key: renamed(item, names) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [renamed(item, names) for item in value]
    return value


def differences(stored: nbformat.NotebookNode, fresh: nbformat.NotebookNode) -> list[str]:
    """Say where a fresh run differs from what is stored; pictures are compared by their pixels."""
    found = []
    pairs = zip(code_cells(stored), code_cells(fresh), strict=True)
    for number, (old, new) in enumerate(pairs, start=1):
        if any(tag.endswith("ignore-output") for tag in old.metadata.get("tags", ())):
            continue
        if old.execution_count != new.execution_count:
            found.append(f"code cell {number}: stored count {old.execution_count}")
        if len(old.outputs) != len(new.outputs):
            counts = f"{len(old.outputs)} outputs stored, {len(new.outputs)} new"
            found.append(f"code cell {number}: {counts}")
            continue
        for before, after in zip(old.outputs, new.outputs, strict=True):
            if not same_output(before, after):
                was, now = "".join(texts(before)), "".join(texts(after))
                found.append(f"code cell {number}: stored {was[:200]!r}, now {now[:200]!r}")
    before, after = (n.metadata.get("widgets", {}) for n in (stored, fresh))
    if before != after:
        old, new = (w.get(STATE, {}).get("state", {}) for w in (before, after))
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        models = ", ".join((old.get(k) or new.get(k))["model_name"] for k in changed[:5])
        found.append(f"widget state: {len(changed)} models differ ({models}); stored {len(old)}")
    if not found and tidied(stored) != tidied(fresh):
        found.append("metadata or cells are not as `make notebooks` writes them")
    return found


def tidied(notebook: nbformat.NotebookNode) -> str:
    """Everything except outputs, as it stands in the file."""
    bare = copy.deepcopy(notebook)
    for cell in code_cells(bare):
        cell.outputs = []
    bare.metadata.pop("widgets", None)
    return nbformat.writes(bare)


def same_output(old: nbformat.NotebookNode, new: nbformat.NotebookNode) -> bool:
    if "data" not in old or "data" not in new or old.data.keys() != new.data.keys():
        return old == new
    return all(
        same_picture(value, new.data[kind]) if kind == "image/png" else value == new.data[kind]
        for kind, value in old.data.items()
    )


def same_picture(old: str, new: str) -> bool:
    """True for pictures of one size whose pixels differ by under 1 % on average (fonts may)."""
    a, b = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), dtype=float)
        for data in (old, new)
    )
    return a.shape == b.shape and bool(np.abs(a - b).mean() < 0.01 * 255)


def record(name: str, **facts: float) -> None:
    """Note the measurements of one notebook beside those of the others."""
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    known[name] = facts
    REPORT.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")


def process(path: Path, check: bool) -> bool:
    """Execute one notebook; write it, or with `check` compare it. Returns True when all is well."""
    stored = nbformat.read(path, as_version=4)
    fresh = copy.deepcopy(stored)
    label = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    print(f"{label} ... ", end="", flush=True)
    try:
        seconds, peak = execute(fresh, path.parent)
        inspect(fresh)
        normalise(fresh, path.name)
    except CellTimeoutError:
        print(f"FAILED\n  a cell ran for more than {CELL_TIMEOUT_SECONDS} s")
        return False
    except (CellExecutionError, DeadKernelError, NotebookError) as error:
        print("FAILED\n" + "\n".join("  " + line for line in str(error).splitlines()))
        return False
    record(path.name, seconds=round(seconds, 1), peak_mib=round(peak), cells=len(fresh.cells))
    over = ""
    if seconds > BUDGET_SECONDS or peak > BUDGET_MIB:
        over = f" (over the budget of {BUDGET_SECONDS} s and {BUDGET_MIB} MiB)"
    print(f"{seconds:.1f} s, {peak:.0f} MiB{over}", end="")
    if check:
        found = differences(stored, fresh)
        print(", as stored" if not found else ", DIFFERS")
        for line in found:
            print("  " + line)
        return not found
    text = nbformat.writes(fresh) + "\n"
    changed = path.read_text(encoding="utf-8") != text
    if changed:
        path.write_text(text, encoding="utf-8", newline="\n")
    print(", written" if changed else ", unchanged")
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of chapters/ unless given")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    paths = [path.resolve() for path in options.notebooks]
    paths = paths or sorted((ROOT / "chapters").glob("*.ipynb"))
    if not paths:
        sys.exit("there is no notebook in chapters/")
    results = [process(path, options.check) for path in paths]
    good = sum(results)
    print(f"{good} of {len(results)} notebooks {'are as stored' if options.check else 'executed'}")
    sys.exit(0 if good == len(results) else 1)


if __name__ == "__main__":
    main()
