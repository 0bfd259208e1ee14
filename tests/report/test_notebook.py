"""The notebook: it runs from top to bottom, and stands here with what it showed."""

import nbformat
import tiny
from nbclient import NotebookClient

PATH = tiny.ROOT / "notebook.ipynb"


def pictures(notebook):
    """How many pictures its outputs hold."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.setenv("VNCA_SHORT", "1")
    notebook = nbformat.read(PATH, as_version=4)
    committed = pictures(notebook)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tiny.ROOT}}).execute()
    assert pictures(notebook) == committed


def test_the_notebook_is_committed_with_all_its_outputs():
    notebook = nbformat.read(PATH, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(notebook) >= 25
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
