"""The order of the images: which of them each training update and each evaluation takes."""

from functools import lru_cache

import jax
import numpy as np

from vnca.program.devices import local_rows


def fresh_images(config):
    """Images of the training set that an update takes: with a pool `train.pool_fresh`, or half of
    its batch."""
    batch = config.train.batch_size
    return config.train.get("pool_fresh") or batch // 2 if "pool_size" in config.train else batch


@lru_cache(maxsize=2)
def _epoch(seed, epoch, images):
    return np.random.RandomState([seed, epoch]).permutation(images).astype(np.int32)


def batches(seed, first, count, batch, images):
    """Image numbers of updates first, first + 1, … (from 1): int32 [count, batch].

    Each epoch is a shuffle without replacement, its incomplete last batch dropped, and a function
    of seed and update number alone, so a resumed run repeats and skips nothing.
    """
    places = [divmod(t - 1, images // batch) for t in range(first, first + count)]
    return np.stack([_epoch(seed, e, images)[i * batch : (i + 1) * batch] for e, i in places])


def deal(config, first, count, images):
    """Which of so many `images` are fresh in `count` updates from number `first` on: int32
    [local devices, updates_per_call, fresh/devices], zeros after the last update."""
    order = batches(config.seed, first, count, fresh_images(config), images)
    order = np.pad(order, ((0, config.train.updates_per_call - count), (0, 0)))
    return order.reshape(len(order), jax.device_count(), -1).swapaxes(0, 1)[local_rows()]


def fixed_shuffle(count, images=10_000):
    """The first `count` of the fixed shuffle of so many images: their numbers, int64 [count]."""
    return np.random.RandomState(0).permutation(images)[:count]
