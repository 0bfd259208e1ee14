"""The page: it computes what the package computes, and it stays one page."""

import ast
import sys

import jax
import numpy as np
import pytest
import tiny

from configs import quickstart
from vnca import one_page, training
from vnca.likelihoods import as_floats
from vnca.model import make_model
from vnca.program.data import load
from vnca.program.order import batches

pytestmark = pytest.mark.usefixtures("quickly_compiled")
SOURCE = (tiny.ROOT / "vnca/one_page.py").read_text(encoding="utf-8")
IMAGES = 40  # of each set: five updates are an epoch, so ten updates are two
CHANNELS = 4
STEPS = 1
UPDATES = 100
BATCH = 8


@pytest.fixture
def page(monkeypatch):
    """The page with sizes that compile in seconds, and the first images of each set."""
    halving = [(5, 5, n, 2 * n) for n in (1, 2, 4, 8)]
    cells = CHANNELS, CHANNELS
    sizes = {
        "CHANNELS": CHANNELS,
        "ENCODER": [(5, 5, 1, 1), *halving, (1, 1, 2 * 2 * 16, 2 * CHANNELS)],
        "AUTOMATON": [(3, 3, *cells)] + 8 * [(1, 1, *cells)],
        "STEPS": STEPS,
        "UPDATES": UPDATES,
        "BATCH": BATCH,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(one_page, name, value)
    whole = one_page.load
    monkeypatch.setattr(one_page, "load", lambda name: whole(name)[:IMAGES])
    return one_page


def package_losses():
    """The losses of the first ten updates by the package, plain and on one device."""
    config = quickstart.get_config()
    config.model.update(latent_size=CHANNELS, encoder_width=1, steps_per_doubling=STEPS)
    config.train.update(
        updates=UPDATES,
        updates_per_call=10,
        decay_updates=UPDATES,
        batch_size=BATCH,
        micro_batch=BATCH,
    )
    images = load("bundled").train[:IMAGES]
    order = batches(config.seed, 1, 10, BATCH, IMAGES)
    learner = training.Learner(make_model(config.model))
    call = training.make_update_call(learner, config, jax.devices()[:1])
    state = training.init_state(learner, config, images)
    _, metrics = call(state, images, order[None], np.int32(10))
    return np.asarray(metrics)[:, training.METRICS.index("loss")]


def interrupted(page, monkeypatch, updates):
    """What training returns if Ctrl-C comes after this many updates."""
    right = page.batch

    def batch(images, t):
        if t > updates:
            raise KeyboardInterrupt
        return right(images, t)

    monkeypatch.setattr(page, "batch", batch)
    return page.train(page.load("train"))


@pytest.mark.slow  # compiles two trainings, for 8 seconds
def test_its_first_ten_losses_are_those_of_the_package(page, monkeypatch):
    # Every gradient here is longer than the clip norm, and Adam does not see its scale: this fails
    # without clipping, but not with another norm.
    _, losses = interrupted(page, monkeypatch, 10)
    np.testing.assert_allclose(losses, package_losses(), rtol=1e-5)


def test_its_test_images_are_those_of_the_package(page):
    images = as_floats(tiny.DIGITS, load("bundled").test[:IMAGES])
    np.testing.assert_array_equal(page.load("test"), images)


def test_it_is_a_page_of_150_lines():
    assert SOURCE.count("\n") <= 150


def test_it_imports_jax_numpy_and_the_standard_library():
    names = tiny.imported(SOURCE)
    assert {name.split(".")[0] for name in names} <= {"jax", "numpy", *sys.stdlib_module_names}


def test_nothing_happens_when_it_is_imported():
    *statements, last = ast.parse(SOURCE).body
    assert ast.unparse(last) == "if __name__ == '__main__':\n    main()"
    for statement in statements:
        if isinstance(statement, ast.FunctionDef):
            assert not statement.decorator_list
            statement.body = []  # it runs when it is called; the defaults run at import
        assert not any(isinstance(node, ast.Call) for node in ast.walk(statement))


def test_a_character_is_two_pixels_one_above_the_other(page):
    pixels = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]])
    assert page.draw(pixels) == "▀▄█ \n   █"


@pytest.mark.slow  # trains for 4 seconds
def test_ctrl_c_ends_the_training_and_keeps_what_it_learned(page, monkeypatch):
    (_, automaton), losses = interrupted(page, monkeypatch, 2)
    assert len(losses) == 2
    assert np.any(automaton[-1][1])  # zero before the first update


@pytest.mark.slow
def test_it_trains_measures_and_draws(page, capsys):
    page.main(IMAGES)
    first, update, bound, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("update 1 of 100: loss ")
    assert update.startswith("update 100 of 100: loss ")
    assert bound.startswith(f"ELBO of the first {IMAGES} test images: -")
    assert len(lines) == 4 * 14  # four rows of digits, 28 pixels high
    assert {len(line) for line in lines} == {80}
    assert set("".join(lines)) <= set(" ▄▀█")
