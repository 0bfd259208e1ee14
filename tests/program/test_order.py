"""The order of the images: each epoch a shuffle, a function of seed and update alone."""

import numpy as np
import tiny

from vnca.program.order import deal, fixed_shuffle


def walk(seed, pieces=(30,), devices=2):
    """The images of updates 1 to 30, [30, 10], dealt in calls of these lengths, again and again;
    10 batches of 10 fit into the 103 images."""
    config = tiny.config(seed=seed, train__batch_size=10, train__updates_per_call=None)
    parts, done = [], 0
    while done < 30:
        count = min(pieces[len(parts) % len(pieces)], 30 - done)
        dealt = deal(config, done + 1, count, 103, devices)
        assert dealt.shape == (devices, 125, 10 // devices) and not dealt[:, count:].any()
        parts.append(np.concatenate(dealt[:, :count], axis=1))
        done += count
    return np.concatenate(parts)


def test_an_epoch_shows_each_image_once_and_drops_the_incomplete_last_batch():
    left_out = set()
    for epoch in walk(0).reshape(3, 100):
        assert np.unique(epoch).size == 100 and epoch.min() >= 0 and epoch.max() < 103
        left_out.add(frozenset(range(103)) - set(epoch.tolist()))
    assert len(left_out) == 3  # not always the same images


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = [*walk(0).reshape(3, 100), walk(1)[:10].ravel()]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert np.mean(a == b) < 0.1  # 1% of places agree by chance


def test_the_order_is_a_function_of_seed_and_update_alone():
    for pieces, devices in ((7, 1, 12), 2), ((30,), 5), ((1,), 1):
        walk(6)  # another seed between
        np.testing.assert_array_equal(walk(5, pieces, devices), walk(5))


def test_the_shuffle_is_fixed_and_a_prefix_of_a_longer_one():
    whole = fixed_shuffle(10_000, 10_000)
    assert sorted(whole) == [*range(10_000)] and sorted(whole[:500]) != [*range(500)]
    np.testing.assert_array_equal(fixed_shuffle(500, 10_000), whole[:500])
