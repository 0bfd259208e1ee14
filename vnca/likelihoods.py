"""Likelihoods p(x|z): which images a model is for, and what its logits say about them.

A new likelihood is a function here that is annotated to return a Likelihood. A config names it in
`model.likelihood`, and its arguments are fields of the config's `model` section.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln


class Likelihood(NamedTuple):
    """The images that a model is made for, and their p(x|z).

    An image x is float32 [B, size, size, colours] in 0…1. The decoder gives its logits, [B, size,
    size, outputs].

    size:     side of an image, in pixels
    colours:  numbers in a pixel: 1, grey, or 3: red, green and blue
    levels:   a stored number is 0, 1, …, levels, and x has it as a fraction of `levels`
    row:      bytes of a stored image: a bit for each number if `levels` is 1, otherwise a byte
    outputs:  logits of a pixel; in an automaton, they are the first channels of its cell
    log_prob: logits, x -> log p(x|z), float32 [B], in nats per image
    mean:     logits [..., outputs] -> the mean of x, [..., colours]: the picture that they show
    """

    size: int
    colours: int
    levels: int
    row: int
    outputs: int
    log_prob: Callable
    mean: Callable


def as_floats(likelihood, stored):
    """Images as they are stored, uint8 [..., row] -> x, float32 [..., size, size, colours] in 0…1.

    The numbers of an image are stored pixel by pixel and row by row. Of those that are bits, a
    byte's highest comes first.
    """
    numbers = jnp.unpackbits(stored, axis=-1) if likelihood.levels == 1 else stored
    shape = likelihood.size, likelihood.size, likelihood.colours
    return numbers.reshape(*stored.shape[:-1], *shape).astype(jnp.float32) / likelihood.levels


def bits_per_dimension(likelihood, nats):
    """A bound on log p(x), in nats per image, as bits for each number of an image: −nats / (ln 2 ·
    size² · colours). Its least value, 0, would be that of certainty."""
    return -nats / (math.log(2) * likelihood.size**2 * likelihood.colours)


@lru_cache  # equal likelihoods are the same object, so that equal models are, too
def binomial(size: int, colours: int, levels: int) -> Likelihood:
    """Each number of x counts the heads in `levels` tosses of a coin, as a fraction of all tosses.
    The decoder gives the coin's logit, l = log(p/(1 − p)). With k heads in n tosses,

        log p(x|z) = Σ log C(n, k) + k·l − n·log(1 + eˡ), summed over all numbers of the image.

    With one toss this is the Bernoulli likelihood of binary images (Kingma & Welling 2014, appendix
    C.1), as in the paper and in the reproduction.
    """

    def log_prob(logits, x):
        chex.assert_equal_shape([logits, x])
        log_p = levels * (x * logits - jax.nn.softplus(logits))
        if levels > 1:  # else C(n, k) = 1
            heads = levels * x
            log_p += gammaln(levels + 1) - gammaln(heads + 1) - gammaln(levels - heads + 1)
        return jnp.sum(log_p, axis=(1, 2, 3))

    numbers = size**2 * colours
    return Likelihood(
        size=size,
        colours=colours,
        levels=levels,
        row=numbers // 8 if levels == 1 else numbers,
        outputs=colours,
        log_prob=log_prob,
        mean=jax.nn.sigmoid,
    )
