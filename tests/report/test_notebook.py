"""The notebook: it runs from top to bottom, and stands here with what it showed."""

import html
import re
from importlib import import_module
from inspect import getsource

import nbformat
import pytest
import tiny
from nbclient import NotebookClient

from vnca.report import play

PATH = tiny.ROOT / "notebook.ipynb"
WRONG = [  # for each exercise an answer that a student might give, and what the check says
    ("def wrong(mean, logvar): return mean, jnp.exp(logvar) - 1", "logvar is not that of"),
    ("def wrong(log_weights): return 0.0", "standard errors off"),
    ("def wrong(tree, axis): return pmean(tree, axis)", "two devices do not notice"),
    ("def wrong(step, key, cells): return step(cells)", "not half of them"),
    ("def wrong(k, row, column): return np.ones((32, 32), bool)", "the formula is wrong"),
    ("def wrong(updates, batch): return order.batches(1, 1, updates, batch, 300)", "the gap is"),
    ("def wrong(f_of_z, mean, logvar, noise): return f_of_z * noise", "is biased"),
    ("def wrong(mean, logvar): return np.arange(16)", "less than 99%"),
]


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook):
    """How many pictures its outputs hold."""
    return str(outputs(notebook)).count("'image/png': ")


def run(notebook, **options):
    NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": tiny.ROOT}}, **options
    ).execute()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(monkeypatch, notebook):
    monkeypatch.setenv("VNCA_SHORT", "1")
    committed = pictures(notebook)
    run(notebook)
    assert pictures(notebook) == committed


def test_the_sources_that_it_shows_are_those_of_the_package(notebook):
    shown = {cell.source.partition("\nsource(")[2]: cell for cell in notebook.cells}
    shown |= {cell.source: cell for cell in notebook.cells if cell.source.startswith("source(")}
    shown.pop("")
    assert len(shown) > 4
    for call, cell in shown.items():
        sources = [
            getsource(getattr(import_module(f"vnca.{module}"), name))
            for module, name in re.findall(r"(?:vnca\.)?([\w.]+)\.(\w+)", call)
        ]
        assert cell.outputs[0].data["text/plain"] == "\n\n".join(sources).strip()


def test_the_page_that_it_shows_is_that_of_the_package(notebook):
    [cell] = [cell for cell in notebook.cells if "play.page" in cell.source]
    shown = html.unescape(cell.outputs[-1].data["text/html"])
    assert play.TEMPLATE.read_text("utf-8").split('<script id="automaton">')[1] in shown


@pytest.mark.slow
def test_each_exercise_has_a_check_that_a_wrong_answer_fails(notebook):
    code = code_of(notebook)
    # As the section says, its own first cell and the notebook's are all that is needed.
    *_, first = (cell for cell in code if not cell.metadata.get("tags"))
    checks = [cell for cell in code if "check" in str(cell.metadata)]
    notebook.cells = [*code[:2], first]
    for check, (wrong, _) in zip(checks, WRONG, strict=True):
        check.source = re.sub(r"chosen\(\w+, \w+", "chosen(wrong, None", check.source)
        notebook.cells += [nbformat.v4.new_code_cell(wrong), check]
    run(notebook, allow_errors=True)
    errors = [output for output in outputs(notebook) if output.output_type == "error"]
    for error, (_, words) in zip(errors, WRONG, strict=True):
        assert words in error.evalue


def test_each_exercise_has_a_question_a_folded_answer_and_a_check(notebook):
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    assert tags == [f"{kind}-{n}" for n in range(1, 9) for kind in ("exercise", "answer", "check")]
    text = str(notebook.cells)
    for words in (
        r'"""\n    raise NotImplementedError',
        "<details><summary>Answer</summary>",
        "'cellView': 'form'",  # it is hidden in Colab
        "'source_hidden': True",  # and in Jupyter
    ):
        assert text.count(words) == len(WRONG)


def test_the_notebook_is_committed_with_all_its_outputs(notebook):
    code = code_of(notebook)
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert pictures(notebook) >= 25
    printed = "".join(output.get("text", "") for output in outputs(notebook))
    assert printed.count("This checks the folded answer.") == len(WRONG)
    assert not re.search("'(error|stderr)'", str(outputs(notebook)))
    assert not re.search(r"/(root|home|Users|tmp)/", printed)
