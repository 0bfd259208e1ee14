"""Every primitive operation of one training update, and of one sample of an evaluation, as text."""

import csv
import io
from collections import Counter, defaultdict
from functools import partial
from inspect import unwrap
from itertools import groupby
from pathlib import Path

import jax
import numpy as np

from vnca.pool import fresh_images
from vnca.program import files
from vnca.program.arithmetic import evaluation_multiply_adds, update_multiply_adds
from vnca.program.data import image_counts
from vnca.program.evaluate import estimator
from vnca.program.hosts import agree
from vnca.program.machine import check_batch, check_images
from vnca.program.method import make_method
from vnca.report.primitives import Operation, listed
from vnca.training import init_state, one_update

WIDTH = 72  # of the operands and results in the text; the table has them whole
LEGEND = """\
Each primitive operation of the program that JAX traces, in its order, under the parts of the
auditor's tour. "times": how often it runs, all loops multiplied out. Of a loop of unknown length
one turn counts, and of a condition the branch with the most multiply-adds. Multiply-adds are those
of products and convolutions: each kernel tap, also on padding and on zeros between spread cells.
Bytes are those of all operands and results. The line is ours that asked for the operation, and
after < that of its caller. In the backward pass it is the forward line that the operation belongs
to. A stream is the name of random numbers in vnca/noise.py.
"""
plain = partial(make_method, plain=True)


def operations(config, workdir, log, make_method=plain):
    """Writes operations.txt and operations.csv in `workdir`: every operation of an update of the
    whole batch on one device, and of an evaluation of one image with one sample. Logs the sums.

    Raises VncaError where the files cannot be written.
    """
    text, table = [LEGEND], io.StringIO(newline="")
    csv.writer(table).writerow(("program", *Operation._fields))
    counts = {"update": update_multiply_adds, "evaluation": evaluation_multiply_adds}
    for name, jaxpr in programs(config, make_method).items():
        found = listed(jaxpr)
        csv.writer(table).writerows((name, *operation) for operation in found)
        of = f"{config.train.batch_size} images" if name == "update" else "one image, one sample"
        sums = [
            f"{name} of {of}: {len(found):,} operations, executed {sum(o.times for o in found):,} "
            f"times, {sum(o.bytes for o in found):,} bytes",
            *reconciled(found, *counts[name](config)),
            *largest(found),
            "",
        ]
        log("\n".join(sums))
        text += [*sums, *by_function(found), *in_order(found), "", ""]
    contents = {"operations.txt": "\n".join(text), "operations.csv": table.getvalue()}
    agree(lambda: files.make_folder(workdir))
    for name, content in contents.items():
        agree(partial(files.write_bytes, Path(workdir, name), content.encode()))
    log(f"written to {workdir}: {', '.join(contents)}")


def programs(config, make_method):
    """The jaxprs of an update, and of the IWELBO of one image, which is a loop over samples."""
    config = config.copy_and_resolve_references()
    config.train.micro_batch = config.train.micro_batch or config.train.batch_size
    made, shape = make_method(config), jax.ShapeDtypeStruct
    train_images, _ = image_counts(config.data.name, config.data.dir)
    check_batch(config, 1)
    check_images(config, train_images)
    images, indices = shape((train_images, 98), np.uint8), shape((fresh_images(config),), np.int32)
    state = jax.eval_shape(partial(init_state, made, config), images)
    update = jax.make_jaxpr(partial(one_update, made, config), axis_env=[("devices", 1)])
    evaluation = jax.make_jaxpr(unwrap(estimator(made.model)))
    image, number = shape((1, 98), np.uint8), shape((1,), np.int32)
    return {
        "update": update(state, images, indices).jaxpr,
        "evaluation": evaluation(state.params, image, number, 1, 0).jaxpr,
    }


def reconciled(found, counted, differences):
    """Lines: the multiply-adds counted by hand, the known differences, and those of the list."""
    total = sum(o.multiply_adds for o in found)
    rest = total - counted - sum(differences.values())
    rows = [(counted, "multiply-adds as --mode=summary counts them")]
    rows += [(n, what) for what, n in differences.items()]
    rows += [(rest, "since this program is not that of the plain method")] * bool(rest)
    return aligned([*rows, (total, "multiply-adds in this list")])


def largest(found):
    """Lines: the ten lines of ours, with their callers, that have the most multiply-adds."""
    sums = Counter()
    for o in found:
        sums[f"{o.part}: {place(o, 2)}"] += o.multiply_adds
    rows = [(n, f"{n / max(sums.total(), 1):.1%}", words) for words, n in sums.most_common(10) if n]
    return aligned([("multiply-adds", "share", "the largest lines"), *rows])


def by_function(found):
    """Lines: the sums of each function of ours, and of each file."""
    sums = defaultdict(Counter)
    for o in found:
        file = o.line.split(":")[0]
        for key in (file, "(all)"), (file, o.function):
            sums[key].update(times=o.times, multiply_adds=o.multiply_adds, bytes=o.bytes)
    head = "file", "function", "executions", "multiply-adds", "bytes"
    return aligned([head, *sorted((*key, *n.values()) for key, n in sums.items())])


def in_order(found):
    """Lines: all operations in the order of the program, with a title before each part."""
    rows = [("number", "times", "primitive", "from → to", "multiply-adds", "bytes", "line")]
    for o in found:
        shapes = f"{o.operands} → {o.results}"
        shapes = shapes if len(shapes) <= WIDTH else f"{shapes[: WIDTH - 1]}…"
        line = place(o, 3) + f', stream "{o.stream}"' * bool(o.stream)
        rows.append((o.number, o.times, o.primitive, shapes, o.multiply_adds or "", o.bytes, line))
    head, *lines = aligned(rows)
    text = ["", head]
    for part, group in groupby(zip(found, lines, strict=True), lambda pair: pair[0].part):
        text += ["", part, *(line for _, line in group)]
    return text


def place(operation, count):
    """An operation's line and callers, at most `count` in all."""
    lines = [f"{operation.line} {operation.function}", *operation.callers.split(" < ")]
    return " < ".join(line.removeprefix("vnca/") for line in lines[:count] if line)


def aligned(rows):
    """Lines: rows as columns, those of numbers to the right."""
    sides = [">" if {int} & set(map(type, column)) else "<" for column in zip(*rows, strict=True)]
    cells = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [form.format(*row).rstrip() for row in cells]
