"""The order of the images: each epoch a shuffle, a function of seed and update alone."""

import numpy as np

from vnca.program.order import batches, fixed_shuffle


def walk(seed, updates, pieces, batch=10, images=103):
    """Batches of updates 1, 2, …, asked for in pieces of these lengths, again and again."""
    parts, first = [], 1
    while first <= updates:
        count = min(pieces[len(parts) % len(pieces)], updates + 1 - first)
        parts.append(batches(seed, first, count, batch, images))
        first += count
    return np.concatenate(parts)


def test_an_epoch_shows_each_image_once_and_drops_the_incomplete_last_batch():
    epochs = walk(0, 30, (7, 1, 12)).reshape(3, 100)  # 10 batches of 10 fit into 103 images
    for epoch in epochs:
        assert np.unique(epoch).size == 100
        assert epoch.min() >= 0 and epoch.max() < 103
    left_out = [frozenset(range(103)) - set(epoch.tolist()) for epoch in epochs]
    assert len(set(left_out)) == 3  # not always the same images


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = [*walk(0, 30, (30,)).reshape(3, 100), walk(1, 10, (10,)).ravel()]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert np.mean(a == b) < 0.1  # 1% of places agree by chance


def test_the_order_is_a_function_of_seed_and_update_number_alone():
    whole = walk(5, 30, (30,))
    np.testing.assert_array_equal(walk(5, 30, (7, 1, 12)), whole)
    for first in (25, 3, 11, 3):  # in no order, with other seeds between
        batches(6, first, 2, 10, 103)
        np.testing.assert_array_equal(batches(5, first, 2, 10, 103), whole[first - 1 : first + 1])


def test_the_shuffle_is_fixed_and_a_prefix_of_a_longer_one():
    assert sorted(fixed_shuffle(10_000, 10_000)) == list(range(10_000))
    assert (fixed_shuffle(500, 10_000) == fixed_shuffle(10_000, 10_000)[:500]).all()
    assert not (fixed_shuffle(10, 10_000) == np.arange(10)).any()
