"""Pool training of the non-doubling model: what an update does to the pool, seen from outside."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from configs import nondoubling
from vnca import layers
from vnca.likelihoods import as_floats, binomial
from vnca.losses import gaussian_kl
from vnca.model import make_model
from vnca.models import nondoubling as nondoubling_model
from vnca.pool import (
    Batch,
    Pool,
    damage_mask,
    draw_batch,
    fresh_images,
    growth_gradient,
    init_pool,
    pool_gradient,
    put_back,
)
from vnca.program.data import load
from vnca.program.learner import make_learner
from vnca.program.order import batches
from vnca.training import Learner, State, init_state, make_update_call, normal, stream

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BATCH, POOL = 32, 64
SEED = 9


def small_config():
    config = nondoubling.get_config()
    config.model.latent_size, config.model.encoder_width = 3, 1
    config.model.steps, config.model.train_steps = 3, (1, 3)
    config.train.batch_size, config.train.pool_size = BATCH, POOL
    config.train.micro_batch, config.train.updates_per_call = 8, 3
    config.seed = SEED
    return config


@pytest.fixture(scope="module")
def images():
    return load("bundled").train


@pytest.fixture(scope="module")
def start(images):
    config = small_config()
    learner = Learner(make_model(config.model), pool_gradient, init_pool)
    return config, learner, init_state(learner, config, images)


CALLS = {}  # by number of devices: compiling is what takes the time here


def run(start, images, devices, updates, first=1):
    """The state after some updates on the first devices, its pool whole again; and the metrics."""
    config, learner, state = start
    if devices not in CALLS:
        CALLS[devices] = make_update_call(learner, config)
    split = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), state.pool)
    order = batches(config.seed, first, 3, BATCH // 2, len(images)).reshape(3, devices, -1)
    copy = jax.tree.map(np.array, jax.device_get(state._replace(pool=split)))
    after, metrics = CALLS[devices](copy, images, order.swapaxes(0, 1), np.int32(updates))
    whole = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), after.pool)
    return jax.device_get(after._replace(pool=whole)), np.asarray(metrics)[:updates]


@pytest.fixture(scope="module")
def after_one(start, images):
    return run(start, images, 1, 1)[0]


def test_the_pool_starts_as_the_first_images_with_z_in_every_cell(start, images):
    _, learner, (params, *_, pool) = start
    assert pool.indices.tolist() == list(range(POOL))
    assert (pool.cells == pool.cells[:, :1, :1]).all()  # one z, copied over the grid
    mean, logvar = learner.model.encode(params, as_floats(tiny.DIGITS, images[:POOL]))
    noise = normal(stream(SEED, "posterior", 0), np.arange(POOL), 3)
    np.testing.assert_allclose(pool.cells[:, 0, 0], mean + np.exp(logvar / 2) * noise, rtol=1e-5)


# The last convolution of the automaton starts at zero, so in the first update cells do not change
# by themselves: what changes in the pool is what was put there and what was damaged.


def test_an_update_overwrites_as_many_slots_as_the_batch_and_no_other(start, images, after_one):
    before, after = start[2].pool, after_one.pool
    fresh = batches(SEED, 1, 1, BATCH // 2, len(images))[0]
    replaced = np.isin(after.indices, fresh)
    assert replaced.sum() == BATCH // 2
    assert sorted(after.indices[replaced]) == sorted(fresh)
    kept = np.arange(POOL)[~replaced]
    assert (after.indices[kept] == before.indices[kept]).all()
    changed = (after.cells != before.cells).any(axis=(1, 2, 3))
    assert changed.sum() == BATCH // 2 + BATCH // 4  # the fresh, and the damaged
    assert changed[replaced].all()


def test_damage_zeroes_one_square_and_leaves_the_rest_untouched(start, images, after_one):
    before, after = np.asarray(start[2].pool.cells), after_one.pool
    fresh = np.isin(after.indices, batches(SEED, 1, 1, BATCH // 2, len(images))[0])
    damaged = np.flatnonzero((after.cells != before).any(axis=(1, 2, 3)) & ~fresh)
    assert len(damaged) == BATCH // 4
    for row in damaged:
        zero = (after.cells[row] == 0).all(axis=-1)
        lines, columns = (np.flatnonzero(zero.any(axis=axis)) for axis in (1, 0))
        assert len(lines) == len(columns) == 16 and np.ptp(lines) == np.ptp(columns) == 15
        assert zero.sum() == 16 * 16
        assert (after.cells[row][~zero] == before[row][~zero]).all()


def test_fresh_slots_hold_a_sample_for_their_own_image(start, images, after_one):
    _, (model, *_), state = start
    fresh = batches(SEED, 1, 1, BATCH // 2, len(images))[0]
    rows = [int(np.flatnonzero(after_one.pool.indices == n)[0]) for n in fresh]
    z = after_one.pool.cells[rows]
    assert (z == z[:, :1, :1]).all()
    mean, logvar = jax.jit(model.encode)(state.params, as_floats(tiny.DIGITS, images[fresh]))
    noise = (z[:, 0, 0] - mean) / np.exp(0.5 * logvar)
    assert abs(noise.mean()) < 0.5 and 0.6 < noise.std() < 1.5 and abs(noise).max() < 5


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("fresh", [8, 2])
def test_a_batch_has_its_fresh_images_and_then_those_of_slots_that_they_go_back_to(devices, fresh):
    # The cells of row n are n + 1, and its image is 100 + n. The fresh images are 0, 1, …
    size, damaged = 16, 4
    cells = np.broadcast_to(np.arange(1.0, 65).reshape(-1, 1, 1, 1), (64, 32, 32, 2))
    pool = Pool(cells.astype(np.float32), np.arange(100, 164, dtype=np.int32))
    pool = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), pool)
    indices = np.arange(fresh, dtype=np.int32).reshape(devices, -1)
    config = small_config()
    config.train.update(batch_size=size, pool_fresh=fresh, pool_from=5)

    def draw(pool, indices):
        state = State(None, None, None, jnp.int32(SEED), pool)
        batch = draw_batch(state, config, 5, indices)
        earlier = draw_batch(state, config, 4, indices)
        return batch, earlier, put_back(pool, batch, batch.cells - 1000, len(indices))

    found = jax.jit(jax.vmap(draw, axis_name="devices"))(pool, indices)
    batch, earlier, after = jax.device_get(found)
    of_pool = np.arange(size // devices) >= fresh // devices  # on each device
    assert (batch.from_pool == of_pool).all()
    assert not earlier.from_pool.any()  # before update `train.pool_from`
    assert batch.indices[:, ~of_pool].ravel().tolist() == list(range(fresh))
    assert (batch.cells[:, ~of_pool] == 0).all()
    assert batch.places[:, ~of_pool].ravel().tolist() == list(range(fresh))
    assert batch.places[:, of_pool].ravel().tolist() == list(range(fresh, size))
    largest = batch.cells[:, of_pool].max(axis=(2, 3, 4))  # damage leaves some cells
    assert (largest == batch.indices[:, of_pool] - 99).all()
    holes = (batch.cells[:, of_pool] == 0).any(axis=(2, 3, 4)).ravel()
    assert holes.tolist() == [True] * damaged + [False] * (size - fresh - damaged)
    for rows in (batch.overwritten, batch.taken):
        assert (rows == rows[0]).all()  # the same on all devices
    overwritten, taken = batch.overwritten[0], batch.taken[0]
    assert len(overwritten) == fresh and len({*overwritten, *taken}) == size
    whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), after)
    (changed,) = np.nonzero((whole.cells < 0).any(axis=(1, 2, 3)))
    assert sorted([*overwritten, *taken]) == changed.tolist()
    for rows, part in ((overwritten, ~of_pool), (taken, of_pool)):
        assert (whole.cells[rows] == batch.cells[:, part].reshape(-1, 32, 32, 2) - 1000).all()
        assert (whole.indices[rows] == batch.indices[:, part].ravel()).all()
    assert (taken == batch.indices[:, of_pool].ravel() - 100).all()


@pytest.mark.parametrize(
    "name, fields, expected",
    [
        ("nondoubling", {}, 16),
        ("healing", {"train__pool_fresh": None}, 16),
        ("healing", {"train__pool_fresh": 8}, 8),
        ("doubling", {}, 8),
    ],
)
def test_half_of_the_batch_is_fresh_or_as_many_as_is_said_or_all_without_a_pool(
    name, fields, expected
):
    assert fresh_images(tiny.config(name, **fields)) == expected


def test_corners_of_the_damage_are_uniform_in_0_to_15():
    masks = jax.vmap(lambda k: damage_mask(k, 32, 16))(jax.random.split(jax.random.key(0), 4000))
    top = np.argmax(np.asarray(masks)[:, :, :, 0].any(axis=2), axis=1)
    left = np.argmax(np.asarray(masks)[:, :, :, 0].any(axis=1), axis=1)
    for corner in (top, left):
        counts = np.bincount(corner, minlength=16)
        assert len(counts) == 16 and counts.min() > 180 and counts.max() < 320  # 250 ± 4.5 sigma


@pytest.mark.parametrize(("grid", "size"), [(16, 8), (16, 15), (64, 16), (64, 63)])
def test_damage_is_a_whole_square_on_a_grid_of_any_size(grid, size):
    masks = jax.vmap(lambda k: damage_mask(k, grid, size))(jax.random.split(jax.random.key(0), 300))
    rows, columns = (np.asarray(masks)[..., 0].any(axis=axis) for axis in (2, 1))
    assert masks.shape == (300, grid, grid, 1)
    assert (masks[..., 0] == rows[:, :, None] & columns[:, None]).all()
    for lines in (rows, columns):
        assert (lines.sum(axis=1) == size).all()
        assert {*lines.argmax(axis=1)} == {*range(grid - size)}  # all places but the last


def test_every_device_count_trains_alike_and_fills_the_same_pool(start, images):
    one, losses = run(start, images, 1, 3)
    eight, same = run(start, images, 8, 3)
    np.testing.assert_allclose(same, losses, rtol=1e-4)
    assert (one.pool.indices == eight.pool.indices).all()
    np.testing.assert_allclose(eight.pool.cells, one.pool.cells, atol=1e-4)


def test_the_loss_is_that_of_the_grown_cells_on_their_own_images(start, images, after_one):
    # Every result of an update is in the pool, so its loss can be had from there: NumPy's, of the
    # final cells' logits, and the KL of each image under the parameters from before.
    config, learner, _ = start
    # The second update: in the first, cells do not change by themselves.
    state, metrics = run((config, learner, after_one), images, 1, 1, first=2)
    loss, reconstruction, kl, _ = metrics[0]
    before, after = after_one.pool, state.pool
    changed = (after.cells != before.cells).any(axis=(1, 2, 3))
    assert changed.sum() == BATCH
    x = np.asarray(as_floats(tiny.DIGITS, images[after.indices[changed]]))
    logits = after.cells[changed][..., :1].astype(np.float64)
    encoded = jax.jit(learner.model.encode)(after_one.params, x)
    mean, logvar = (np.asarray(a, np.float64) for a in encoded)
    of_each = np.sum(np.logaddexp(0, logits) - x * logits, axis=(1, 2, 3))
    divergence = 0.5 * np.sum(np.exp(logvar) + mean**2 - 1 - logvar, axis=1)
    assert reconstruction == pytest.approx(of_each.mean(), rel=1e-5)
    assert kl == pytest.approx(divergence.mean(), rel=1e-4)
    assert loss == pytest.approx(reconstruction + kl, rel=1e-6)


def test_all_logits_of_a_colour_image_count_in_the_loss_of_its_grown_cells():
    config = tiny.config("nondoubling")
    model = nondoubling_model.make(layers, binomial(16, 3, 16), 5, 1, 2, (2, 2))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = reference.numbers_like(shapes, 1, 0.1)
    random = np.random.RandomState(0)
    images = random.randint(17, size=(4, 16 * 16 * 3), dtype=np.uint8)
    cells = random.randn(4, 16, 16, 5).astype(np.float32)
    place, from_pool = np.arange(4), np.arange(4) > 1
    batch = Batch(place, place, cells, from_pool, overwritten=None, taken=None)
    state = State(params, None, None, np.int32(SEED), None)
    _, terms, grown = jax.jit(partial(growth_gradient, model, config))(state, 1, images, batch)
    heads = images.reshape(4, 16, 16, 3)
    logits = np.asarray(grown[..., :3], np.float64)
    ways = np.vectorize(lambda k: math.log(math.comb(16, k)))(heads)
    nats = np.sum(ways + heads * logits - 16 * np.logaddexp(0, logits), axis=(1, 2, 3))
    assert float(terms[1]) == pytest.approx(-nats.mean(), rel=1e-5)


def test_images_of_the_pool_reach_the_encoder_through_the_kl_alone(start, images):
    config, (model, *_), state = start
    params = state.params | {"decoder": reference.numbers_like(state.params["decoder"], 4, 0.1)}
    cells = np.random.RandomState(5).randn(4, 32, 32, 3).astype(np.float32)
    place = np.arange(4)
    batch = Batch(place, place, cells, np.ones(4, bool), overwritten=None, taken=None)
    model, config = model._replace(train_steps=(2, 2)), config.copy_and_resolve_references()
    config.train.kl_weight = 3.0

    def gradient(batch, images):
        begun = state._replace(params=params)
        return growth_gradient(model, config, begun, 1, images, batch)

    def kl(encoder):
        return gaussian_kl(
            *model.encode({"encoder": encoder}, as_floats(tiny.DIGITS, images[:4]))
        ).mean()

    found, terms, _ = jax.jit(gradient)(batch, images[:4])
    expected = jax.jit(jax.grad(lambda encoder: 3 * kl(encoder)))(params["encoder"])
    jax.tree.map(lambda a, b: tiny.close(a, b, 1e-4), found["encoder"], expected)
    assert float(terms[2]) == pytest.approx(float(kl(params["encoder"])), rel=1e-5)
    # A fresh image also reaches it through z.
    fresh = batch._replace(from_pool=np.zeros(4, bool))
    found, _, _ = jax.jit(gradient)(fresh, images[:4])
    kernels = [encoder["conv0"]["kernel"] for encoder in (found["encoder"], expected)]
    assert np.abs(kernels[0] - kernels[1]).max() > np.abs(kernels[1]).max()


def test_each_update_draws_its_steps_and_its_slots(start, images):
    # With weights of one, more steps are larger numbers: an update's results tell its steps.
    config, learner, state = start
    call = CALLS.setdefault(1, make_update_call(learner, config))
    params = state.params | {"decoder": jax.tree.map(np.ones_like, state.params["decoder"])}
    order, sizes = batches(config.seed, 1, 3, BATCH // 2, len(images))[None], []
    indices, written = state.pool.indices + POOL, []  # other images than those of the batch
    for update in range(12):
        pool = Pool(np.ones_like(state.pool.cells)[None], indices[None])
        begun = state._replace(params=params, update=np.int32(update), pool=pool)
        begun = jax.tree.map(np.array, jax.device_get(begun))
        after, _ = call(begun, images, order, np.int32(1))
        sizes.append(round(float(np.log10(np.max(after.pool.cells)))))
        written.append(frozenset(np.flatnonzero(after.pool.indices[0] != indices)))
    assert len(set(sizes)) == 3
    # Rows for the fresh images are drawn anew in each update, from the whole pool.
    assert len(set(written)) == 12 and len(frozenset.union(*written)) > 0.9 * POOL


@pytest.mark.parametrize("name", ["nondoubling", "healing"])
def test_all_that_an_update_draws_comes_from_the_seed_a_purpose_and_the_number_of_the_update(
    name, images, monkeypatch
):
    drawn, config = [], tiny.config(name, seed=SEED)
    monkeypatch.setattr("vnca.pool.stream", lambda *names: drawn.append(names) or stream(*names))
    learner = make_learner(config, plain=True)
    state = jax.eval_shape(lambda: init_state(learner, config, images))
    assert drawn.pop() == (SEED, "posterior", 0) and not drawn
    of_devices = jax.tree.map(lambda x: np.zeros((1, *x.shape), x.dtype), state.pool)

    def gradient(params, pool, images, indices):
        state = State(params, None, None, SEED, pool)
        return learner.gradient(learner.model, config, state, 7, images, indices)

    order = np.zeros((1, fresh_images(config)), np.int32)
    across = jax.vmap(gradient, (None, 0, None, 0), axis_name="devices")
    jax.eval_shape(across, state.params, of_devices, images, order)
    purposes = "damage", "pool", "posterior", "steps"
    assert sorted(drawn) == [(SEED, purpose, 7) for purpose in purposes]


def test_two_updates_in_one_call_are_two_calls_with_the_pool_written_out_between(
    start, images, after_one
):
    config, learner, _ = start
    together, _ = run(start, images, 1, 2)
    apart, _ = run((config, learner, after_one), images, 1, 1, first=2)
    jax.tree.map(np.testing.assert_array_equal, apart, together)


def test_no_more_images_are_computed_at_once_than_micro_batch_says(start, images):
    # Two fresh images and fourteen rows of the pool make eight images on each of two devices.
    config, (model, *_), state = start
    config = config.copy_and_resolve_references()
    config.train.update(batch_size=16, pool_fresh=2, micro_batch=4)
    at_once = []

    def encode(params, x):
        at_once.append(("encode", len(x)))
        return model.encode(params, x)

    def develop(params, s, count):
        at_once.append(("develop", len(s)))
        return model.develop(params, s, count)

    watched = model._replace(encode=encode, develop=develop)
    call = make_update_call(Learner(watched, pool_gradient, init_pool), config)
    pool = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), state.pool)
    order = np.zeros((2, 3, 1), np.int32)
    jax.eval_shape(call, state._replace(pool=pool), images, order, np.int32(1))
    assert set(at_once) == {("encode", 4), ("develop", 4)}


def test_what_moves_between_devices_is_the_grids_of_the_batch_not_the_pool(start, images):
    config, learner, state = start
    pool = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), state.pool)
    order = np.zeros((8, 3, BATCH // 16), np.int32)
    lowered = CALLS.setdefault(8, make_update_call(learner, config)).lower(
        state._replace(pool=pool), images, order, np.int32(1)
    )
    text = lowered.compile().as_text()
    moved = 0
    for shape in re.findall(r"= (.*?) (?:reduce-scatter|all-gather)(?:-start)?\(", text):
        for size in re.findall(r"[fsu]32\[([\d,]*)\]", shape):
            moved += 4 * int(np.prod([int(n) for n in size.split(",") if n]))
    row = 32 * 32 * 3 * 4
    assert BATCH * row <= moved <= 1.01 * (BATCH + BATCH // 16) * row  # results; rows taken / 8
    for other in ("all-to-all", "collective-permute"):
        assert f" {other}" not in text
