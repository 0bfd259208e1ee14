"""The order of the images: each epoch a shuffle, a function of seed and update alone."""

import itertools

import numpy as np
import pytest
import tiny

from vnca.program.order import deal, fixed_shuffle


def walk(seed, first=1, devices=2):
    """The images of 125 updates, [1250], of which an epoch has 10: 100 of 103 images."""
    config = tiny.config(seed=seed, train__batch_size=10, train__updates_per_call=None)
    return np.hstack(deal(config, first, 103, devices)).ravel()


def test_an_epoch_shows_each_image_once_and_drops_the_incomplete_last_batch():
    epochs = np.split(walk(0)[:300], 3)
    left_out = {frozenset(range(103)).difference(epoch) for epoch in epochs}
    assert [*map(len, left_out)] == [3, 3, 3]  # and not always the same


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    for a, b in itertools.combinations([*np.split(walk(0)[:300], 3), walk(1)[:100]], 2):
        assert np.mean(a == b) < 0.1  # 1% of places agree by chance


@pytest.mark.parametrize("first, devices", [(1, 1), (2, 5), (17, 2)])
def test_the_order_is_a_function_of_seed_and_update_alone(first, devices):
    whole = walk(5)[10 * (first - 1) :]
    walk(6)  # another seed between
    np.testing.assert_array_equal(walk(5, first, devices)[: whole.size], whole)


def test_with_a_pool_the_order_is_of_the_fresh_images_alone():
    fields = {"train__batch_size": 16, "train__updates_per_call": 3}
    config = tiny.config("healing", train__pool_fresh=4, **fields)
    fresh = tiny.config(train__batch_size=4, train__updates_per_call=3)
    for first in 1, 30:
        found = deal(config, first, 103, 2)
        assert found.shape == (2, 3, 2)
        np.testing.assert_array_equal(found, deal(fresh, first, 103, 2))


def test_the_shuffle_is_fixed_and_a_prefix_of_a_longer_one():
    whole = fixed_shuffle(10_000, 10_000)
    assert sorted(whole) == [*range(10_000)] and sorted(whole[:500]) != [*range(500)]
    np.testing.assert_array_equal(fixed_shuffle(500, 10_000), whole[:500])
