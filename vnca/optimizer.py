"""Adam (Kingma & Ba 2015, algorithm 1), gradient clipping and the learning rate, on pytrees of
float32 arrays."""

from math import pi

import jax
import jax.numpy as jnp


def global_norm(tree):
    """√(Σ x²) over all entries of all arrays: a scalar."""
    return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))


def clip_by_norm(grads, norm, limit):
    """The gradient, whose norm is `norm`, scaled down to a norm of `limit` if it is longer. The
    limit is 10 for the paper's doubling model, and for all models of the reproduction."""
    scale = limit / jnp.maximum(norm, limit)  # exactly 1 if the norm is within the limit
    return jax.tree.map(lambda g: g * scale, grads)


def adam_init(params):
    """Both moments, {"mean": m, "square": v}: zeros with the shapes of the parameters."""
    return {name: jax.tree.map(jnp.zeros_like, params) for name in ("mean", "square")}


def adam(grads, moments, params, t, rate, b1=0.9, b2=0.999, eps=1e-8):
    """The parameters and moments after update t = 1, 2, … with learning rate `rate`."""
    mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, moments["mean"], grads)
    square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, moments["square"], grads)

    def move(p, m, v):
        # Moments start at zero. Dividing by 1 − bᵗ removes the bias of that start.
        unbiased_mean = m / (1 - b1**t)
        unbiased_square = v / (1 - b2**t)
        return p - rate * unbiased_mean / (jnp.sqrt(unbiased_square) + eps)

    return jax.tree.map(move, params, mean, square), {"mean": mean, "square": square}


def learning_rate(t, peak, warmup_updates=0, decay_updates=None):
    """The rate at update t: a linear rise over `warmup_updates`, then `peak`. If `decay_updates` is
    set, this is multiplied by half a cosine wave, which falls from 1 at update 0 to 0 at update
    `decay_updates`; later rates are 0. In the paper and in the reproduction the rate is constant.
    """
    rate = peak * jnp.minimum(1.0, t / max(warmup_updates, 1))
    if decay_updates:
        rate *= 0.5 * (1 + jnp.cos(pi * jnp.minimum(t / decay_updates, 1.0)))
    return rate
