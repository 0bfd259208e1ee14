"""The data order: which images each training update and each evaluation takes.

An image is named by its index in the training set or the test set.
"""

from functools import lru_cache

import numpy as np

from vnca.program import VncaError
from vnca.program.clock import MOST


def fresh_images(config):
    """The number of fresh images in a batch. The other images, if any, come from the pool."""
    train = config.train
    if "pool_size" not in train:
        return train.batch_size
    return train.get("pool_fresh") or train.batch_size // 2


@lru_cache(maxsize=2)
def _epoch(seed, epoch, count):
    return np.random.RandomState([seed, epoch]).permutation(count).astype(np.int32)


def deal(config, first, updates, count, devices):
    """The image indices of a device call that makes `updates` updates from number `first` on, out
    of `count` images.

    Each epoch is a shuffle of all `count` images without replacement, whose incomplete last batch
    is dropped. It depends on the seed, the update and the number of fresh images in a batch alone,
    so that a resumed run repeats no image and skips none. A run that is resumed with another
    train.pool_fresh may repeat and skip some: its place in the epoch is then another.

    Returns int32 [devices, K, fresh images / devices] with zeros after `updates`. K, which the
    compiled program has, is `train.updates_per_call`, or the most that the clock asks for.
    """
    batch = fresh_images(config)
    indices = np.zeros((config.train.updates_per_call or MOST, batch), np.int32)
    for row, done in enumerate(range(first - 1, first - 1 + updates)):
        epoch, place = divmod(done, count // batch)
        indices[row] = _epoch(config.seed, epoch, count)[place * batch :][:batch]
    return indices.reshape(len(indices), devices, -1).swapaxes(0, 1)


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
