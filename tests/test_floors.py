"""The four floors: the method, its fast forms, the program and the report.

A floor may import from itself and from the floors below it. The method is the lowest.
"""

import ast
import importlib
import json
import re
import sys

import pytest
import tiny

MODELS = sorted(tiny.ROOT.glob("vnca/models/*.py"))
FLOORS = {
    # The page imports nothing of the package, and has rules of its own: test_one_page.py.
    "method": sorted({*tiny.ROOT.glob("vnca/*.py"), *MODELS} - {tiny.ROOT / "vnca/one_page.py"}),
    "fast": sorted(tiny.ROOT.glob("vnca/fast/*.py")),
    "program": sorted(tiny.ROOT.glob("vnca/program/*.py")),
    "report": sorted(tiny.ROOT.glob("vnca/report/*.py")),
}
PACKAGES = {floor: "vnca" if floor == "method" else f"vnca.{floor}" for floor in FLOORS}
PACKAGE = [path for paths in FLOORS.values() for path in paths]
every_method_file = pytest.mark.parametrize(
    "path", FLOORS["method"], ids=lambda path: f"{path.parent.name}/{path.name}"
)


def text_of(path):
    return path.read_text(encoding="utf-8")


def nodes(path, *kinds):
    return [node for node in ast.walk(ast.parse(text_of(path))) if isinstance(node, kinds)]


def is_in(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# ---- Who imports whom ------------------------------------------------------------------------


def test_there_are_four_floors():
    folders = {path.name for path in tiny.ROOT.glob("vnca/*") if path.is_dir()}
    assert folders - {"__pycache__"} == set(FLOORS) - {"method"} | {"models"}
    assert all(FLOORS.values())


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_nothing_from_above_it(floor):
    floors = list(FLOORS)
    above = [PACKAGES[other] for other in floors[floors.index(floor) + 1 :]] + ["main"]
    if floor in ("method", "fast"):
        above.append("configs")
    for path in FLOORS[floor]:
        assert [name for name in tiny.imported(text_of(path)) if is_in(name, *above)] == [], path


def test_the_walk_through_the_program_names_each_of_its_files_and_nothing_that_is_not_there():
    walk = ast.get_docstring(ast.parse(text_of(tiny.ROOT / "vnca/program/__init__.py")))
    files = {path.stem for path in FLOORS["program"]} - {"__init__"}
    steps = re.findall(r"(?m)^- (\w+): (.+)", walk)
    named = {step for step, _ in steps} | {n for _, text in steps for n in re.findall(r"\w+", text)}
    assert {step for step, _ in steps} <= files <= named
    for module, name in re.findall(r"`(\w+)\.(\w+)`", walk):
        assert hasattr(importlib.import_module(f"vnca.program.{module}"), name), name
    for path in re.findall(r"[\w/]+\.py", walk):
        assert (tiny.ROOT / path).exists(), path


def test_readme_names_the_files_of_all_calls_of_pmap():
    calls = {
        str(path.relative_to(tiny.ROOT)): len(found)
        for path in PACKAGE
        if (found := [c for c in nodes(path, ast.Call) if ast.unparse(c.func).endswith("pmap")])
    }
    [row] = re.findall(r"(?m)^\| `jax.pmap` \| (.+)$", text_of(tiny.ROOT / "README.md"))
    assert {*re.findall(r"\((vnca/[\w/.]+)\)", row)} == calls.keys()
    assert row.startswith("six calls") and sum(calls.values()) == 6


def anchors(text):
    """The addresses that GitHub gives to the headings of a Markdown text."""
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "BUILD_NOTES.md", "notebook.ipynb"])
def test_every_link_within_the_project_leads_somewhere(name):
    text = text_of(tiny.ROOT / name)
    if name.endswith(".ipynb"):
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
    links = re.findall(r"\]\(([^):\s]*)\)", text)
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        assert (tiny.ROOT / path).exists(), link
        assert not anchor or anchor in anchors(text_of(tiny.ROOT / path) if path else text), link


@every_method_file
def test_no_file_of_the_method_imports_a_model_but_make_model_the_one_that_the_config_names(path):
    imported = [name for name in tiny.imported(text_of(path)) if is_in(name, "vnca.models")]
    # A model may build upon another one: clipped is doubling with another encoder.
    builds_upon = ["vnca.models.doubling"] if path.name == "clipped.py" else []
    assert {*imported} - {"vnca.models"} <= {*builds_upon} and bool(imported) == bool(builds_upon)
    by_name = [call for call in map(ast.unparse, nodes(path, ast.Call)) if "import_mod" in call]
    if path.name == "model.py":
        (make_model,) = [f for f in nodes(path, ast.FunctionDef) if f.name == "make_model"]
        assert by_name.pop() in ast.unparse(make_model)
    assert by_name == []


@every_method_file
def test_the_method_imports_jax_numpy_chex_and_the_standard_library_alone(path):
    known = {"vnca", "jax", "numpy", "chex", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in tiny.imported(text_of(path))} <= known


# ---- The method is plain ---------------------------------------------------------------------

FAST = (
    "platform_dependent", "custom_vjp", "custom_jvp", "device_kind", "jax.devices",
    "default_backend", "with_layout_constraint",
)  # fmt: skip


@every_method_file
def test_the_method_names_nothing_that_makes_a_platform_fast(path):
    assert [word for word in FAST if word in text_of(path)] == []


@every_method_file
def test_the_method_has_no_decorators_but_those_of_jax_and_lru_cache(path):
    for node in nodes(path, ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef):
        for decorator in map(ast.unparse, node.decorator_list):
            assert re.match(r"(jax\.|partial\(jax\.|lru_cache$)", decorator), decorator


MUTABLE = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
MAKERS = {"dict", "list", "set", "defaultdict", "Counter", "deque", "bytearray"}


def made_mutable(value):
    """Whether an expression makes an object that can be changed in place."""
    name = ast.unparse(value.func).split(".")[-1] if isinstance(value, ast.Call) else None
    return isinstance(value, MUTABLE) or name in MAKERS


@pytest.mark.parametrize(
    "path", FLOORS["method"] + FLOORS["fast"], ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_the_method_and_its_fast_forms_have_no_global_that_changes(path):
    assert not nodes(path, ast.Global)
    for node in ast.parse(text_of(path)).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            assert not made_mutable(node.value), ast.unparse(node)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_file_assigns_to_a_name_of_another_module_of_the_package(path):
    own = {
        name.asname or name.name.split(".")[0]
        for node in nodes(path, ast.Import, ast.ImportFrom)
        for name in node.names
        if is_in(getattr(node, "module", None) or name.name, "vnca")
    }
    for node in nodes(path, ast.Attribute):
        if not isinstance(node.ctx, ast.Load):
            assert ast.unparse(node.value).split(".")[0] not in own, ast.unparse(node)
