"""The list of operations: it is complete, its lines are the right ones, and its sums are exact."""

import csv
import linecache
import re
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
from jax import lax
from reference import equations

from vnca.model import make_model
from vnca.program.arithmetic import forward, multiply_adds_of_gradient
from vnca.program.runs import open_run
from vnca.report import operations

SMALL = "quickstart", "small_baseline", "small_healing"
CHANGED = {"in pieces": "quickstart", "learning encoder": "small_healing"}
ALL = "doubling", "nondoubling", "baseline", *SMALL, *CHANGED
SUMS = (
    "multiply-adds as --mode=summary counts them",
    "loops of another length, gradients that nothing needs, and fast forms",
    "zeros between spread cells",
    "multiply-adds in this list",
)
CONV = "conv_general_dilated"
CALLS = {  # what a line must say where it asks for a primitive
    CONV: "conv_general_dilated",
    "dot_general": " @ ",
    "expm1": "expm1",
    "random_fold_in": "fold_in",
}
# Functions that our lines call as an argument or as a field.
BY_ANOTHER_NAME = "encode", "nca_step", "batch_gradient", "pool_gradient", "accumulate"


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


def by_hand(config):
    """The multiply-adds of one image in an update and in an evaluation with one sample: for each
    those that count, those that the program has beside them, and those on zeros."""
    model, learns = config.model, not config.train.encoder_from
    width, latent = model.encoder_width, model.latent_size
    # The encoder's five kernels of 5×5 on 32×32, 16×16 … 2×2 cells. The last four cost the same.
    first, strided = 25 * 32**2 * width, 25 * 4 * 16**2 * width * (2 * width)
    encoder = first + strided + (2 * 2 * 16 * width) * (2 * latent)
    beside = -first * learns  # there is no gradient for the image itself
    # A stride of 2 spreads its gradient's cells, and three of four cells are zeros then.
    zeros, evaluation_zeros = 3 * strided * learns, 0
    steps = mean = longest = 1
    inherits = 0
    if model.name == "doubling":  # of cells on grids of 2×2 … 32×32
        step = 1364 * model.steps_per_doubling * (9 + 8 + 1) * latent**2
    elif model.name == "baseline":  # 28×28 cells are drawn, from 32×32
        step = latent * (2 * 2 * 16 * width) + strided + 28**2 * 25 * width
        beside += (32**2 - 28**2) * 25 * width
        evaluation_zeros = 3 * strided
        zeros += 2 * evaluation_zeros  # forward, and in the gradient of the kernel
    else:
        least, most = model.train_steps
        steps, mean, longest = model.steps, (least + most + 1) // 2, max(model.steps, most)
        step = 32**2 * 10 * latent**2
    if model.name == "healing":
        kept = 4 * model.position_waves + latent
        step = 32**2 * model.hidden * (9 * model.channels + model.channels - kept)
        inherits = 32**2 * 9 * (kept + 1) ** 2  # of which there is no gradient

    def update(steps):
        return (3 if learns else 1) * encoder + steps * (3 * step + inherits)

    beside += update(longest) - update(mean)
    return {
        "update": (update(mean), beside, zeros),
        "evaluation": (encoder + steps * (step + inherits), 0, evaluation_zeros),
    }


@pytest.mark.parametrize("program", ["update", "evaluation"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in SMALL)) for n in ALL]
)
def test_the_sum_is_that_of_the_summary_and_every_difference_is_exact(name, program):
    images = config(name).train.batch_size if program == "update" else 1
    parts = [images * n for n in by_hand(config(name))[program]]
    assert total(rows_of(name, program)) == sum(parts)
    text = listed(name)[1].split(f"\n{program}: ")[1]
    for n, words in zip([*parts, sum(parts)], SUMS, strict=True):
        assert f"\n{n:>20,}  {words}" in text.split("largest")[0]


def test_what_is_behind_a_stop_gradient_does_not_count_in_the_backward_pass():
    def product(a, b):
        return a @ b

    def with_one_side_stopped(a, b):
        return lax.stop_gradient(a) @ b

    def stopped(a, b):
        return lax.stop_gradient(a @ b)

    sides = np.ones((3, 4), np.float32), np.ones((4, 5), np.float32)
    for f, times in (product, 3), (with_one_side_stopped, 2), (stopped, 1):
        assert multiply_adds_of_gradient(f, *sides) == times * (3 * 4 * 5), f


def test_a_convolution_is_listed_with_its_shapes_bytes_and_lines():
    first = next(row for row in rows_of("baseline") if row["primitive"] == CONV)
    assert first["shapes"] == "float32[32,32,32,1], float32[5,5,1,32] → float32[32,32,32,32]"
    assert first["multiply_adds"] == 32**3 * 25 * 32
    assert first["bytes"] == 4 * (32**3 + 25 * 32 + 32**4)
    functions = [line.split()[1] for line in first["lines"].split(" < ")]
    assert functions[:2] == ["conv", "encode"] and functions[-1] == "one_update"


@pytest.mark.parametrize("name", ["quickstart", "small_healing"])
def test_every_operation_of_the_program_is_listed(name, tmp_path):
    run = open_run(config(name), tmp_path, "operations")
    jaxpr = operations.traced_update(run.learner, run.config, 60_000)
    calls = "jit", "pjit", "scan", "while", "cond", "custom_jvp_call"
    names = (e.primitive.name for e in equations(jaxpr))
    wanted = Counter(made for made in names if made not in calls)
    found = Counter(row["primitive"] for row in rows_of(name))
    assert not found - wanted
    assert (wanted - found).total() <= 2  # of loops, the conditions; of scatters, how they combine


def test_all_but_the_forward_pass_is_marked_as_backward():
    counts = forward(make_model(config("quickstart").model))
    of_batch = 16 * (counts.encode + counts.decode)
    assert total(row for row in rows_of("quickstart") if not row["direction"]) == of_batch


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
    made = config("small_baseline")
    rows, text = written(made, tmp_path, plain=plain)
    files = {row["lines"].split(":")[0] for row in rows if row["primitive"] == CONV}
    assert files == {f"vnca/{layers}"}
    beside = made.train.batch_size * by_hand(made)["update"][1]  # of the plain method
    assert (f"{beside:>20,}  {SUMS[1]}" in text) == (plain is None)


def test_a_pool_that_training_refuses_is_refused(tmp_path):
    for size in 28, 60_008:  # less than a batch, and more than there are images
        run = open_run(tiny.config("nondoubling", train__pool_size=size), tmp_path, "operations")
        assert f"config.train.pool_size={size}" in tiny.fault_of(operations.operations, run)
    assert not [*tmp_path.glob("operations*")]
