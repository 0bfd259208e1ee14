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

    size:         side of an image, in pixels
    colours:      numbers in a pixel: 1 (grey) or 3 (red, green and blue)
    levels:       a stored number is 0, 1, …, levels; x is this number divided by `levels`
    stored_bytes: bytes that store an image: one bit a number if `levels` is 1, otherwise one byte
    outputs:      logits of a pixel; in an automaton, they are the first channels of its cell
    log_prob:     logits, x -> log p(x|z), float32 [B], in nats per image
    picture:      logits [..., outputs] -> the picture that they show, [..., colours] in 0…1
    shows:        what this picture is: the "mean" of p(x|z), or its "centre"
    sample:       key, logits [..., outputs] -> a sample of pixels, [..., colours] in 0…1; that of
                  a mixture is not rounded to its levels
    """

    size: int
    colours: int
    levels: int
    stored_bytes: int
    outputs: int
    log_prob: Callable
    picture: Callable
    shows: str
    sample: Callable


def as_floats(likelihood, stored):
    """Stored images, uint8 [..., stored_bytes] -> x, float32 [..., size, size, colours] in 0…1.

    The numbers of an image are stored row by row, and in a row pixel by pixel. If they are bits, a
    byte holds eight of them, the first in its highest bit.
    """
    numbers = jnp.unpackbits(stored, axis=-1) if likelihood.levels == 1 else stored
    shape = likelihood.size, likelihood.size, likelihood.colours
    return numbers.reshape(*stored.shape[:-1], *shape).astype(jnp.float32) / likelihood.levels


def bits_per_dimension(likelihood, nats):
    """A bound on log p(x), in nats per image, as bits for each number of an image: −nats / (ln 2 ·
    size² · colours). Fewer bits are better."""
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

    def sample(key, logits):
        return jax.random.binomial(key, levels, jax.nn.sigmoid(logits)) / levels

    numbers = size**2 * colours
    return Likelihood(
        size=size,
        colours=colours,
        levels=levels,
        stored_bytes=numbers // 8 if levels == 1 else numbers,
        outputs=colours,
        log_prob=log_prob,
        picture=jax.nn.sigmoid,
        shows="mean",
        sample=sample,
    )


@lru_cache
def logistic_mixture(size: int, colours: int, mixtures: int) -> Likelihood:
    """A mixture of discretized logistics, for numbers of 0 … 255 (PixelCNN++, Salimans et al.
    2017, sections 2.1 and 2.2), as in the paper for CelebA.

    On a scale of −1…1, a logistic with mean μ and scale s gives a level x the probability of the
    interval of ±1/255 around it, σ((x + 1/255 − μ)/s) − σ((x − 1/255 − μ)/s). The interval of the
    lowest level reaches down to −∞, and that of the highest up to ∞. A pixel comes from one of M
    components, and each has a logistic for every colour. In a component, the mean of green depends
    on red, μ₂ + c₁·red, and that of blue on both, μ₃ + c₂·red + c₃·green.

    A pixel has 10·M logits. The first M are the logits of the components' weights. Then come M
    means, M log-scales and M coefficients (before their tanh) for red, the same for green, and the
    same for blue: c₁ stands beside the logits of red, c₂ beside those of green, and c₃ beside those
    of blue. Grey images have 3·M logits and no coefficients. log s is clipped at −7, as published,
    and also at +7: without the upper limit, log p became −∞ in a trial.
    """
    # For each colour there are logits of the mean, of the log-scale and, if there are three
    # colours, of a coefficient.
    kinds = 3 if colours == 3 else 2

    def split(logits):
        """Logits of the weights, [..., M]; means, log-scales and coefficients, [..., colours, M].
        Grey images have no coefficients: None."""
        weights, rest = jnp.split(logits, [mixtures], axis=-1)
        rest = rest.reshape(*rest.shape[:-1], colours, kinds, mixtures)
        means, log_scales, *coefficients = jnp.moveaxis(rest, -2, 0)
        log_scales = jnp.clip(log_scales, -7, 7)
        return weights, means, log_scales, jnp.tanh(coefficients[0]) if coefficients else None

    def next_mean(means, coefficients, values):
        """The mean of the next colour, [..., M], given the values of the colours before it, each
        [..., 1] or [..., M]."""
        mean = means[..., len(values), :]
        if len(values) == 1:
            [red] = values
            mean += coefficients[..., 0, :] * red
        if len(values) == 2:
            red, green = values
            mean += coefficients[..., 1, :] * red + coefficients[..., 2, :] * green
        return mean

    def log_prob(logits, x):
        chex.assert_shape([logits, x], [(None, size, size, n) for n in (outputs, colours)])
        weights, means, log_scales, coefficients = split(logits)
        x = 2 * x[..., None] - 1
        values = [x[..., c, :] for c in range(colours)]
        moved = [next_mean(means, coefficients, values[:c]) for c in range(colours)]
        off, narrow = x - jnp.stack(moved, axis=-2), jnp.exp(-log_scales)
        # An interval from b to a has log(σ(a) − σ(b)) = log σ(a) + log σ(−b) + log(1 − eᵇ⁻ᵃ), which
        # is exact far out in the tails. The lowest level has b = −∞, and the highest a = ∞.
        log_p = jnp.where(x < 0.999, jax.nn.log_sigmoid((off + 1 / 255) * narrow), 0)
        log_p += jnp.where(x > -0.999, jax.nn.log_sigmoid((1 / 255 - off) * narrow), 0)
        log_p += jnp.where(abs(x) < 0.999, jnp.log(-jnp.expm1(-2 / 255 * narrow)), 0)
        log_weights = jax.nn.log_softmax(weights)
        of_pixels = jax.nn.logsumexp(log_weights + jnp.sum(log_p, axis=-2), axis=-1)
        return jnp.sum(of_pixels, axis=(1, 2))

    def draw(logits, weights, noise):
        """The pixels, given the noise to add to each logistic, [..., colours, M] (0: none). The
        values of the M components are clipped to −1…1, averaged with `weights` [..., M], and mapped
        to 0…1."""
        _, means, log_scales, coefficients = split(logits)
        noise, values = jnp.exp(log_scales) * noise, []
        for c in range(colours):
            value = next_mean(means, coefficients, values) + noise[..., c, :]
            values.append(jnp.clip(value, -1, 1))
        return (jnp.sum(weights[..., None, :] * jnp.stack(values, axis=-2), axis=-1) + 1) / 2

    def picture(logits):
        """The centre: the average of the components without noise. It is not the mean of p(x|z),
        since clipping cuts more of the noise on one side than on the other."""
        return draw(logits, jax.nn.softmax(logits[..., :mixtures]), 0.0)

    def sample(key, logits):
        key, noise_key = jax.random.split(key)
        chosen = jax.random.categorical(key, logits[..., :mixtures])
        noise = jax.random.logistic(noise_key, (*chosen.shape, colours, mixtures))
        return draw(logits, jax.nn.one_hot(chosen, mixtures), noise)

    outputs = mixtures * (1 + colours * kinds)
    return Likelihood(
        size=size,
        colours=colours,
        levels=255,
        stored_bytes=size**2 * colours,
        outputs=outputs,
        log_prob=log_prob,
        picture=picture,
        shows="centre",
        sample=sample,
    )
