"""What a compiled GPU program does: its kernels, and the bytes and FLOP of each. The programs
of TPUs are parsed here, too.

All comes from the optimised HLO that XLA writes. A kernel is an operation outside of fusions. It
reads its operands and writes its results once: of a sliced operand only the slice counts, of a
result updated in place only the update, and the libraries' scratch memory is left out. A
loop counts as often as it runs if its length is known, else once; of a conditional, the longest
branch counts.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from math import prod
from typing import NamedTuple

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
}  # fmt: skip
NO_KERNEL = (
    "parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all",
    "partition-id", "replica-id",
)  # fmt: skip
COLLECTIVES = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
BRANCHES = "branch_computations", "true_computation", "false_computation"
SCRATCH = "s8", "u8"  # dtypes of a library call's second result, which no other operation reads


class Instruction(NamedTuple):
    """One line of the text."""

    name: str
    opcode: str
    shapes: list  # of its results: (dtype, dimensions)
    operands: list  # names
    argument: str  # what stands between the brackets after the opcode
    attributes: str
    is_root: bool
    line: str


class Kernel(NamedTuple):
    """One operation, and how often a call runs it."""

    instruction: Instruction
    times: int
    bytes: int
    flops: int
    exact: bool  # whether its products are in float32 itself, not in TF32
    named: str  # the line that says what it stems from


# ---- The text ------------------------------------------------------------------------------------


def parse(text):
    """{name of a computation: {name: Instruction}}, and the name of the entry."""
    computations, entry, body = {}, None, {}
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if header and not line.startswith(" "):
            body = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif line.startswith(" ") and " = " in line:
            instruction = parse_line(line)
            body[instruction.name] = instruction
    return computations, entry


def parse_line(line):
    """The Instruction of a line `[ROOT] %name = shape opcode(argument), attributes`."""
    left, right = line.strip().split(" = ", 1)
    end = closing(right, 0) if right.startswith("(") else right.index(" ")
    shape, rest = right[:end], right[end:].lstrip()
    start = rest.index("(")
    end = closing(rest, start)
    argument = rest[start + 1 : end - 1]
    return Instruction(
        left.removeprefix("ROOT ").lstrip("%"), rest[:start], shapes_in(shape),
        re.findall(r"%([\w.\-]+)", argument), argument, rest[end:], left.startswith("ROOT "), line,
    )  # fmt: skip


def closing(text, start):
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for i, character in enumerate(text[start:], start):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if not depth:
            return i + 1
    raise ValueError(f"no closing bracket: {text[start : start + 80]}")


def shapes_in(text):
    """(dtype, dimensions) of each array that a piece of HLO names."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
    return [(dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in found]


def size(shapes):
    """Bytes of arrays."""
    return sum(BITS.get(dtype, 0) * prod(dims) // 8 for dtype, dims in shapes)


def attribute(instruction, pattern):
    """The first group of a pattern in an instruction's attributes, or None."""
    found = re.search(pattern, instruction.attributes)
    return found and found[1]


def called(instruction, *roles):
    """Names of the computations that an instruction calls in these roles, such as "body"."""
    names = []
    for role in roles:
        one = attribute(instruction, rf"\b{role}=%?([\w.\-]+)")
        several = attribute(instruction, rf"\b{role}=\{{([^}}]*)\}}")
        names += [one] if one else re.findall(r"[\w.\-]+", several or "")
    return names


# ---- Kernels -------------------------------------------------------------------------------------


def kernels(text, seconds, turns=1):
    """The Kernels of a call. seconds: Kernel -> how long it takes once, to choose a branch by;
    turns: how often a loop of unknown length runs."""
    computations, entry = parse(text)
    if entry is None:
        raise ValueError("the text has no entry computation")
    return list(walk(computations, entry, 1, seconds, turns))


def walk(computations, name, times, seconds, turns):
    """Yields the Kernels of a computation run `times` times."""
    body = computations[name]
    for instruction in body.values():
        opcode = instruction.opcode
        if opcode == "while":
            known = attribute(instruction, r'"known_trip_count":\{"n":"(\d+)"')
            [inner] = called(instruction, "body")
            yield from walk(computations, inner, times * int(known or turns), seconds, turns)
        elif opcode in ("call", "async-start"):
            for inner in called(instruction, "to_apply", "calls"):
                yield from walk(computations, inner, times, seconds, turns)
        elif opcode == "conditional":
            branches = [
                list(walk(computations, inner, times, seconds, turns))
                for inner in called(instruction, *BRANCHES)
            ]
            yield from max(branches, key=lambda of: sum(seconds(k) * k.times for k in of))
        elif opcode not in NO_KERNEL and not opcode.endswith("-done"):
            yield kernel(computations, body, instruction, times)


def kernel(computations, body, instruction, times):
    """The Kernel of an instruction in `body`."""
    if instruction.opcode == "fusion":
        inner = computations[called(instruction, "calls")[0]]
        products = list(products_in(computations, inner))
        flops = sum(product_flops(within, dot) for within, dot in products)
        exact = any(is_exact(dot) for _, dot in products)
        moved = fusion_bytes(inner, instruction)
        return Kernel(instruction, times, moved, flops, exact, named_line(inner, instruction))
    results, flops = instruction.shapes, 0
    if instruction.opcode == "dot":
        flops = product_flops(body, instruction)
    if instruction.opcode == "custom-call":
        results = [shape for shape in results if not (shape[0] in SCRATCH and len(shape[1]) == 1)]
        flops = library_flops(body, instruction)
    read = sum(size(body[name].shapes) for name in instruction.operands if name in body)
    exact = is_exact(instruction)
    return Kernel(instruction, times, size(results) + read, flops, exact, instruction.line)


def named_line(inner, fusion):
    """The fusion's line, or if it does not name its origin, the last inner one that does."""
    lines = [fusion.line, *(instruction.line for instruction in reversed(inner.values()))]
    return next((line for line in lines if 'op_name="' in line), fusion.line)


def is_exact(instruction):
    """Whether the operands of a product are asked for in float32, as by the precision "highest"."""
    precision = attribute(instruction, r"operand_precision=\{([\w,]*)\}")
    precision = precision or attribute(instruction, r'"operand_precision":\[([^\]]*)\]')
    return "highest" in (precision or "").lower()


def fusion_bytes(inner, fusion):
    """Bytes that a fusion reads and writes; inner: the computation that it calls."""
    users = defaultdict(list)
    for user in inner.values():
        for name in user.operands:
            users[name].append(user)

    def origin(name):
        """What makes the value that a bitcast only renames."""
        while inner[name].opcode in ("bitcast", "reshape"):
            name = inner[name].operands[0]
        return inner[name]

    def read(name):
        """(instruction, the name by which it reads) for all that read this value."""
        for user in users[name]:
            if user.opcode == "bitcast":
                yield from read(user.name)
            else:
                yield user, name

    [root] = [instruction for instruction in inner.values() if instruction.is_root]
    total = 0
    for name in root.operands if root.opcode == "tuple" else [root.name]:
        made = origin(name)
        updated = made.opcode == "dynamic-update-slice"
        total += size((inner[made.operands[1]] if updated else made).shapes)
    for parameter in inner.values():
        if parameter.opcode != "parameter":
            continue
        readers = list(read(parameter.name))
        if readers and all(is_sliced(user, name) for user, name in readers):
            total += sum(size(user.shapes) for user, _ in readers)
        elif not (readers and all(is_updated(user, name) for user, name in readers)):
            total += size(parameter.shapes)
    return total


def is_sliced(user, name):
    """Whether `user` reads no more than a slice of the array of this name."""
    return user.opcode == "dynamic-slice" and user.operands[0] == name


def is_updated(user, name):
    """Whether `user` only writes into the array of this name."""
    return user.opcode == "dynamic-update-slice" and user.operands[0] == name


# ---- FLOP: two for each multiply-add, padding included -------------------------------------------


def products_in(computations, body):
    """(computation, dot) for each product in a computation and in the fusions that it calls."""
    for instruction in body.values():
        if instruction.opcode == "dot":
            yield body, instruction
        elif instruction.opcode == "fusion":
            yield from products_in(computations, computations[called(instruction, "calls")[0]])


def product_flops(body, dot):
    """FLOP of a dot."""
    summed = attribute(dot, r"lhs_contracting_dims=\{([\d,]*)\}")
    return contraction_flops(body, dot, summed)


def contraction_flops(body, product, summed):
    """FLOP of a product: two for each number of the result and each term of its sum. summed: the
    left operand's axes that are summed over, as text."""
    [(_, left), *_] = body[product.operands[0]].shapes
    length = prod(left[int(n)] for n in re.findall(r"\d+", summed or ""))
    return 2 * prod(product.shapes[0][1]) * length


def library_flops(body, call):
    """FLOP of a call of cuBLAS or cuDNN; 0 of anything else."""
    target = attribute(call, r'custom_call_target="([^"]*)"') or ""
    if "cublas" in target:
        return contraction_flops(
            body, call, attribute(call, r'"lhs_contracting_dimensions":\[([^\]]*)')
        )
    window = attribute(call, r"window=\{[^}]*size=([\dx]+)")
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", call.attributes)
    if not window or not labels:
        return 0
    # Each cell of the convolution's own output is a sum over taps and input channels. In a backward
    # pass that output is an operand: the second one for the kernel, the first one for the input.
    first, second = (body[name].shapes[0][1] for name in call.operands[:2])
    result = next(dims for _, dims in call.shapes if len(dims) > 2)
    if "BackwardFilter" in target:
        kernel, output = result, second
    elif "BackwardInput" in target:
        kernel, output = second, first
    else:
        kernel, output = second, result
    return 2 * prod(output) * prod(kernel) // kernel[labels[2].index("o")]


# ---- Sums ----------------------------------------------------------------------------------------


class Counted(NamedTuple):
    """What a call does."""

    kernels: int
    bytes: int
    flops: int
    seconds: float
    operations: Counter  # {name: seconds}
    collectives: Counter  # {opcode: how often}
    collective_bytes: Counter  # {opcode: bytes of their results}


def count(text, seconds, name: Callable):
    """The sums over a call's kernels; arguments as of `kernels`. name: opcode, line -> a name."""
    total, moved, flops, duration = 0, 0, 0, 0.0
    operations, collectives, collective_bytes = Counter(), Counter(), Counter()
    for kernel in kernels(text, seconds):
        instruction, times = kernel.instruction, kernel.times
        total += times
        moved += kernel.bytes * times
        flops += kernel.flops * times
        duration += seconds(kernel) * times
        operations[name(instruction.opcode, kernel.named)] += seconds(kernel) * times
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            collectives[opcode] += times
            collective_bytes[opcode] += result_size(instruction) * times
    return Counted(total, moved, flops, duration, operations, collectives, collective_bytes)


def result_size(instruction):
    """Bytes of the arrays that an operation makes. One that starts another operation also holds
    its operands, except an all-reduce: then only the largest array counts."""
    sizes = [size([shape]) for shape in instruction.shapes]
    both = instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start"
    return max(sizes) if both else sum(sizes)
