"""Pool training of the non-doubling model: what an update does to the pool, seen from outside."""

import re

import jax
import numpy as np
import pytest

from configs import nondoubling
from vnca.images import unpack
from vnca.models import make_model
from vnca.pool import put, take, undamaged
from vnca.program.data import load
from vnca.program.order import batches
from vnca.training import init_state, make_update_call

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BATCH, POOL = 32, 64
BEFORE = [775.36835, 893.00952, 846.29712]  # losses, nats, of three updates


def small_config():
    config = nondoubling.get_config()
    config.model.latent_size, config.model.encoder_width = 3, 1
    config.model.steps, config.model.train_steps = 3, (1, 3)
    config.train.batch_size, config.train.pool_size = BATCH, POOL
    config.train.micro_batch, config.train.updates_per_call = 8, 3
    return config


@pytest.fixture(scope="module")
def images():
    return load("bundled").train


@pytest.fixture(scope="module")
def start(images):
    config = small_config()
    model = make_model(config.model)
    return config, model, init_state(model, config, images)


CALLS = {}  # by number of devices: compiling is what takes the time here


def run(start, images, devices, updates, first=1):
    """The state after some updates on the first devices, its pool whole again; and the metrics."""
    config, model, state = start
    if devices not in CALLS:
        CALLS[devices] = make_update_call(model, config)
    split = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), state["pool"])
    order = batches(config.seed, first, 3, BATCH // 2, len(images)).reshape(3, devices, -1)
    copy = jax.tree.map(np.array, jax.device_get(state | {"pool": split}))
    after, metrics = CALLS[devices](copy, images, order.swapaxes(0, 1), np.int32(updates))
    whole = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), after["pool"])
    return jax.device_get(after | {"pool": whole}), np.asarray(metrics)[:updates]


@pytest.fixture(scope="module")
def after_one(start, images):
    return run(start, images, 1, 1)[0]


def test_the_pool_starts_as_the_first_images_with_z_in_every_cell(start, images):
    config, model, state = start
    pool = state["pool"]
    assert pool["numbers"].tolist() == list(range(POOL))
    assert pool["cells"].shape == (POOL, 32, 32, 3)
    assert (pool["cells"] == pool["cells"][:, :1, :1]).all()  # one z, copied over the grid
    assert np.unique(pool["cells"][:, 0, 0, 0]).size == POOL  # another for each image


# The last convolution of the automaton starts at zero, so in the first update cells do not change
# by themselves: what changes in the pool is what was put there and what was damaged.


