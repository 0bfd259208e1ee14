"""Every primitive operation of one training update, and of one sample of an evaluation, as text.

JAX does not document the source information in a jaxpr: the traceback of an equation, and its name
stack, which marks the backward pass.
"""

import csv
import io
from collections import Counter
from functools import partial
from inspect import unwrap
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from vnca.program.arithmetic import (
    evaluation_flops,
    inner_jaxprs,
    multiply_adds,
    update_flops,
    work,
)
from vnca.program.data import training_images
from vnca.program.evaluate import estimator
from vnca.program.learner import param_shapes, stored_shapes, update_shapes
from vnca.program.machine import check_batch, check_images, is_first
from vnca.program.stop import say
from vnca.program.store import write
from vnca.training import one_update

PACKAGE = Path(__file__).parents[1]
LEGEND = """\
Each primitive operation of the program that JAX traces, in its order. "times": how often it runs,
all loops multiplied out. Of a loop of unknown length one turn counts, and of a condition the branch
with the most multiply-adds. Multiply-adds are those of products and convolutions: each kernel tap,
also on padding and on zeros between spread cells. Bytes are those of all operands and results. The
line is ours that asked for the operation, and those after < are of its callers. In the backward
pass it is the forward line that the operation belongs to."""
TITLES = "    times     multiply-adds             bytes           operation"
FORM = "{:>9,} {:>17,} {:>17,} {:8} {} {}  {}"


class Operation(NamedTuple):
    """A primitive operation. Its multiply-adds and bytes are those of all its executions."""

    times: int  # how often it runs, all loops multiplied out
    multiply_adds: int  # of products and convolutions; all kernel taps, also on padding and zeros
    bytes: int  # of all operands and results
    direction: str  # "backward" in the backward pass, else ""
    primitive: str
    shapes: str  # dtypes and shapes of the operands, "→", and those of the results
    lines: str  # FILE:LINE FUNCTION of ours that asked for it, " < " that of its caller, " < " …


def operations(run):
    """Writes operations.txt and operations.csv in the workdir: every operation of an update of the
    whole batch on one device, and of an evaluation of one image with one sample. Prints the sums.

    Raises VncaError for a batch or a pool that training refuses, OSError for storage that fails.
    """
    config, model = run.config, run.learner.model
    images = training_images(config)
    check_batch(config, 1)
    check_images(config, images)
    evaluate = jax.make_jaxpr(unwrap(estimator(model)))
    index = np.zeros(1, np.int32)
    evaluation = evaluate(param_shapes(model), stored_shapes(model, 1), index, 1, 0).jaxpr
    programs = {
        "update": (traced_update(run.learner, config, images), update_flops(config)),
        "evaluation": (evaluation, evaluation_flops(config, 1, 1)),
    }
    text, table = [LEGEND], io.StringIO(newline="")
    rows = csv.writer(table)
    rows.writerow(("program", *Operation._fields))
    say(f"an update of {config.train.batch_size} images, an evaluation of one with one sample")
    for name, (jaxpr, flops) in programs.items():
        listing = list(listed(jaxpr))
        rows.writerows((name, *operation) for operation in listing)
        sums = [f"\n{name}: {len(listing):,} operations", *sums_of(listing, jaxpr, flops // 2)]
        say("\n".join(sums))
        text += [*sums, "", TITLES, *(FORM.format(*operation) for operation in listing)]
    if is_first():
        for ending, content in ("txt", "\n".join(text)), ("csv", table.getvalue()):
            path = run.workdir / f"operations.{ending}"
            write(path, lambda file, content=content: file.write(content.encode()))
    say(f"\nwritten to {run.workdir}: operations.txt, operations.csv")


def traced_update(learner, config, images, devices=1):
    """The jaxpr of an update with so many training images, as each of the devices runs it."""
    update = jax.make_jaxpr(partial(one_update, learner, config), axis_env=[("devices", devices)])
    return update(*update_shapes(learner, config, images, devices)).jaxpr


def sums_of(listing, jaxpr, counted):
    """Lines: the multiply-adds of a program by --mode=summary, `counted`, and those of its listing,
    with the reasons why they differ; and the ten lines of ours, with their callers, that have the
    most."""
    total = sum(operation.multiply_adds for operation in listing)
    needed = work(jaxpr)
    parts = {
        "multiply-adds as --mode=summary counts them": counted,
        "loops of another length, gradients that nothing needs, and fast forms": needed - counted,
        "zeros between spread cells": total - needed,
        "multiply-adds in this list; by the largest lines of ours, with their callers:": total,
    }
    largest = Counter()
    for operation in listing:
        lines = " < ".join(operation.lines.split(" < ")[:2])
        largest[lines, operation.direction] += operation.multiply_adds
    sums = [f"{n:>20,}  {words}" for words, n in parts.items()]
    return sums + [f"{n:>24,}  {' '.join(words)}" for words, n in largest.most_common(10) if n]


# ---- The walk over a jaxpr -----------------------------------------------------------------------


def listed(jaxpr, times=1, outer=(), backward=False):
    """Yields the Operations of a jaxpr in its order, with those of its loops, branches and calls.

    A loop of unknown length counts as one turn. Of the branches of a condition, the one with the
    most multiply-adds counts each time, and the others never.
    """
    for equation in jaxpr.eqns:
        source = equation.source_info
        is_backward = backward or "transpose(" in str(source.name_stack)
        lines = called_from(outer, our_lines(source.traceback))
        inner = inner_jaxprs(equation)
        longest = max(inner, key=work, default=None)
        for program in inner:
            turns = equation.params.get("length", 1) if program is longest else 0
            yield from listed(program, times * turns, lines, is_backward)
        if not inner:
            sides = [[x.aval for x in side] for side in (equation.invars, equation.outvars)]
            yield Operation(
                times,
                times * multiply_adds(equation, on_zeros=True),
                times * sum(x.size * x.dtype.itemsize for side in sides for x in side),
                "backward" * is_backward,
                equation.primitive.name,
                " → ".join(", ".join(map(shape_of, side)) for side in sides),
                " < ".join(lines),
            )


def shape_of(x):
    """An array's dtype and shape, such as "float32[32,256]"."""
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def our_lines(traceback):
    """The method's lines in a traceback, FILE:LINE FUNCTION, the innermost first."""
    lines = []
    for frame in traceback.frames if traceback else ():
        path = Path(frame.file_name)
        if path.is_relative_to(PACKAGE) and path.parent.name != "report":
            file = path.relative_to(PACKAGE.parent).as_posix()
            function = frame.function_name.replace(".<locals>", "")
            lines.append(f"{file}:{frame.line_num} {function}")
    return tuple(lines)


def called_from(outer, own):
    """The lines of an equation, given those of the loop or call `outer` that it is inside of.

    JAX before 0.8 gives an inner equation all lines. If JAX reuses the trace of one of its own
    functions, they are those of the first caller. Later versions give only the inner lines.
    """
    if not own or not outer or own[-len(outer) :] == outer:
        return own or outer
    has_all = own[-1].split()[1] == outer[-1].split()[1]
    return outer if has_all else own + outer
