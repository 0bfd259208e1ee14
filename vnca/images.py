"""Images as packed bits, and the order in which training takes them."""

from functools import lru_cache

import jax.numpy as jnp
import numpy as np

IMAGE_SIZE = 32  # 28×28 digits, zero-padded by 2: the doubling decoder makes powers of two


def unpack(bits):
    """Packed bits, uint8 [..., 98], as images, float32 [..., 32, 32, 1] of 0.0 and 1.0."""
    pixels = jnp.unpackbits(bits, axis=-1).astype(jnp.float32)
    images = pixels.reshape(*bits.shape[:-1], 28, 28, 1)
    return jnp.pad(images, [(0, 0)] * (bits.ndim - 1) + [(2, 2), (2, 2), (0, 0)])


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
