"""The list of operations: it is complete, its lines are the right ones, and its sums are exact."""

import ast
import csv
import importlib
import os
import re
import subprocess
import sys
import zlib
from collections import Counter
from functools import cache, partial
from itertools import groupby, pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from reference import equations

from vnca import optimizer
from vnca.program import VncaError
from vnca.program.arithmetic import evaluation_multiply_adds, update_multiply_adds
from vnca.program.method import make_method
from vnca.report import operations
from vnca.report.primitives import PARTS, listed

ROOT = Path(__file__).parents[2]
SMALL = "quickstart", "small_baseline", "small_nondoubling"
ALL = "doubling", "nondoubling", "baseline", *SMALL
COUNTS = {"update": update_multiply_adds, "evaluation": evaluation_multiply_adds}
CALLS = {  # what a line must say where it asks for a primitive
    "conv_general_dilated": ["conv_general_dilated"],
    "dot_general": [" @ "],
    "expm1": ["expm1"],
    "psum": ["pmean"],
    "psum_invariant": ["pmean"],
    "reduce_scatter": ["psum_scatter"],
    "all_gather": ["all_gather"],
    "rev": ["rev(", "unpackbits"],
    "sqrt": ["sqrt"],
    "integer_pow": ["**"],
    "random_seed": ["random.key("],
    "random_fold_in": ["fold_in"],
    "random_bits": ["normal(", "permutation(", "randint("],
    "erf_inv": ["normal("],
    "sort": ["permutation("],
    "scatter": [".set("],
    "axis_index": ["axis_index"],
    "logistic": ["softplus"],
}
# Functions that our lines call as an argument or as a field.
BY_ANOTHER_NAME = "encode", "nca_step", "batch_gradient", "healing_gradient", "accumulate"
UPDATE = "From the gradient to the update"
CONV = "conv_general_dilated"


def config(name):
    return importlib.import_module(f"configs.{name}").get_config()


def traced(settings, plain=True):
    """The operations of both programs of a config: {name: list}."""
    found = operations.programs(settings, partial(make_method, plain=plain))
    return {name: listed(jaxpr) for name, jaxpr in found.items()}


@cache
def programs(name):
    return traced(config(name))


def multiply_adds(found):
    return sum(o.multiply_adds for o in found)


@pytest.mark.parametrize("program", ["update", "evaluation"])
@pytest.mark.parametrize("name", ALL)
def test_the_sum_is_that_of_the_summary_and_every_difference_is_exact(name, program):
    found = programs(name)[program]
    counted, differences = COUNTS[program](config(name))
    assert multiply_adds(found) == counted + sum(differences.values())
    assert 0 not in differences.values()


def test_an_encoder_that_learns_costs_its_gradient():
    settings = config("small_nondoubling")
    settings.train.encoder_from = None
    counted, differences = update_multiply_adds(settings)
    found = traced(settings)["update"]
    assert multiply_adds(found) == counted + sum(differences.values())
    assert [n for n in differences.values() if n < 0] == [-16 * 32 * 32 * 25 * 12]


def test_a_convolution_is_listed_with_its_shapes_bytes_and_line():
    first = next(o for o in programs("baseline")["update"] if o.primitive == CONV)
    assert first.operands == "float32[32,32,32,1], float32[5,5,1,32]"
    assert first.results == "float32[32,32,32,32]"
    assert first.multiply_adds == 32 * 32**2 * 25 * 32 and first.times == 1
    assert first.bytes == 4 * (32 * 32 * 32 * 1 + 25 * 32 + 32 * 32 * 32 * 32)
    assert first.function == "conv" and first.part == "The encoder"
    lines = [caller.split()[1] for caller in first.callers.split(" < ")]
    assert lines[0] == "encode" and lines[-1] == "one_update"


