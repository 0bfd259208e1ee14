"""The tour in BUILD_NOTES.md: its names are those of the code, its shapes those of an update."""

import importlib
import re
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import tiny

from configs import baseline, doubling
from vnca import losses, models, optimizer, training
from vnca.images import unpack
from vnca.program import data
from vnca.program.devices import batches

HERE = Path(__file__).parent
NOTES = (HERE.parent / "BUILD_NOTES.md").read_text(encoding="utf-8")
TOUR = NOTES.partition("\n## A tour for the auditor\n")[2].partition("\n## ")[0]
HOME = r"vnca\.(?:program\.|report\.)?\w+"
NAMES = re.findall(rf"`({HOME})\.(\w+)`", TOUR)
ROWS = re.findall(rf"^\| `({HOME})\.(\w+)` \| .+? \| (.+?) \| ", TOUR, re.M)


def test_every_function_and_every_test_that_the_tour_names_exists():
    assert len(set(NAMES)) >= 20 and TOUR.count("`vnca.") == len(NAMES)
    for home, name in NAMES:
        assert getattr(importlib.import_module(home), name).__module__ == home, name
    tests = "".join(path.read_text(encoding="utf-8") for path in HERE.rglob("test_*.py"))
    assert [t for t in re.findall(r"`(test_\w+)`", TOUR) if f"def {t}(" not in tests] == []


def test_no_loss_and_nothing_of_the_optimizer_is_left_out():
    own = [f for m in (losses, optimizer) for f in vars(m).values() if hasattr(f, "__code__")]
    assert {(f.__module__, f.__name__) for f in own} <= set(NAMES)


def test_two_digits_on_the_tour_have_the_shapes_that_it_states(request):
    config, found = doubling.get_config(), {row[:2]: [] for row in ROWS}
    config.train.update(batch_size=2, micro_batch=2)
    method, mirror = tiny.method_of(config), models.make_model(baseline.get_config().model)

    def watch(frame, event, result):
        function = frame.f_globals.get("__name__"), frame.f_code.co_name
        if event == "return" and function in found:
            shapes = [str([*x.shape]) for x in jax.tree.leaves(result) if hasattr(x, "shape")]
            found[function].extend({", ".join(shapes)} - {"", *found[function]})  # if a new one

    def walk(images, z):
        state = training.init_state(method, config, images)
        step = partial(training.one_update, method, config)
        axes = training.State(None, None, None, ())
        step = jax.vmap(step, (axes, None, 0), axis_name="devices")
        step(state, images, batches(config.seed, 1, 3, 2, len(images))[:1])
        losses.iwelbo(method.model, state.params, unpack(images[:2]), lambda s: z, 128)
        mirror.decode(mirror.init(jax.random.key(0)), z)

    request.addfinalizer(lambda: sys.setprofile(None))
    sys.setprofile(watch)
    jax.eval_shape(walk, data.load("bundled").train, jax.ShapeDtypeStruct((2, 256), np.float32))
    compared = [row for row in ROWS if "[" in row[2] and found[row[:2]]]
    assert len(compared) >= 20
    for home, name, cell in compared:
        stated = ", ".join(re.findall(r"\[.*?\]", cell)).replace("B", "2").replace("K", "3")
        shapes = ", ".join(found[home, name])
        assert shapes == stated or "…" in cell and shapes.startswith(stated), name
