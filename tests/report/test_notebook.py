"""The notebook: it runs from top to bottom, and stands here with what it showed."""

import ast
import types

import nbformat
import pytest
import tiny
from nbclient import NotebookClient

PATH = tiny.ROOT / "notebook.ipynb"


def pictures(notebook):
    """How many pictures its outputs hold."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.setenv("VNCA_SHORT", "1")
    notebook = nbformat.read(PATH, as_version=4)
    committed = pictures(notebook)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tiny.ROOT}}).execute()
    assert pictures(notebook) == committed


def test_all_that_the_notebook_imports_and_uses_of_it_exists():
    notebook, names, used = nbformat.read(PATH, as_version=4), {}, 0
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    code = [line for cell in cells for line in cell.splitlines() if line[:1] not in "%!"]
    tree = ast.parse("\n".join(code))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(ast.unparse(node), names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            if isinstance(module, types.ModuleType):
                used += 1
                assert hasattr(module, node.attr), ast.unparse(node)
    assert used > 20


def test_the_notebook_is_committed_with_all_its_outputs():
    notebook = nbformat.read(PATH, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(notebook) >= 25
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
