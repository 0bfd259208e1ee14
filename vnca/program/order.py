"""The data order: which images each training update and each evaluation takes.

An image is named by its index in the training set or the test set.
"""

from functools import lru_cache

import numpy as np

from vnca.pool import fresh_images
from vnca.program import VncaError
from vnca.program.clock import MOST


@lru_cache(maxsize=2)
def _epoch(seed, epoch, count):
    return np.random.RandomState([seed, epoch]).permutation(count).astype(np.int32)


def batches(seed, first, updates, batch, count):
    """The image indices of updates first, first + 1, … (from 1): int32 [updates, batch].

    Each epoch is a shuffle of all `count` images without replacement, whose incomplete last batch
    is dropped. It depends on the seed, the update and `batch` alone, so that a resumed run repeats
    no image and skips none.
    """
    places = [divmod(t - 1, count // batch) for t in range(first, first + updates)]
    return np.stack([_epoch(seed, e, count)[i * batch :][:batch] for e, i in places])


def deal(config, first, count, devices):
    """The image indices of a device call that makes up to K updates from number `first` on, out of
    `count` images.

    Returns int32 [devices, K, fresh images / devices]. K, which the compiled program has, is
    `train.updates_per_call`, or the most that the clock asks for. A run that is resumed with
    another train.pool_fresh may repeat and skip images: its place in the epoch is then another.
    """
    size = config.train.updates_per_call or MOST
    indices = batches(config.seed, first, size, fresh_images(config), count)
    return indices.reshape(size, devices, -1).swapaxes(0, 1)


def images_to_evaluate(config, available, default=None):
    """How many of the available images to evaluate: eval.images, or if that is unset, the default,
    or all. Raises VncaError if eval.images asks for more than there are."""
    count = config.eval.images or min(default or available, available)
    if count > available:
        raise VncaError(
            f"config.eval.images={count}: the set has no more than {available:,}; ask for at most "
            "that many"
        )
    return count


def fixed_shuffle(n, count):
    """The first n indices of a shuffle of `count` images that is always the same: int64 [n], or
    [count] if that is less."""
    return np.random.RandomState(0).permutation(count)[:n]
