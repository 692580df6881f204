"""Executed chapters are written the same on every run and machine, and faults are told."""

import base64
import copy
import io
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from tools import execute

VIEW, STATE = execute.VIEW, execute.STATE


def code(source: str, *outputs, **metadata) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(
        source, id="c", outputs=list(outputs), metadata=metadata, execution_count=1
    )


def printed(text: str, name: str = "stdout") -> nbformat.NotebookNode:
    return nbformat.v4.new_output("stream", name=name, text=text)


def notebook(*cells, **metadata) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=list(cells), metadata=metadata)


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        (printed("careful", "stderr"), "code cell 1 writes to stderr: careful"),
        (printed("<object at 0x7f00aa11bb22>"), "shows a memory address: 0x7f00aa11bb22"),
        (printed(" 50%|#####     | 5/10"), "leaves a progress bar"),
        (printed("5/10 [00:01, 3.2it/s]"), "leaves a progress bar"),
        (printed("step 1\rstep 2"), "leaves a progress bar"),
    ],
)
def test_what_no_reader_should_see_is_refused(output, fault):
    with pytest.raises(execute.NotebookError, match=fault):
        execute.inspect(notebook(code("1", output)))


def test_ordinary_outputs_are_not_refused():
    fine = [printed("0xff is 255\r\n50% of it, 3 bits/symbol\n")]
    data = {"text/plain": "1", "image/png": "x0x7f00aa11bb22"}
    fine.append(nbformat.v4.new_output("display_data", data=data))
    execute.inspect(notebook(code("1", *fine)))


def test_traces_of_the_machine_go_and_the_rest_stays():
    kernel = {"name": "mine", "display_name": "My Python", "language": "python"}
    cell = code("1", tags=["t"], execution={"iopub": "now"}, mystnb={"image": {"alt": "a"}})
    language = {"name": "python", "version": "3.12.1"}
    other = nbformat.v4.new_code_cell("2", id="d")
    made = notebook(cell, other, kernelspec=kernel, language_info=language)
    other["id"] = "c"
    execute.normalise(made, "x.ipynb")
    assert made.metadata == {"kernelspec": execute.KERNEL, "language_info": execute.LANGUAGE}
    assert made.cells[0].metadata == {"tags": ["t"], "mystnb": {"image": {"alt": "a"}}}
    assert made.cells[0].id == "c" and made.cells[1].id not in ("", "c")  # ids are unique
    again = copy.deepcopy(made)
    execute.normalise(again, "x.ipynb")
    assert nbformat.writes(again) == nbformat.writes(made)


def model(name: str, **state) -> dict:
    return {"model_name": name, "model_module": "m", "model_module_version": "1", "state": state}


def widget_notebook(prefix: str, order: int = 1) -> nbformat.NotebookNode:
    """A box with two pages and a control, linked, and a forgotten widget; ids begin with prefix."""
    ref = lambda key: f"IPY_MODEL_{prefix}{key}"  # noqa: E731
    models = {
        "box": model("VBoxModel", children=[ref("knob"), ref("a"), ref("b")], layout=ref("l1")),
        "knob": model("DropdownModel", index=0, layout=ref("l2"), style=None),
        "a": model("HTMLModel", value="A", layout=ref("l3")),
        "b": model("HTMLModel", value="B", layout=ref("l4")),
        "l1": model("LayoutModel", width="1em"),
        "l2": model("LayoutModel", width=None),
        "l3": model("LayoutModel"),
        "l4": model("LayoutModel"),
        "link": model("LinkModel", source=[ref("knob"), "index"], target=[ref("a"), "x"]),
        "stray": model("HTMLModel", value="forgotten"),
        "loose": model("LinkModel", source=[ref("stray"), "x"], target=[ref("a"), "x"]),
    }
    state = {prefix + key: models[key] for key in list(models)[::order]}
    view = {"model_id": f"{prefix}box", "version_major": 2, "version_minor": 0}
    output = nbformat.v4.new_output("display_data", data={VIEW: view, "text/plain": "box"})
    return notebook(code("box", output), widgets={STATE: {"state": state}})


def test_widgets_are_numbered_alike_on_every_run():
    first, second = widget_notebook("a1"), widget_notebook("zz", order=-1)
    for made in (first, second):
        execute.normalise(made, "x.ipynb")
    assert nbformat.writes(first) == nbformat.writes(second)


