"""The list of operations: it is complete, its lines are the right ones, and its sums are exact."""

import csv
import linecache
import re
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import tiny
from reference import equations

from vnca.program import arithmetic
from vnca.program.arithmetic import evaluation_multiply_adds, update_multiply_adds
from vnca.program.runs import open_run
from vnca.report import operations

SMALL = "quickstart", "small_baseline", "small_nondoubling"
CHANGED = {"in pieces": "quickstart", "learning encoder": "small_nondoubling"}
ALL = "doubling", "nondoubling", "baseline", *SMALL, *CHANGED
COUNTS = {"update": update_multiply_adds, "evaluation": evaluation_multiply_adds}
CONV = "conv_general_dilated"
CALLS = {  # what a line must say where it asks for a primitive
    CONV: "conv_general_dilated",
    "dot_general": " @ ",
    "expm1": "expm1",
    "random_fold_in": "fold_in",
}
# Functions that our lines call as an argument or as a field.
BY_ANOTHER_NAME = "encode", "nca_step", "batch_gradient", "healing_gradient", "accumulate"


def written(config, workdir, **flags):
    """The rows of operations.csv, and the text, of a run of the mode."""
    operations.operations(open_run(config, workdir, "operations", **flags))
    table = (workdir / "operations.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(table.splitlines()))
    for row in rows:
        row |= {name: int(row[name]) for name in ("times", "multiply_adds", "bytes")}
    return rows, (workdir / "operations.txt").read_text(encoding="utf-8")


def config(name):
    """A committed config, or one of two that are changed."""
    made = tiny.committed(CHANGED.get(name, name))
    if name == "in pieces":
        made.train.micro_batch = 4
    if name == "learning encoder":
        made.train.encoder_from = None
    return made


@cache
def listed(name):
    """As `written`, for a config of that name."""
    with tempfile.TemporaryDirectory() as folder:
        return written(config(name), Path(folder))


def rows_of(name, program="update"):
    return [row for row in listed(name)[0] if row["program"] == program]


def total(rows):
    return sum(row["multiply_adds"] for row in rows)


@pytest.mark.parametrize("program", COUNTS)
@pytest.mark.parametrize("name", ALL)
def test_the_sum_is_that_of_the_summary_and_every_difference_is_exact(name, program):
    counted, differences = COUNTS[program](config(name))
    assert total(rows_of(name, program)) == counted + sum(differences.values())
    text = listed(name)[1]
    assert all(f"{n:,}  {why}" in text for why, n in differences.items())


def test_a_convolution_is_listed_with_its_shapes_bytes_and_lines():
    first = next(row for row in rows_of("baseline") if row["primitive"] == CONV)
    assert first["shapes"] == "float32[32,32,32,1], float32[5,5,1,32] → float32[32,32,32,32]"
    assert first["multiply_adds"] == 32**3 * 25 * 32
    assert first["bytes"] == 4 * (32**3 + 25 * 32 + 32**4)
    functions = [line.split()[1] for line in first["lines"].split(" < ")]
    assert functions[:2] == ["conv", "encode"] and functions[-1] == "one_update"


@pytest.mark.parametrize("name", ["quickstart", "small_nondoubling"])
def test_every_operation_of_the_program_is_listed(name, tmp_path):
    run = open_run(config(name), tmp_path, "operations")
    jaxpr = operations.traced_update(run.method, run.config, 60_000)
    calls = "jit", "pjit", "scan", "while", "cond", "custom_jvp_call"
    names = (e.primitive.name for e in equations(jaxpr))
    wanted = Counter(made for made in names if made not in calls)
    found = Counter(row["primitive"] for row in rows_of(name))
    assert not found - wanted
    assert (wanted - found).total() <= 2  # of loops, the conditions; of scatters, how they combine


def test_all_but_the_forward_pass_is_marked_as_backward():
    forward = 16 * sum(arithmetic.operations(config("quickstart").model).values())
    assert total(row for row in rows_of("quickstart") if not row["direction"]) == forward


def test_loops_are_multiplied_out():
    products = [row for row in rows_of("in pieces") if row["primitive"] == "dot_general"]
    assert {row["times"] for row in products} == {4, 4 * 4}
    # Of a condition's branches, all but the longest.
    assert 0 in {row["times"] for row in rows_of("nondoubling")}


@pytest.mark.parametrize("name", SMALL)
def test_every_line_exists_and_holds_the_call(name):
    checked = Counter()
    for row in [*rows_of(name), *rows_of(name, "evaluation")]:
        asked = not row["direction"] or row["primitive"] in (CONV, "dot_general")
        called = CALLS.get(row["primitive"], "") if asked else ""
        checked[called] += 1
        for place in row["lines"].split(" < "):
            file, number, function = re.split("[: ]", place)
            assert not file.startswith("vnca/report/")
            if called not in BY_ANOTHER_NAME:
                assert called in linecache.getline(str(tiny.ROOT / file), int(number)), row
            called = "" if "." in function else function
    assert checked[CONV] >= 10 and checked["fold_in"] >= 2


def test_the_text_holds_what_the_table_holds_and_names_the_largest_lines():
    rows, text = listed("small_baseline")
    wanted = [" ".join(map(str, row.values())).replace(",", "").split()[1:] for row in rows]
    text = text.replace(",", "")
    assert [line.split() for line in text.splitlines() if "→" in line] == wanted
    sums = Counter()
    for row in rows_of("small_baseline"):
        sums[*row["lines"].split(" < ")[:2], row["direction"]] += row["multiply_adds"]
    [((line, caller, direction), most)] = sums.most_common(1)
    first = text.split("largest")[1].splitlines()[1]
    assert first.split() == f"{most} {line} < {caller} {direction}".split()


@pytest.mark.parametrize(("plain", "layers"), [(None, "layers.py"), (False, "fast/cpu.py")])
def test_the_plain_method_is_listed_unless_the_fast_one_is_asked_for(plain, layers, tmp_path):
    rows, text = written(config("small_baseline"), tmp_path, plain=plain)
    files = {row["lines"].split(":")[0] for row in rows if row["primitive"] == CONV}
    assert files == {f"vnca/{layers}"}
    assert ("since this program is not that of the plain method" in text) == (plain is False)


def test_a_pool_that_training_refuses_is_refused(tmp_path):
    for size in 28, 60_008:  # less than a batch, and more than there are images
        run = open_run(tiny.config("nondoubling", train__pool_size=size), tmp_path, "operations")
        assert f"config.train.pool_size={size}" in tiny.fault_of(operations.operations, run)
    assert not [*tmp_path.glob("operations*")]
