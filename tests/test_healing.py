"""The healing model: what its cells keep, what a lost cell inherits, and how it is trained."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from configs import small_healing
from vnca import layers
from vnca.fast import gpu
from vnca.likelihoods import binomial
from vnca.model import make_model
from vnca.models import healing
from vnca.pool import init_pool, pool_gradient
from vnca.program.data import load
from vnca.program.order import batches
from vnca.training import Learner, init_state, make_update_call

pytestmark = pytest.mark.usefixtures("quickly_compiled")

LATENT, CHANNELS, WAVES = 4, 13, 2  # the logit, 8 channels of the position, 4 of z
MODEL = healing.make(layers, tiny.DIGITS, LATENT, 2, 2, (1, 3), CHANNELS, 7, WAVES)
COLOUR = healing.make(layers, binomial(16, 3, 16), LATENT, 2, 2, (1, 3), CHANNELS + 3, 7, WAVES)
Z = np.random.RandomState(0).randn(2, LATENT).astype(np.float32)


def random_decoder(scale=0.2, model=MODEL):
    """Parameters of the decoder of which none is zero, so that every array counts."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))["decoder"]
    return {"decoder": reference.numbers_like(shapes, 1, scale)}


# ---- Cells -----------------------------------------------------------------------------------


def test_cells_begin_with_zeros_their_position_and_the_latent():
    s = MODEL.initial_cells(Z)
    assert s.shape == (2, 32, 32, CHANNELS)
    for row, column in [(0, 0), (5, 31), (16, 7)]:
        waves = [
            f(math.pi * turns * (line + 0.5) / 32)
            for line in (row, column)
            for f in (math.sin, math.cos)
            for turns in (1, 2)
        ]
        for z, cell in zip(Z, s[:, row, column], strict=True):
            np.testing.assert_allclose(cell, [0, *waves, *z], atol=1e-6)
    assert MODEL.initial_cells(Z.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("size", [16, 32])
def test_no_two_cells_have_the_same_position(size):
    found = np.asarray(healing.positional_encoding(size, 1)).reshape(-1, 4)
    others = ~np.eye(size**2, dtype=bool)
    assert np.abs(found[:, None] - found).max(axis=-1)[others].min() > 1e-3


@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_kernel_of_inheritance_rotates_each_neighbours_position_to_the_cells_own(size):
    position = np.asarray(healing.positional_encoding(size, WAVES), np.float64)
    kernel = np.asarray(healing.inheritance_kernel(size, WAVES, LATENT), np.float64)
    row, column = size // 2, size // 4
    for i, j in np.ndindex(3, 3):
        neighbour = position[row - 1 + i, column - 1 + j]
        found = np.concatenate([neighbour, np.ones(LATENT + 1)]) @ kernel[i, j]
        np.testing.assert_allclose(found, [*position[row, column], *np.ones(LATENT + 1)], atol=1e-6)


@pytest.mark.parametrize("nn", [layers, gpu], ids=["plain", "gpu"])  # a TPU has the plain layers
def test_accelerators_do_not_round_what_cells_hand_on(nn):
    kept = jax.ShapeDtypeStruct((1, 32, 32, 4 * WAVES + LATENT), np.float32)
    jaxpr = jax.make_jaxpr(partial(healing.inherit, nn, waves=WAVES))(kept)
    parameters = [e.params for e in reference.equations(jaxpr)]
    found = [of["precision"] for of in parameters if "precision" in of]
    assert found and all(set(precision) == {jax.lax.Precision.HIGHEST} for precision in found)


@pytest.mark.parametrize(("model", "size", "colours"), [(MODEL, 32, 1), (COLOUR, 16, 3)])
def test_the_model_grows_as_loops_over_its_cells_do(model, size, colours):
    params = random_decoder(model=model)
    both = jax.jit(lambda p, z: (model.grow(p, z), model.decode(p, z)))
    (stage,), logits = both(params, Z)
    s = np.asarray(model.initial_cells(Z), np.float64)
    assert stage.shape == (3, 2, size, size, colours)
    tiny.close(stage[0], s[..., :colours])
    for after_step in stage[1:]:
        s = reference.healing_step(tiny.in_float64(params["decoder"]), s, WAVES)
        tiny.close(after_step, s[..., :colours])
    assert np.array_equal(logits, stage[-1])


def test_a_lost_cell_begins_anew_with_what_those_around_it_have_and_no_step_changes_that():
    params = random_decoder()
    weights, step = tiny.in_float64(params["decoder"]), jax.jit(MODEL.step)
    assert len(weights["residual"]["bias"]) == CHANNELS - 4 * WAVES - LATENT  # the channels left
    cells = np.random.RandomState(3).randn(2, 8, 7, CHANNELS)
    cells[0, 2:7, 3:7] = cells[1, :3, :3] = 0  # from a border on, and from a corner
    begun, s = cells, np.float32(cells)
    for left in (9, 2, 0):  # of 20 cells, whose hole closes from three sides
        s, cells = step(params, s), reference.healing_step(weights, cells, WAVES)
        tiny.close(s, cells)
        assert (np.asarray(s)[0] == 0).all(axis=-1).sum() == left
    kept = begun.any(axis=-1)
    np.testing.assert_array_equal(np.asarray(s)[kept][:, 1:], np.float32(begun)[kept][:, 1:])


def test_a_hole_in_a_digit_has_its_position_and_its_latent_again():
    s = np.array(MODEL.initial_cells(Z))
    s[:, 4:20, 9:25] = 0
    params, step = random_decoder(0.01), jax.jit(MODEL.step)
    for _ in range(8):  # half of the hole's side
        assert (s == 0).all(axis=-1).any()
        s = np.array(step(params, s))
    np.testing.assert_allclose(s[..., 1:], MODEL.initial_cells(Z)[..., 1:], atol=1e-6)


def test_cells_with_a_latent_of_zeros_are_alive():
    params = random_decoder(0.01)
    s = MODEL.initial_cells(np.zeros((1, LATENT), np.float32))
    grown = MODEL.step(params, s)
    np.testing.assert_array_equal(grown[..., 1:], s[..., 1:])
    assert (np.asarray(grown[..., 0]) != 0).all()


def test_the_gradient_of_developing_is_that_of_the_steps_taken_alone():
    params = random_decoder()
    cells = np.random.RandomState(3).randn(1, 3, 3, CHANNELS).astype(np.float32)
    cells[0, 1, 1:] = 0  # lost
    weights = np.random.RandomState(4).randn(*cells.shape)

    def two_steps(kernel):
        params["decoder"]["residual"]["kernel"] = kernel
        step = partial(reference.healing_step, params["decoder"], waves=WAVES)
        return np.sum(weights * step(step(cells)))

    def developed(params):
        return jnp.sum(weights.astype(np.float32) * MODEL.develop(params, cells, 2))

    found = jax.jit(jax.grad(developed))(params)["decoder"]["residual"]["kernel"]
    kernel = params["decoder"]["residual"]["kernel"].astype(np.float64)
    tiny.close(found, reference.gradient(two_steps, kernel))


# ---- Training --------------------------------------------------------------------------------

BATCH, FRESH = 32, 8


@pytest.fixture(scope="module")
def images():
    return load("bundled").train


@pytest.fixture(scope="module")
def trained(images):
    """The encoder that is given, the states before the first update and after each of two, and
    `go_on`: state -> state, metrics [4] of the next update. All arrays are NumPy's."""
    config = small_healing.get_config()
    config.model.update(
        latent_size=3, encoder_width=1, steps=3, train_steps=(1, 3), channels=9, hidden=4,
        position_waves=1,
    )  # fmt: skip
    config.train.update(
        batch_size=BATCH, pool_size=64, pool_from=2, pool_fresh=FRESH, encoder_from="elsewhere",
        micro_batch=8, updates_per_call=3,
    )  # fmt: skip
    learner = Learner(make_model(config.model), pool_gradient, init_pool)
    call = make_update_call(learner, config)

    def go_on(state):
        order = batches(config.seed, int(state.update) + 1, 3, FRESH, len(images))
        copy = jax.tree.map(np.array, state)  # because the call uses it up
        copy = copy._replace(pool=jax.tree.map(lambda x: x[None], copy.pool))
        after, metrics = jax.device_get(call(copy, images, order[None], np.int32(1)))
        return after._replace(pool=jax.tree.map(lambda x: x[0], after.pool)), metrics[0]

    shapes = jax.eval_shape(learner.model.init, jax.random.key(0))["encoder"]
    encoder = reference.numbers_like(shapes, 2, 0.1)
    states = [jax.device_get(init_state(learner, config, images, {"encoder": encoder}))]
    for _ in range(2):
        states.append(go_on(states[-1])[0])
    return encoder, states, go_on


def test_before_update_pool_from_the_cells_of_the_pool_play_no_part(trained):
    _, (before, after, _), go_on = trained

    def loss(state, shift):
        cells = state.pool.cells + np.float32(shift)
        return go_on(state._replace(pool=state.pool._replace(cells=cells)))[1][0]

    assert loss(before, 0) == loss(before, 1)  # update 1
    assert loss(after, 0) != loss(after, 1)  # update 2, the first with the pool


def test_a_given_encoder_stays_as_it_is_while_the_decoder_learns(trained):
    encoder, states, _ = trained
    for state in states:
        jax.tree.map(np.testing.assert_array_equal, state.params["encoder"], encoder)
    first, *others = (state.params["decoder"]["residual"] for state in states)
    for other in others:
        assert all((other[name] != first[name]).any() for name in first)


def test_fewer_fresh_images_leave_more_of_the_batch_to_the_pool(trained, images):
    _, (_, one, two), _ = trained
    fresh = np.isin(two.pool.indices, batches(0, 2, 1, FRESH, len(images))[0])
    taken = (two.pool.cells != one.pool.cells).any(axis=(1, 2, 3)) & ~fresh
    assert taken.sum() == BATCH - FRESH and fresh.sum() == FRESH
