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


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook):
    """How many pictures its outputs hold."""
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
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
def test_the_notebook_runs_from_top_to_bottom(monkeypatch, notebook):
    monkeypatch.setenv("VNCA_SHORT", "1")
    committed = pictures(notebook)
    run(notebook)
    assert pictures(notebook) == committed
    checks = [texts(cell) for tag, (_, cell) in tagged(notebook).items() if "check" in tag]
    assert [text.startswith("This checks the folded") for text in checks] == [True] * 8


def test_the_sources_that_it_shows_are_those_of_the_package(notebook):
    shown = 0
    for cell in notebook.cells:
        for names in re.findall(r"^source\(([^:]*)\)$", cell.source, re.M):
            paths = re.findall(r"(\w+)\.(\w+)", names)
            functions = [getattr(import_module(f"vnca.{path[0]}"), path[1]) for path in paths]
            [output] = cell.outputs
            assert output.data["text/plain"] == "\n\n".join(map(getsource, functions)).strip()
            shown += len(functions)
    assert shown > 15


def test_the_page_that_it_shows_is_that_of_the_package(notebook):
    (cell,) = (cell for cell in notebook.cells if "play.page" in cell.source)
    shown = html.unescape(cell.outputs[-1].data["text/html"])
    code = play.TEMPLATE.read_text(encoding="utf-8").partition('<script id="automaton">')[2]
    assert code and code in shown and play.STYLE.read_text(encoding="utf-8") in shown


@pytest.mark.slow
def test_each_exercise_has_a_check_that_a_wrong_answer_fails(notebook):
    cells = tagged(notebook)
    first, _ = cells["exercise-1"]
    checks = {n: cells[f"check-{n}"][1] for n in WRONG}
    # As the section says, its own first cell and the notebook's are all that is needed.
    notebook.cells = [*code_of(notebook)[:2], notebook.cells[first - 2]]
    for n, check in checks.items():
        wrong = nbformat.v4.new_code_cell(f"{WRONG[n][0]}\n\n\nanswer_{n} = None")
        check.source = re.sub(r"chosen\(\w+,", "chosen(wrong,", check.source)
        notebook.cells += [wrong, check]
    run(notebook, allow_errors=True)
    for n, check in checks.items():
        [error] = [o for o in check.outputs if o.output_type == "error"]
        assert texts(check).startswith("This checks your function.")
        assert error.ename == "AssertionError" and WRONG[n][1] in error.evalue, (n, error.evalue)


def test_each_exercise_has_a_question_a_folded_answer_and_a_check(notebook):
    cells = tagged(notebook)
    assert [*cells] == [f"{kind}-{n}" for n in WRONG for kind in ("exercise", "answer", "check")]
    for n in WRONG:
        at, exercise = cells[f"exercise-{n}"]
        assert re.match(rf"### {n}\. .* \({DURATION}\)\n\n", notebook.cells[at - 1].source)
        assert notebook.cells[at + 1].source.startswith("<details><summary>Answer</summary>\n\n")
        assert exercise.source.endswith("raise NotImplementedError")
        hidden = cells[f"answer-{n}"][1].metadata  # in Jupyter and in Colab
        assert hidden["jupyter"] == {"source_hidden": True} and hidden["cellView"] == "form"
        assert texts(cells[f"check-{n}"][1]).startswith("This checks the folded answer.")


def test_all_that_the_notebook_imports_and_uses_of_it_exists(notebook):
    names = {}
    tree = ast.parse("\n".join(cell.source for cell in code_of(notebook)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(ast.unparse(node), names)
    uses = [x for x in ast.walk(tree) if isinstance(x, ast.Attribute) and hasattr(x.value, "id")]
    modules = {name for name, of in names.items() if isinstance(of, types.ModuleType)}
    found = {(use.value.id, use.attr) for use in uses if use.value.id in modules}
    assert len(found) > 20
    assert not [use for use in found if not hasattr(names[use[0]], use[1])]


def test_the_notebook_is_committed_with_all_its_outputs(notebook):
    code = code_of(notebook)
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert pictures(notebook) >= 25
    outputs = [output for cell in code for output in cell.outputs]
    assert not [x for x in outputs if "error" in x.output_type or x.get("name") == "stderr"]
    assert not re.search(r"/(root|home|Users|tmp)/", "".join(map(texts, code)))
