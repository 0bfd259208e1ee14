"""Adam and gradient clipping, by hand, on pytrees of float32 (Kingma & Ba, 2015, algorithm 1)."""

from math import pi

import jax
import jax.numpy as jnp

from vnca import tpu


@tpu.door(tpu.global_norm)
def global_norm(tree):
    """√(Σ x²) over all entries of all arrays: a scalar."""
    return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))


def clip_by_global_norm(grads, limit):
    """The gradient, scaled to a norm of `limit` where it is longer, and its norm before."""
    norm = global_norm(grads)
    scale = limit / jnp.maximum(norm, limit)  # exactly 1 where it is shorter
    return jax.tree.map(lambda g: g * scale, grads), norm


def adam_init(params):
    """Both moments, zero, shaped like the parameters."""
    return {name: jax.tree.map(jnp.zeros_like, params) for name in ("mean", "square")}


def adam(grads, moments, params, t, rate, b1=0.9, b2=0.999, eps=1e-8):
    """One update, number t = 1, 2, …: returns the new params and moments."""
    mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, moments["mean"], grads)
    square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, moments["square"], grads)
    c1, c2 = 1 - b1**t, 1 - b2**t  # moments start at zero: the bias of that
    moved = lambda p, m, v: p - rate * (m / c1) / (jnp.sqrt(v / c2) + eps)  # noqa: E731
    return jax.tree.map(moved, params, mean, square), {"mean": mean, "square": square}


def learning_rate(t, peak, warmup_updates=0, decay_updates=None):
    """Rate at update t: a linear rise over `warmup_updates`, then `peak`; with `decay_updates`,
    half a cosine from `peak` at update 0 to zero at `decay_updates`, and zero beyond."""
    rate = peak * jnp.minimum(1.0, t / max(warmup_updates, 1))
    if decay_updates:
        rate *= 0.5 * (1 + jnp.cos(pi * jnp.minimum(t / decay_updates, 1.0)))
    return rate