def test_an_update_overwrites_as_many_rows_as_the_batch_and_no_other(start, images, after_one):
    before, after = start[2]["pool"], after_one["pool"]
    fresh = batches(0, 1, 1, BATCH // 2, len(images))[0]
    replaced = np.isin(after["numbers"], fresh)
    assert replaced.sum() == BATCH // 2
    assert sorted(after["numbers"][replaced]) == sorted(fresh)
    kept = np.arange(POOL)[~replaced]
    assert (after["numbers"][kept] == before["numbers"][kept]).all()
    changed = (after["cells"] != before["cells"]).any(axis=(1, 2, 3))
    assert changed.sum() == BATCH // 2 + BATCH // 4  # the fresh, and the damaged
    assert changed[replaced].all()


def test_damage_zeroes_one_square_and_leaves_the_rest_untouched(start, images, after_one):
    before, after = np.asarray(start[2]["pool"]["cells"]), after_one["pool"]
    fresh = np.isin(after["numbers"], batches(0, 1, 1, BATCH // 2, len(images))[0])
    damaged = np.flatnonzero((after["cells"] != before).any(axis=(1, 2, 3)) & ~fresh)
    assert len(damaged) == BATCH // 4
    for row in damaged:
        zero = (after["cells"][row] == 0).all(axis=-1)
        lines, columns = (np.flatnonzero(zero.any(axis=axis)) for axis in (1, 0))
        assert len(lines) == len(columns) == 16 and np.ptp(lines) == np.ptp(columns) == 15
        assert zero.sum() == 16 * 16
        assert (after["cells"][row][~zero] == before[row][~zero]).all()


def test_fresh_rows_hold_a_sample_for_their_own_image(start, images, after_one):
    _, model, state = start
    fresh = batches(0, 1, 1, BATCH // 2, len(images))[0]
    rows = [int(np.flatnonzero(after_one["pool"]["numbers"] == n)[0]) for n in fresh]
    z = after_one["pool"]["cells"][rows]
    assert (z == z[:, :1, :1]).all()
    mean, logvar = jax.jit(model.encode)(state["params"], unpack(images[fresh]))
    noise = (z[:, 0, 0] - mean) / np.exp(0.5 * logvar)
    assert abs(noise.mean()) < 0.5 and 0.6 < noise.std() < 1.5 and abs(noise).max() < 5


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_rows_are_taken_from_and_put_on_whichever_device_has_them(devices):
    random = np.random.RandomState(0)
    array, new = random.randn(64, 3).astype(np.float32), random.randn(16, 3).astype(np.float32)
    rows = random.permutation(64)[:16]

    def across(function, *arrays):
        parts = [a.reshape(devices, -1, *a.shape[1:]) for a in arrays]
        return jax.vmap(function, axis_name="devices")(*parts).reshape(-1, 3)

    after = across(lambda array, new: put(array, rows, new), array, new)
    array[rows] = new
    np.testing.assert_array_equal(after, array)
    np.testing.assert_array_equal(across(lambda array: take(array, rows), array), new)


class Rows:
    """In place of an array: keeps what is promised of the places where it is written."""

    def __init__(self, count):
        self.count, self.at = count, self

    def __len__(self):
        return self.count

    def __getitem__(self, places):
        self.places = places
        return self

    def set(self, new, **promised):
        self.promised = promised
        return self.places


def test_the_places_where_rows_are_put_are_distinct_as_is_promised():
    for seed in range(10):
        rows = jax.random.permutation(jax.random.key(seed), POOL)[:BATCH]
        array = Rows(POOL // 8)
        places = jax.vmap(lambda new: put(array, rows, new), axis_name="devices")(  # noqa: B023
            np.zeros((8, BATCH // 8))
        )
        assert array.promised == {"mode": "drop", "unique_indices": True}
        assert all(len(set(row)) == BATCH for row in places.tolist())
        written = [8 * n + i for n, row in enumerate(places.tolist()) for i in row if i < 8]
        assert sorted(written) == sorted(rows.tolist())


def test_corners_of_the_damage_are_uniform_in_0_to_15():
    masks = jax.vmap(lambda k: undamaged(k, 16))(jax.random.split(jax.random.key(0), 4000))
    top = np.argmin(np.asarray(masks)[:, :, :, 0].all(axis=2), axis=1)
    left = np.argmin(np.asarray(masks)[:, :, :, 0].all(axis=1), axis=1)
    for corner in (top, left):
        counts = np.bincount(corner, minlength=16)
        assert len(counts) == 16 and counts.min() > 180 and counts.max() < 320  # 250 ± 4.5 sigma


def test_every_device_count_trains_alike_and_fills_the_same_pool(start, images):
    one, losses = run(start, images, 1, 3)
    eight, same = run(start, images, 8, 3)
    np.testing.assert_allclose(same, losses, rtol=1e-4)
    assert (one["pool"]["numbers"] == eight["pool"]["numbers"]).all()
    np.testing.assert_allclose(eight["pool"]["cells"], one["pool"]["cells"], atol=1e-4)


def test_the_loss_is_that_of_the_grown_cells_on_their_own_images(start, images, after_one):
    # Every result of an update is in the pool, so its loss can be had from there: NumPy's, of the
    # final cells' logits, and the KL of each image under the parameters from before.
    config, model, _ = start
    # The second update: in the first, cells do not change by themselves.
    state, metrics = run((config, model, after_one), images, 1, 1, first=2)
    loss, reconstruction, kl, _ = metrics[0]
    before, after = after_one["pool"], state["pool"]
    changed = (after["cells"] != before["cells"]).any(axis=(1, 2, 3))
    assert changed.sum() == BATCH
    x = np.asarray(unpack(images[after["numbers"][changed]]))
    logits = after["cells"][changed][..., :1].astype(np.float64)
    encoded = jax.jit(model.encode)(after_one["params"], x)
    mean, logvar = (np.asarray(a, np.float64) for a in encoded)
    of_each = np.sum(np.logaddexp(0, logits) - x * logits, axis=(1, 2, 3))
    divergence = 0.5 * np.sum(np.exp(logvar) + mean**2 - 1 - logvar, axis=1)
    assert reconstruction == pytest.approx(of_each.mean(), rel=1e-5)
    assert kl == pytest.approx(divergence.mean(), rel=1e-4)
    assert loss == pytest.approx(reconstruction + kl, rel=1e-6)


def test_both_ends_of_the_steps_are_drawn(start, images):
    # With weights of one, more steps are larger numbers: an update's results tell its steps.
    config, model, state = start
    call = CALLS.setdefault(1, make_update_call(model, config))
    params = state["params"] | {"decoder": jax.tree.map(np.ones_like, state["params"]["decoder"])}
    order, sizes = batches(config.seed, 1, 3, BATCH // 2, len(images))[None], []
    for update in range(12):
        cells = np.ones_like(state["pool"]["cells"])
        pool = {"numbers": state["pool"]["numbers"], "cells": cells}
        begun = {**state, "params": params, "update": np.int32(update)}
        begun = jax.tree.map(np.array, jax.device_get(begun))
        begun["pool"] = jax.tree.map(lambda x: np.array(x)[None], pool)
        after, _ = call(begun, images, order, np.int32(1))
        sizes.append(round(float(np.log10(np.max(after["pool"]["cells"])))))
    assert len(set(sizes)) == 3


def test_no_gradient_crosses_from_an_earlier_update(start, images, after_one):
    # Two updates in one call are, to the bit, two calls between which the pool was written out and
    # read back as plain numbers, through which no gradient can come.
    config, model, _ = start
    together, _ = run(start, images, 1, 2)
    apart, _ = run((config, model, after_one), images, 1, 1, first=2)
    jax.tree.map(np.testing.assert_array_equal, apart, together)


def test_until_pool_from_cells_of_the_pool_play_no_part(start, images):
    config, model, state = start
    config = config.copy_and_resolve_references()
    config.train.pool_from = 2
    call, losses = make_update_call(model, config), {}
    order = batches(config.seed, 1, 3, BATCH // 2, len(images))[None]
    for shift in (0, 1):
        cells = state["pool"]["cells"] + np.float32(shift)
        begun = state | {"pool": state["pool"] | {"cells": cells}}
        begun = jax.tree.map(np.array, jax.device_get(begun))
        begun["pool"] = jax.tree.map(lambda x: x[None], begun["pool"])
        losses[shift] = np.asarray(call(begun, images, order, np.int32(2))[1])[:2, 0]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]
    assert losses[0][0] != run(start, images, 1, 1)[1][0, 0]


# ---- What the published configs leave out -------------------------------------------------------


def test_the_published_losses_are_those_from_before_there_were_other_ways(start, images):
    _, metrics = run(start, images, 1, 3)
    np.testing.assert_allclose(metrics[:, 0], BEFORE, rtol=1e-6)


def other_way(start, images, **fields):
    """The start of a run with other fields of train, and a function that goes on from a state."""
    config, model = start[0].copy_and_resolve_references(), start[1]
    config.train.update(fields)
    begun, call = init_state(model, config, images), make_update_call(model, config)

    def go_on(state):
        t = int(state["update"]) + 1
        order = batches(config.seed, t, 3, config.train.pool_fresh or BATCH // 2, len(images))[None]
        pool = jax.tree.map(lambda x: x[None], state["pool"])
        copy = jax.tree.map(np.array, jax.device_get(state | {"pool": pool}))
        after, metrics = call(copy, images, order, np.int32(1))
        after |= {"pool": jax.tree.map(lambda x: x[0], after["pool"])}
        return jax.device_get(after), np.asarray(metrics)[0]

    return begun, go_on


def same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return [np.array_equal(a, b) for a, b in pairs]


def test_a_given_encoder_stays_and_fewer_fresh_images_leave_more_to_the_pool(start, images):
    begun, go_on = other_way(start, images, pool_from=2, encoder_from="elsewhere", pool_fresh=8)
    one = go_on(begun)[0]
    two = go_on(one)[0]
    fresh = np.isin(two["pool"]["numbers"], batches(0, 2, 1, 8, len(images))[0])
    taken = (two["pool"]["cells"] != one["pool"]["cells"]).any(axis=(1, 2, 3)) & ~fresh
    assert taken.sum() == BATCH - 8 and fresh.sum() == 8
    for state in (one, two):
        assert all(same(state["params"]["encoder"], begun["params"]["encoder"]))
        assert not any(
            same(state["params"]["decoder"]["update"], begun["params"]["decoder"]["update"])
        )


def test_what_moves_between_devices_is_the_rows_of_the_batch_not_the_pool(start, images):
    config, model, state = start
    pool = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), state["pool"])
    order = np.zeros((8, 3, BATCH // 16), np.int32)
    lowered = CALLS.setdefault(8, make_update_call(model, config)).lower(
        state | {"pool": pool}, images, order, np.int32(1)
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
