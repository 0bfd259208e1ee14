"""From the loss to an update, and many updates in one device call (Palm et al. 2022).

`batch_gradient` and `one_update` run inside a map over D devices, whose axis is named "devices".
Each device has its share of a global batch of B images.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vnca import optimizer
from vnca.images import unpack
from vnca.losses import elbo
from vnca.models import Model, computed_in
from vnca.noise import normal, stream

METRICS = ("loss", "reconstruction", "kl", "grad_norm")  # in nats per image, except the norm


class State(NamedTuple):
    """All that training changes."""

    params: dict
    moments: dict  # Adam's two, each shaped like params
    update: jax.Array  # int32: how many updates are done
    pool: Any  # a `vnca.pool.Pool`, or () for a model that has none


def loss(model, params, x, noise):
    """Means over the images x: −ELBO, and [−ELBO, −log p(x|z), KL]."""
    bound, log_px_z, kl = elbo(model, params, x, noise)
    value = -jnp.mean(bound)
    return value, jnp.stack([value, -jnp.mean(log_px_z), jnp.mean(kl)])


def batch_gradient(model, config, state, t, images, indices, mean_gradient):
    """The gradient of the loss over this device's share of the batch of update t = 1, 2, …

    images: packed bits of the training set, uint8 [N, 98]; indices: int32 [B/D], the images of this
    device; mean_gradient: like `accumulate` with micro_batch already set. Returns the gradient, the
    loss terms [3], and () in place of a pool.
    """
    # The noise depends on the update and on an image's place in the global batch, so that it is the
    # same on any number of devices.
    places = lax.axis_index("devices") * len(indices) + jnp.arange(len(indices))
    noise = normal(stream(config.seed, "posterior", t), places, model.latent_size)

    def loss_of(params, bits, noise):
        value, terms = loss(model, params, unpack(bits), noise)
        return value, (terms, ())  # nothing per image

    grads, terms, _ = mean_gradient(
        jax.grad(loss_of, has_aux=True), state.params, images[indices], noise
    )
    return grads, terms, ()


def accumulate(micro_batch, gradient, params, *arrays):
    """Gradient accumulation: the means over a batch, computed by micro-batches, one after another.

    The arrays, [B/D, …], are cut into equal micro-batches of n ≤ `micro_batch` images.
    gradient: params, *arrays -> grads, (terms [3], aux). grads and terms are means over n images,
    and aux [n, …] has a row for each image. Returns the means of grads and terms, and aux of all
    images, [B/D, …]. The memory is that of one micro-batch.
    """
    batch = len(arrays[0])
    # The smallest number of equal micro-batches that are small enough.
    count = next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= micro_batch)

    def add(sums, arrays):
        grads, (terms, aux) = gradient(params, *arrays)
        return jax.tree.map(jnp.add, sums, (grads, terms)), aux

    zeros = jax.tree.map(jnp.zeros_like, params), jnp.zeros(3)
    split = jax.tree.map(lambda a: a.reshape(count, batch // count, *a.shape[1:]), arrays)
    sums, aux = lax.scan(add, zeros, split)
    grads, terms = jax.tree.map(lambda a: a / count, sums)
    return grads, terms, jax.tree.map(lambda a: a.reshape(batch, *a.shape[2:]), aux)


class Method(NamedTuple):
    """The functions that differ between models and platforms."""

    model: Model
    gradient: Callable = batch_gradient  # or `vnca.pool.pool_gradient`, which has the same contract
    init_pool: Callable = lambda model, config, params, images: ()  # no pool
    global_norm: Callable = optimizer.global_norm  # TPUs and GPUs have others


def init_state(method, config, images, trained=None):
    """The State before the first update.

    images: packed bits of the training set, uint8 [N, 98]; trained: parameters of the "encoder",
    the "decoder" or both, in place of random ones.
    """
    params = jax.jit(method.model.init)(stream(config.seed, "init")) | (trained or {})
    pool = method.init_pool(method.model, config, params, images)
    return State(params, optimizer.adam_init(params), jnp.int32(0), pool)


def one_update(method, config, state, images, indices):
    """One update of the State: gradient, mean over the devices, clipping, Adam.

    images and indices as in `batch_gradient`. Returns the new State, and the metrics [4] as in
    METRICS, of the global batch.
    """
    settings = config.train
    t = state.update + 1
    model = computed_in(method.model, settings.dtype)
    grads, terms, pool = method.gradient(
        model, config, state, t, images, indices, partial(accumulate, settings.micro_batch)
    )
    grads, terms = lax.pmean((grads, terms), "devices")
    norm = method.global_norm(grads)
    grads = optimizer.clip_by_norm(grads, norm, settings.clip_norm)
    rate = optimizer.learning_rate(
        t, settings.learning_rate, settings.warmup_updates, settings.decay_updates
    )
    params, moments = optimizer.adam(grads, state.moments, state.params, t, rate)
    return State(params, moments, t, pool), jnp.append(terms, norm)


def make_update_call(method, config, devices=None):
    """One device call of up to K updates: (state, images, indices, count) -> (state, metrics).

    Params, moments, update and the images (packed bits, uint8 [N, 98]) are whole on each of
    `devices` (None: all). The pool, [D, P/D, …], and the indices of the images, int32 [D, K, …],
    are split over the devices. The call does the first `count` updates. metrics is float32 [K, 4],
    as in METRICS, and 0 from row `count` on. The buffers of the given state are donated.
    """

    def call(state, images, indices, count):
        def body(i, carry):
            state, metrics = carry
            state, new = one_update(method, config, state, images, indices[i])
            return state, metrics.at[i].set(new)

        metrics = jnp.zeros((len(indices), len(METRICS)))
        return lax.fori_loop(0, count, body, (state, metrics))

    axes = State(params=None, moments=None, update=None, pool=0)  # None: not split
    return jax.pmap(
        call, "devices", in_axes=(axes, None, 0, None), out_axes=(axes, None),
        devices=devices, donate_argnums=0,
    )  # fmt: skip