@pytest.mark.parametrize("name", ["quickstart", "small_nondoubling"])
def test_every_operation_of_the_program_is_listed_in_its_order(name):
    made = operations.programs(config(name), partial(make_method, plain=True))
    for program, jaxpr in made.items():
        found = programs(name)[program]
        calls = "jit", "pjit", "scan", "while", "cond", "closed_call"
        calls += "custom_jvp_call", "custom_vjp_call"
        wanted = [e.primitive.name for e in equations(jaxpr) if e.primitive.name not in calls]
        listed_names = Counter(o.primitive for o in found)
        of_loops = Counter(wanted) - listed_names  # the conditions of loops, and of scatters
        assert listed_names - Counter(wanted) == Counter()
        assert set(of_loops) <= {"lt", "add"} and of_loops.total() <= 2
        assert [o.number for o in found] == list(range(1, len(found) + 1))
    parts = [key for key, _ in groupby(o.part for o in programs(name)["update"] if o.multiply_adds)]
    decoder = "The decoders" if name == "quickstart" else "The small model that heals"
    backward = [f"{decoder}, backward", *["The encoder, backward"] * (name == "quickstart")]
    assert parts == ["The encoder", decoder, *backward]


@pytest.mark.parametrize("name", ["quickstart", "small_nondoubling"])
def test_the_fast_form_of_a_cpu_multiplies_in_the_same_parts(name):
    decoder = "The decoders" if name == "quickstart" else "The small model that heals"
    for found in traced(config(name), plain=False).values():
        parts = {o.part.removesuffix(", backward") for o in found if o.multiply_adds}
        assert parts == {"The encoder", decoder}


def test_the_parts_are_those_of_the_tour():
    notes = (ROOT / "BUILD_NOTES.md").read_text(encoding="utf-8")
    tour = notes.partition("\n## A tour for the auditor\n")[2].partition("\n## ")[0]
    assert set(PARTS.values()) <= set(re.findall(r"^### (.*)$", tour, re.M))
    for name in SMALL:
        both = [*programs(name)["update"], *programs(name)["evaluation"]]
        assert {o.part.removesuffix(", backward") for o in both} <= set(PARTS.values())


def test_loops_are_multiplied_out():
    settings = config("quickstart")
    settings.train.micro_batch = 4
    pieces, whole = traced(settings)["update"], programs("quickstart")["update"]
    assert {o.times for o in pieces if o.primitive == "dot_general"} == {4, 4 * 4}
    assert {o.times for o in whole if o.primitive == "dot_general"} == {1, 4}
    assert multiply_adds(pieces) == multiply_adds(whole)


