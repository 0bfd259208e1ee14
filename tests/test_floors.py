"""The three floors: the method, what runs it, what is told of it; and that each stays small."""

import ast
import re
from pathlib import Path

import pytest
import tiny

FLOORS = {
    "method": sorted(tiny.ROOT.glob("vnca/*.py")),
    "program": sorted(tiny.ROOT.glob("vnca/program/*.py")),
    "report": sorted(tiny.ROOT.glob("vnca/report/*.py")),
}
METHOD = [p for p in FLOORS["method"] if p.name not in ("cpu.py", "tpu.py")]  # behind doors
STANDARD = {"collections", "functools", "inspect", "itertools", "math", "typing", "zlib"}


def imported(path):
    """The modules that a file imports anywhere in it, by their full names; of `from a import b`
    a.b, since b may be one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def is_in(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_there_are_three_floors():
    assert {path.name for path in tiny.ROOT.glob("vnca/*") if path.is_dir()} <= {
        "program", "report", "__pycache__",
    }  # fmt: skip


@pytest.mark.parametrize(
    "floor, above",
    [
        ("method", ("vnca.program", "vnca.report", "configs", "main")),
        ("program", ("vnca.report", "main")),
        ("report", ("main",)),
    ],
)
def test_a_floor_imports_nothing_from_above_it(floor, above):
    for path in FLOORS[floor]:
        assert [name for name in imported(path) if is_in(name, *above)] == [], path


@pytest.mark.parametrize("path", FLOORS["method"], ids=lambda path: path.name)
def test_the_method_is_jax_and_mathematics(path):
    known = {"vnca", "jax", "chex", *STANDARD}
    assert {name.split(".")[0] for name in imported(path)} <= known


def test_the_method_is_read_in_one_sitting():
    lines = {path.name: path.read_bytes().count(b"\n") for path in METHOD}
    assert sum(lines.values()) <= 700, lines


@pytest.mark.parametrize("path", FLOORS["method"], ids=lambda path: path.name)
def test_no_function_of_the_method_is_above_fifty_lines(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 50, node.name


def test_main_is_flags_and_one_call():
    assert (tiny.ROOT / "main.py").read_bytes().count(b"\n") <= 100


@pytest.mark.parametrize("name, most", [("README.md", 1800), ("BUILD_NOTES.md", 6000)])
def test_a_document_is_no_longer_than_its_reader_has_time_for(name, most):
    text = Path(tiny.ROOT, name).read_text(encoding="utf-8")
    if name == "BUILD_NOTES.md":  # the code of the method that it quotes does not count
        text = re.sub(r"^```python$.*?^```$", "", text, flags=re.M | re.S)
    runs = text.split()
    assert sum(any(c.isalnum() for c in run) for run in runs) <= most
