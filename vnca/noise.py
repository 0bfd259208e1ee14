"""Randomness: a function of the seed, a name and indices, never of what was drawn before."""

import zlib

import jax


def stream(seed, name, *indices):
    """The key for one purpose, such as ("posterior", update). Indices may be traced."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key


def draw_each(draw, key, indices):
    """draw(fold_in(key, i)) for every index i, stacked. An index gets the same draw on any device
    and in any batch."""
    return jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(indices)


def normal(key, indices, size):
    """Standard normal noise, float32 [len(indices), size], with a key of its own for each index."""
    return draw_each(lambda key: jax.random.normal(key, (size,)), key, indices)