def test_only_what_is_shown_is_stored_and_equal_layouts_once():
    made = widget_notebook("a")
    execute.normalise(made, "x.ipynb")
    state = made.metadata.widgets[STATE].state
    names = sorted(each["model_name"] for each in state.values())
    assert names == [
        *("DropdownModel", "HTMLModel", "HTMLModel"),
        *("LayoutModel", "LayoutModel", "LinkModel", "VBoxModel"),
    ]
    root = state[made.cells[0].outputs[0].data[VIEW]["model_id"]]
    assert root["model_name"] == "VBoxModel"
    known = {f"IPY_MODEL_{key}" for key in state}
    assert set(root["state"]["children"]) <= known
    assert "forgotten" not in nbformat.writes(made)


def test_a_view_without_state_is_refused():
    made = widget_notebook("a")
    made.cells[0].outputs[0].data[VIEW]["model_id"] = "gone"
    with pytest.raises(execute.NotebookError, match="widget gone, whose state was not stored"):
        execute.normalise(made, "x.ipynb")


def picture(*, shade: int = 200, size: int = 20) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (shade,) * 3).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def test_pictures_are_compared_by_their_pixels():
    assert execute.same_picture(picture(), picture(shade=201))
    assert not execute.same_picture(picture(), picture(shade=120))
    assert not execute.same_picture(picture(), picture(size=21))


def test_differences_are_told():
    stored = widget_notebook("a")
    stored.cells.append(code("print(1)", printed("1")))
    execute.normalise(stored, "x.ipynb")
    assert execute.differences(stored, copy.deepcopy(stored)) == []
    fresh = copy.deepcopy(stored)
    fresh.cells[1].outputs[0].text = "2"
    assert execute.differences(stored, fresh) == ["code cell 2: stored '1', now '2'"]
    fresh.cells[1].metadata = stored.cells[1].metadata = {"tags": ["nbval-ignore-output"]}
    assert execute.differences(stored, fresh) == []
    fresh.cells[1].outputs.append(printed("3"))
    stored.cells[1].metadata = {}
    assert "1 outputs stored, 2 new" in execute.differences(stored, fresh)[0]
    fresh = copy.deepcopy(stored)
    key = next(iter(fresh.metadata.widgets[STATE].state))
    fresh.metadata.widgets[STATE].state[key].state["more"] = 1
    assert "widget state: 1 models differ" in execute.differences(stored, fresh)[0]


WIDGET = "import ipywidgets as w\nw.HTML('page')"


def save(folder: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    path = folder / "01-x.ipynb"
    nbformat.write(notebook(nbformat.v4.new_markdown_cell("# X"), *cells), path)
    return path


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "REPORT", tmp_path / "report" / "notebooks.json")
    return execute.REPORT


@pytest.mark.slow
def test_a_notebook_is_executed_written_and_found_as_stored(tmp_path, report, capsys):
    path = save(tmp_path, "a = 20", "print(a + 1)", WIDGET)
    assert execute.process(path, check=False)
    first = path.read_text()
    made = nbformat.reads(first, as_version=4)
    assert [cell.execution_count for cell in execute.code_cells(made)] == [1, 2, 3]
    assert made.cells[2].outputs[0].text == "21\n" and made.metadata.widgets[STATE].state
    assert '"seconds"' in report.read_text() and '"peak_mib"' in report.read_text()
    assert execute.process(path, check=True) and path.read_text() == first
    path.write_text(first.replace('"21\\n"', '"22\\n"'))
    with pytest.raises(SystemExit, match="1"):
        execute.main(["--check", str(path)])
    assert "DIFFERS" in capsys.readouterr().out
    assert execute.process(path, check=False) and path.read_text() == first  # byte for byte


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "said"),
    [("1 / 0", "ZeroDivisionError"), ("import sys; print('x', file=sys.stderr)", "stderr: x")],
)
def test_a_notebook_that_fails_is_not_written(tmp_path, report, capsys, source, said):
    path = save(tmp_path, source)
    before = path.read_text()
    with pytest.raises(SystemExit, match="1"):
        execute.main([str(path)])
    assert said in capsys.readouterr().out and path.read_text() == before
