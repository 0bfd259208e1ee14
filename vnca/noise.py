"""Randomness: a function of the seed, a name and numbers, never of what was drawn before."""

import zlib

import jax


def stream(seed, name, *numbers):
    """The key for one purpose, such as ("posterior", update): purposes share no keys."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def at_places(draw, key, places):
    """draw(key of the place) for each place, stacked: place i gets the same, whoever draws it."""
    return jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(places)


def normal(key, places, size):
    """Standard normal noise [len(places), size], float32, each row keyed by its place."""
    return at_places(lambda k: jax.random.normal(k, (size,)), key, places)
