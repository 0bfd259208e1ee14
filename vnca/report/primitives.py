"""The primitive operations of a jaxpr, and the lines of ours that asked for them.

JAX does not document the source information in a jaxpr: the traceback of an equation, and its name
stack, which marks the backward pass. Where a version of JAX lacks it, operations have no lines. An
operation that a function of JAX asks for belongs to our line that called that function.
"""

import re
import zlib
from math import prod
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

PACKAGE = Path(__file__).parents[1]
STREAMS = {  # the number that `vnca.noise.stream` makes of a name: that name
    zlib.crc32(name.encode()): name
    for path in PACKAGE.rglob("*.py")
    for name in re.findall(r'stream\([\w.]+, "(\w+)"', path.read_text(encoding="utf-8"))
}
PARTS = {  # of the tour in BUILD_NOTES, by the name of a function or of a file
    "images": "Data and noise", "noise": "Data and noise", "encode": "The encoder",
    "models": "The decoders", "decode_doubling": "The decoders",
    "healing": "The small model that heals", "decode_healing": "The small model that heals",
    "develop_healing": "The small model that heals",
    "loss": "The loss", "losses": "The loss", "training": "From the gradient to the update",
    "batch_gradient": "From the gradient to the update",
    "optimizer": "From the gradient to the update",
    "pool": "The pool of the non-doubling model",
    "healing_gradient": "The pool of the non-doubling model",
    "estimate": "Evaluation", "iwelbo": "Evaluation", "add_sample": "Evaluation",
}  # fmt: skip


class Operation(NamedTuple):
    """A primitive operation. Its multiply-adds and bytes are those of all its executions."""

    number: int  # in the order of the program
    part: str
    times: int  # how often it runs, all loops multiplied out
    primitive: str
    operands: str  # dtypes and shapes
    results: str
    multiply_adds: int  # of products and convolutions; all kernel taps, also on padding and zeros
    bytes: int  # of all operands and results
    line: str  # our line that asked for it, FILE:LINE; in the backward pass, its forward line
    function: str
    callers: str  # of that function, FILE:LINE FUNCTION, the nearest first
    stream: str  # of an operation on random keys: the name in `vnca.noise.stream`


def listed(jaxpr):
    """The operations of a jaxpr in its order, with those of its loops, branches and calls.

    A loop of unknown length counts as one turn. Of the branches of a condition, the longest counts
    each time, and the others never.
    """
    found, streams = [], {}

    def stream_of(x):
        is_number = hasattr(x, "val") and x.aval.dtype == np.uint32
        return STREAMS.get(int(x.val), "") if is_number else streams.get(id(x), "")

    def walk(jaxpr, times, outer, was_backward):
        for equation in jaxpr.eqns:
            source = getattr(equation, "source_info", None)
            backward = was_backward or "transpose(" in str(getattr(source, "name_stack", ""))
            own = called_from(outer, our_lines(getattr(source, "traceback", None)))
            stream = next(filter(None, map(stream_of, equation.invars)), "")
            for x in equation.outvars:
                if jax.dtypes.issubdtype(x.aval.dtype, jax.dtypes.prng_key):
                    streams[id(x)] = stream
            inner = inner_jaxprs(equation)
            longest = max(inner, key=work, default=None)
            for program in inner:
                # A condition has its predicate as an extra operand, a loop its end's operands.
                for x, outside in zip(program.invars[::-1], equation.invars[::-1], strict=False):
                    streams[id(x)] = stream_of(outside)
                turns = equation.params.get("length", 1) if program is longest else 0
                walk(program, times * turns, own, backward)
            if not inner:
                number = len(found) + 1
                found.append(operation(equation, number, times, own, backward, stream))

    walk(jaxpr, 1, (), False)
    return found


def inner_jaxprs(equation):
    """The jaxprs of a call or of the body of a loop, or those of all branches of a condition."""
    params = equation.params
    found = [params[name] for name in ("jaxpr", "call_jaxpr", "body_jaxpr") if name in params]
    return [getattr(closed, "jaxpr", closed) for closed in params.get("branches", found)]


def work(jaxpr):
    """The multiply-adds of a jaxpr, each loop taken once."""
    return sum(multiply_adds(e) + sum(map(work, inner_jaxprs(e))) for e in jaxpr.eqns)


def our_lines(traceback):
    """The method's lines in a traceback, the innermost first: (FILE:LINE, FUNCTION)."""
    found = []
    for frame in getattr(traceback, "frames", ()):
        path = Path(frame.file_name)
        if path.is_relative_to(PACKAGE) and path.parent != PACKAGE / "report":
            place = f"{path.relative_to(PACKAGE.parent).as_posix()}:{frame.line_num}"
            found.append((place, frame.function_name.replace(".<locals>", "")))
    return tuple(found)


def called_from(outer, own):
    """The lines of an equation, given those of the loop or call `outer` that it is inside of.

    JAX before 0.8 gives an inner equation all lines. If JAX reuses the trace of one of its own
    functions, they are those of the first caller. Later versions give only the inner lines.
    """
    if not outer or own[len(own) - len(outer) :] == outer:
        return own or outer
    has_all = own and own[-1][1] == outer[-1][1]
    return outer if has_all else own + outer


def operation(equation, number, times, own, backward, stream):
    """The Operation of an equation that runs so many times, and that our lines `own` asked for."""
    sides = [[x.aval for x in of] for of in (equation.invars, equation.outvars)]
    shapes = [
        ", ".join(f"{x.dtype}[{','.join(map(str, x.shape))}]" for x in side) for side in sides
    ]
    moved = sum(x.size * x.dtype.itemsize for side in sides for x in side)
    # Names of functions and files, from the innermost outwards.
    names = [
        name
        for line, function in own
        for name in (*reversed(function.split(".")), Path(line.split(":")[0]).stem)
    ]
    part = next((PARTS[name] for name in names if name in PARTS), "other")
    (line, function), *outer = own or [("", "")]
    return Operation(
        number, f"{part}, backward" if backward else part, times, equation.primitive.name, *shapes,
        times * multiply_adds(equation), times * moved,
        line, function, " < ".join(map(" ".join, outer)), stream,
    )  # fmt: skip


def multiply_adds(equation):
    """The multiply-adds of one execution: each number of the result is a sum of so many terms."""
    name, axes = equation.primitive.name, equation.params.get("dimension_numbers")
    if name not in ("conv_general_dilated", "dot_general"):
        return 0
    (x, kernel), (result,) = ([v.aval for v in of] for of in (equation.invars, equation.outvars))
    if name == "dot_general":
        return result.size * prod(x.shape[axis] for axis in axes[0][0])
    return result.size * kernel.size // kernel.shape[axes.rhs_spec[0]]
