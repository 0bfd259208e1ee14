"""The notebook: it runs from top to bottom, and stands here with what it showed."""

import ast
import html
import re
import types
from importlib import import_module
from inspect import getsource

import nbformat
import pytest
import tiny
from nbclient import NotebookClient

from vnca.report import play

PATH = tiny.ROOT / "notebook.ipynb"
EXERCISES = range(1, 9)
DURATION = "(ten minutes|half an hour|an hour|an afternoon)"
WRONG = {  # for each exercise an answer that a student might give, and what the check says
    1: ("def wrong(mean, logvar): return mean, jnp.exp(logvar) - 1", "logvar is not that of"),
    2: ("def wrong(log_weights): return 0.0", "standard errors off"),
    3: ("def wrong(tree, axis): return pmean(tree, axis)", "two devices do not notice"),
    4: ("def wrong(step, key, cells): return step(cells)", "not half of them"),
    5: ("def wrong(k, row, column): return np.ones((32, 32), bool)", "the formula is wrong"),
    6: ("def wrong(updates, batch): return order.batches(1, 1, updates, batch, 300)", "the gap is"),
    7: ("def wrong(f_of_z, mean, logvar, noise): return f_of_z * noise", "is biased"),
    8: ("def wrong(mean, logvar): return np.arange(16)", "less than 99%"),
}


def pictures(notebook):
    """How many pictures its outputs hold."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def texts(cell):
    """What a code cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def tagged(notebook):
    """{tag: (index, cell)} of the cells of the exercises."""
    cells = enumerate(notebook.cells)
    return {tag: (i, cell) for i, cell in cells for tag in cell.metadata.get("tags", [])}


def run(notebook, **options):
    folder = {"metadata": {"path": tiny.ROOT}}
    NotebookClient(notebook, timeout=600, resources=folder, **options).execute()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.setenv("VNCA_SHORT", "1")
    notebook = nbformat.read(PATH, as_version=4)
    committed = pictures(notebook)
    run(notebook)
    assert pictures(notebook) == committed
    checks = [cell for tag, (_, cell) in tagged(notebook).items() if tag.startswith("check")]
    assert [texts(cell).startswith("This checks the folded") for cell in checks] == [True] * 8


def test_the_sources_that_it_shows_are_those_of_the_package():
    notebook = nbformat.read(PATH, as_version=4)
    shown = 0
    for cell in notebook.cells:
        for names in re.findall(r"^source\(([^:]*)\)$", cell.source, re.M):
            paths = re.findall(r"(\w+)\.(\w+)", names)
            functions = [getattr(import_module(f"vnca.{path[0]}"), path[1]) for path in paths]
            [output] = cell.outputs
            assert output.data["text/plain"] == "\n\n".join(map(getsource, functions)).strip()
            shown += len(functions)
    assert shown > 15


def test_the_page_that_it_shows_is_that_of_the_package():
    notebook = nbformat.read(PATH, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "play.page" in cell.source)
    shown = html.unescape(cell.outputs[-1].data["text/html"])
    code = play.TEMPLATE.read_text(encoding="utf-8").partition('<script id="automaton">')[2]
    assert code and code in shown and play.STYLE.read_text(encoding="utf-8") in shown


@pytest.mark.slow
def test_each_exercise_has_a_check_that_a_wrong_answer_fails():
    notebook = nbformat.read(PATH, as_version=4)
    cells = tagged(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    first, _ = cells["exercise-1"]
    setup = [*code[:2], notebook.cells[first - 2]]  # as the section says, nothing else is needed
    checks = {n: cells[f"check-{n}"][1] for n in EXERCISES}
    notebook.cells = [*setup]
    for n in EXERCISES:
        wrong = nbformat.v4.new_code_cell(f"{WRONG[n][0]}\n\n\nanswer_{n} = None")
        checks[n].source = re.sub(r"chosen\(\w+,", "chosen(wrong,", checks[n].source)
        notebook.cells += [wrong, checks[n]]
    run(notebook, allow_errors=True)
    for n in EXERCISES:
        assert texts(checks[n]).startswith("This checks your function."), n
        errors = [o for o in checks[n].outputs if o.output_type == "error"]
        assert [error.ename for error in errors] == ["AssertionError"], n
        assert WRONG[n][1] in errors[0].evalue, errors[0].evalue


def test_the_last_section_has_eight_exercises_each_with_an_answer_and_a_check():
    notebook = nbformat.read(PATH, as_version=4)
    cells = tagged(notebook)
    kinds = ("exercise", "answer", "check")
    assert [*cells] == [f"{kind}-{n}" for n in EXERCISES for kind in kinds]
    sections = re.findall(r"^## (.*)", "\n".join(c.source for c in notebook.cells), re.M)
    assert sections[-3:] == ["Exercises", "References", "Licences and restrictions"]
    for n in EXERCISES:
        (at, exercise), (_, answer), (_, check) = (cells[f"{kind}-{n}"] for kind in kinds)
        question, words = notebook.cells[at - 1], notebook.cells[at + 1]
        assert re.match(rf"### {n}\. .* \({DURATION}\)\n\n", question.source)
        (function,) = ast.parse(exercise.source).body
        assert ast.get_docstring(function)
        assert ast.unparse(function.body[-1]) == "raise NotImplementedError"
        assert words.source.startswith("<details><summary>Answer</summary>\n\n")
        assert words.source.endswith("\n\n</details>")
        assert answer.metadata["jupyter"] == {"source_hidden": True}  # in Jupyter
        assert answer.metadata["cellView"] == "form"  # in Colab
        assert answer.source.startswith(f"# @title Answer {n}\n")
        assert f"chosen({function.name}, answer_{n})" in check.source
        assert "assert" in check.source
        assert texts(check).startswith("This checks the folded answer.")


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
    assert not re.search(r"/(root|home|Users|tmp)/", "".join(map(texts, code)))