@cache
def source(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    return text.splitlines(), list(ast.walk(ast.parse(text)))


def statement(file, number):
    """The text of the shortest statement that has this line."""
    lines, nodes = source(file)
    spans = [
        (node.lineno, node.end_lineno)
        for node in nodes
        if isinstance(node, ast.stmt) and node.lineno <= number <= node.end_lineno
    ]
    first, last = min(spans, key=lambda span: span[1] - span[0])
    return "\n".join(lines[first - 1 : last])


def functions(file, number):
    """The names of the functions that have this line."""
    return [
        getattr(node, "name", "<lambda>")
        for node in source(file)[1]
        if isinstance(node, (ast.FunctionDef, ast.Lambda))
        and node.lineno <= number <= node.end_lineno
    ]


@pytest.mark.parametrize("name", SMALL)
def test_every_line_exists_and_holds_the_call(name):
    checked = Counter()
    for o in [*programs(name)["update"], *programs(name)["evaluation"]]:
        places = [f"{o.line} {o.function}", *filter(None, o.callers.split(" < "))]
        for place in places:
            line, function = place.split()
            file, number = line.split(":")
            own = function.split(".")[-1]
            assert own in [*functions(file, int(number)), "<genexpr>", "<listcomp>"], place
        words = CALLS.get(o.primitive)
        if words and (not o.part.endswith("backward") or o.primitive in (CONV, "dot_general")):
            file, number = o.line.split(":")
            assert any(word in statement(file, int(number)) for word in words), o
            checked[o.primitive] += 1
        for (_, called), (line, _) in pairwise(map(str.split, places)):
            file, number = line.split(":")
            if "." not in called and called not in BY_ANOTHER_NAME:
                assert called in statement(file, int(number)), places
    assert checked[CONV] >= 10 and checked["random_bits"] >= 2


@pytest.mark.parametrize(
    ("name", "streams"),
    [
        ("quickstart", {"posterior"}),
        ("small_baseline", {"posterior"}),
        ("nondoubling", {"posterior", "pool", "damage", "steps"}),
        ("small_nondoubling", {"posterior", "pool", "damage", "steps"}),
    ],
)
def test_every_random_draw_is_listed_with_the_name_of_its_stream(name, streams):
    for program, wanted in ("update", streams), ("evaluation", {"evaluation"}):
        random = [o for o in programs(name)[program] if o.primitive.startswith("random_")]
        assert {o.stream for o in random if o.primitive == "random_bits"} == wanted
        assert all(o.stream for o in random if o.primitive != "random_seed")
    assert all(
        o.stream == "damage"
        for o in programs(name)["update"]
        if o.primitive == "random_bits" and "damage" in f"{o.function} {o.callers}"
    )


def test_a_draw_from_a_key_without_a_name_has_none():
    def draws(key):
        named = jax.random.fold_in(key, zlib.crc32(b"posterior"))
        return jax.random.normal(named, (2,)) + jax.random.normal(jax.random.fold_in(key, 7), (2,))

    bits = [
        o for o in listed(jax.make_jaxpr(draws)(jax.random.key(0)).jaxpr) if "bits" in o.primitive
    ]
    assert [o.stream for o in bits] == ["posterior", ""]


def test_a_new_operation_in_the_update_appears(monkeypatch, tmp_path):
    clip = optimizer.clip_by_norm

    def clip_twice(grads, norm, limit):
        grads = clip(grads, norm, limit)
        kernel = grads["decoder"]["residual"]["kernel"]
        grads["decoder"]["residual"]["kernel"] = jnp.tanh(kernel) @ kernel
        return grads

    before = Counter(o.primitive for o in programs("quickstart")["update"])
    monkeypatch.setattr(optimizer, "clip_by_norm", clip_twice)
    found = traced(config("quickstart"))["update"]
    new = Counter(o.primitive for o in found) - before
    assert new == {"tanh": 1, "dot_general": 1}
    tanh = next(o for o in found if o.primitive == "tanh")
    assert tanh.part == UPDATE and tanh.function == "one_update" and tanh.bytes == 2 * 4 * 32**2
    lines = []
    operations.operations(config("quickstart"), tmp_path, lines.append)
    (rest,) = [line for line in "\n".join(lines).splitlines() if "not that of the plain" in line]
    assert int(rest.split()[0].replace(",", "")) == 32**3


def test_both_files_hold_all_and_their_sums_agree(tmp_path):
    lines = []
    operations.operations(config("small_baseline"), tmp_path, lines.append)
    with open(tmp_path / "operations.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = programs("small_baseline")
    for program, found in wanted.items():
        own = [tuple(row.values())[1:] for row in rows if row["program"] == program]
        assert own == [tuple(map(str, o)) for o in found]
    text = (tmp_path / "operations.txt").read_text(encoding="utf-8")
    assert "\n".join(lines[:-1]).strip().splitlines()[0] in text
    table = [line.split() for line in text.splitlines() if line.startswith("vnca/")]
    sums = [
        [int(cell.replace(",", "")) for cell in row[-3:]] for row in table if "(all)" not in row
    ]
    whole = [sum(column) for column in zip(*sums, strict=True)]
    both = [o for found in wanted.values() for o in found]
    assert whole == [
        sum(getattr(o, of) for o in both) for of in ("times", "multiply_adds", "bytes")
    ]
    titles = [line for line in text.splitlines() if line in {o.part for o in both}]
    assert {"The encoder", "The decoders", "The loss", "Data and noise", UPDATE} <= set(titles)
    assert {"The decoders, backward", "The loss, backward", "The encoder, backward"} <= set(titles)


@pytest.mark.parametrize(
    ("flag", "layers"),
    [
        pytest.param("--plain", "vnca/layers.py", marks=pytest.mark.slow),
        ("--noplain", "vnca/fast/cpu.py"),
    ],
)
def test_the_command_lists_the_method_that_the_flag_chooses(flag, layers, tmp_path):
    command = [sys.executable, "main.py", "--config=configs/small_baseline.py", flag]
    command += ["--mode=operations", f"--workdir={tmp_path}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
    with open(tmp_path / "operations.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["primitive"] == CONV]
    assert {row["line"].split(":")[0] for row in rows} == {layers}


def test_a_pool_that_training_refuses_is_refused(tmp_path):
    config = tiny.config("nondoubling")
    config.train.pool_size = config.train.batch_size - 4
    with pytest.raises(VncaError, match="pool_size=.* it must be at least the batch"):
        operations.operations(config, tmp_path / "run", print)
    assert not [*tmp_path.iterdir()]
