"""The gradient of the loss, −ELBO, in nats an image, over one device's share of a batch."""

import jax
import jax.numpy as jnp
from jax import lax

from vnca.images import unpack
from vnca.losses import elbo
from vnca.noise import normal, stream


def gradient(model, config, devices, state, t, images, indices):
    """Gradient, loss terms [3] and no pool: means over this device's share of the batch.

    images: packed bits, uint8 [N, 98]; indices: int32 [B/devices]; t: number of the update.
    """
    # Noise keyed by update and by place in the global batch: the same on any device count.
    places = lax.axis_index("devices") * len(indices) + jnp.arange(len(indices))
    noise = normal(stream(config.seed, "posterior", t), places, model.latent_size)

    def loss(params, bits, noise):
        log_px, kl = elbo(model, params, unpack(bits), noise)
        return loss_terms(log_px, kl), None

    parts = images[indices], noise
    grads, terms, _ = by_micro_batches(loss, state["params"], parts, config.train.micro_batch)
    return grads, terms, {}


def loss_terms(log_px, kl):
    """Loss (−ELBO), reconstruction and KL: means over images, nats."""
    return jnp.stack([jnp.mean(kl - log_px), jnp.mean(-log_px), jnp.mean(kl)])


def by_micro_batches(loss, params, parts, most):
    """Gradient of the loss's first term, its terms, and what it returns beside them.

    loss: params, part -> terms [3], aux [n, …]. The arrays of `parts`, [B, …], are cut into equal
    pieces of at most `most`, one after the other: the mean gradient is the same, the memory a part
    of it, and on a CPU the arrays fit into its cache.
    """
    size = len(jax.tree.leaves(parts)[0])
    count = next(n for n in range(1, size + 1) if size % n == 0 and size // n <= max(most, 1))

    def first_term(params, part):
        terms, aux = loss(params, *part)
        return terms[0], (terms, aux)

    def add(total, part):
        grads, (terms, aux) = jax.grad(first_term, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, total, (grads, terms)), aux

    parts = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), parts)
    zero = jax.tree.map(jnp.zeros_like, params), jnp.zeros(3)
    total, aux = lax.scan(add, zero, parts)
    grads, terms = jax.tree.map(lambda a: a / count, total)
    return grads, terms, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), aux)
