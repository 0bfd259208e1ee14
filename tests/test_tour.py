"""The tour in BUILD_NOTES.md: its names, its shapes and its tests are those of the method."""

import importlib
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import baseline, celeba, doubling, growing, nondoubling, small_healing
from vnca import losses, optimizer, pool, training
from vnca.fast import cpu
from vnca.likelihoods import as_floats
from vnca.model import make_model
from vnca.program import data
from vnca.program.order import batches

HERE = Path(__file__).parent
NOTES = (HERE.parent / "BUILD_NOTES.md").read_text(encoding="utf-8")
TOUR = NOTES.partition("\n## A tour for the auditor\n")[2].partition("\n## ")[0]
HOME = r"vnca\.(?:models\.|fast\.|program\.|report\.)?\w+"
NAMES = re.findall(rf"`({HOME})\.(\w+)`", TOUR)
ROWS = re.findall(rf"^\| `({HOME})\.(\w+)` \| .+? \| (.+?) \| ", TOUR, re.M)
B, K = 4, 3  # images, updates
# The functions whose arrays the walks below do not see.
UNSEEN = {"make", "make_update_call", "fixed_shuffle", "image_bounds", "estimator", "log_weights"}
INNER = {  # functions within one that a row is about
    f"{name}.<locals>.log_prob": name for name in ("binomial", "logistic_mixture")
}


def test_every_function_and_every_test_that_the_tour_names_exists():
    assert len(set(NAMES)) >= 20 and len(re.findall(rf"`{HOME}\.\w", TOUR)) == len(NAMES)
    for home, name in NAMES:
        assert getattr(importlib.import_module(home), name).__module__ == home, name
    tests = "".join(path.read_text(encoding="utf-8") for path in HERE.rglob("test_*.py"))
    assert [t for t in re.findall(r"`(test_\w+)`", TOUR) if f"def {t}(" not in tests] == []


def test_no_loss_and_nothing_of_the_optimizer_is_left_out():
    own = [f for m in (losses, optimizer) for f in vars(m).values() if hasattr(f, "__code__")]
    assert {(f.__module__, f.__name__) for f in own} <= set(NAMES)


def test_every_row_with_an_equation_or_a_rule_names_a_test():
    rows = re.findall(rf"^\| `{HOME}\.(\w+)` \| (.+?) \| .+? \| (.+) \|$", TOUR, re.M)
    assert len(rows) == len(ROWS)
    assert [name for name, rule, note in rows if rule != "–" and "`test_" not in note] == []


def update(learner, config, images):
    """One update on one device, as in a map over the devices."""
    config.train.update(batch_size=B, micro_batch=B)
    state = training.init_state(learner, config, images)
    fresh = B // 2 if state.pool else B
    indices = batches(config.seed, 1, K, B, len(images))[:1, :fresh]
    states = state._replace(pool=jax.tree.map(lambda x: x[None], state.pool))
    axes = training.State(None, None, None, None, 0)
    step = jax.vmap(partial(training.one_update, learner, config), (axes, None, 0), 0, "devices")
    step(states, images, indices)
    return state


def published(config, images, z):
    """An update of the doubling model, its IWELBO, and the baseline's decoder."""
    model = make_model(config.model)
    state = update(training.Learner(model), config, images)
    x = as_floats(model.likelihood, images[:B])
    losses.iwelbo(model, state.params, x, lambda s: z, 128)
    mirror = make_model(baseline.get_config().model)
    mirror.decode(mirror.init(jax.random.key(0)), z)


def pooled(config, images, z):
    """An update of the non-doubling model."""
    model = make_model(config.model)
    learner = training.Learner(model, pool.pool_gradient, pool.init_pool)
    update(learner, config, images)


def grown(config, images, z):
    """The cells of another automaton."""
    model = make_model(config.model)
    model.decode(model.init(jax.random.key(0)), z[:, : model.latent_size])


def mixed(config, images, z):
    """The likelihood of images of CelebA's shape."""
    likelihood = make_model(config.model).likelihood
    likelihood.log_prob(jnp.zeros((B, 64, 64, likelihood.outputs)), jnp.zeros((B, 64, 64, 3)))


def on_a_cpu(config, images, z):
    """The gradient of the loss of the doubling model with the layers of a CPU."""
    model = make_model(config.model, cpu)
    params = model.init(jax.random.key(0))
    x = as_floats(model.likelihood, images[:B])
    jax.grad(partial(training.loss, model), has_aux=True)(params, x, z)


@pytest.mark.slow
def test_the_tour_states_the_shapes_of_traced_updates(request):
    found = {}
    request.addfinalizer(lambda: sys.setprofile(None))
    for walk, module in (
        (published, doubling), (pooled, nondoubling), (grown, small_healing),
        (grown, growing), (on_a_cpu, doubling), (mixed, celeba),
    ):  # fmt: skip
        new = {row[:2]: [] for row in ROWS if not found.get(row[:2])}

        def watch(frame, event, result, new=new):
            name = INNER.get(frame.f_code.co_qualname, frame.f_code.co_name)
            function = frame.f_globals.get("__name__"), name
            if event == "return" and function in new:
                shapes = [str([*x.shape]) for x in jax.tree.leaves(result) if hasattr(x, "shape")]
                new[function].extend({", ".join(shapes)} - {"", *new[function]})  # if a new one

        sys.setprofile(watch)
        z = jax.ShapeDtypeStruct((B, 256), np.float32)
        jax.eval_shape(partial(walk, module.get_config()), data.load("bundled").train, z)
        sys.setprofile(None)
        found |= new
    stating = [row for row in ROWS if "[" in row[2]]
    compared = [row for row in stating if found[row[:2]]]
    assert {name for _, name, _ in stating} - {name for _, name, _ in compared} == UNSEEN
    for home, name, cell in compared:
        stated = ", ".join(re.findall(r"\[.*?\]", cell))
        stated = stated.replace("B/2", str(B // 2)).replace("B", str(B)).replace("K", str(K))
        shapes = ", ".join(found[home, name])
        assert shapes == stated or "…" in cell and shapes.startswith(stated), name
