"""From the loss to an update, and many updates in one device call.

Training is data-parallel, as in the reproduction: each of D devices has B/D images of a global
batch of B, and all have the same parameters. `batch_gradient` and `one_update` run inside a map
over the devices, whose axis is named "devices".

Three arguments occur in many functions:

config:  the settings of a run. The files in configs/ explain them.
images:  the stored training set, uint8 [N, stored_bytes] (vnca/likelihoods.py), whole on every
         device.
indices: which images of this set a device takes in an update, int32.

With a pool (vnca/pool.py), F images of a batch are fresh, and the others come from its P slots.
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vnca import optimizer
from vnca.devices import places
from vnca.likelihoods import as_floats
from vnca.losses import objective, reparametrize
from vnca.model import Model

METRICS = ("loss", "reconstruction", "kl", "grad_norm")  # in nats per image, except the norm


class State(NamedTuple):
    """What one update hands on to the next."""

    params: dict
    moments: dict  # "mean" and "square", which Adam keeps: each shaped like params
    update: jax.Array  # int32: how many updates are done
    seed: jax.Array  # int32: of all noise; an array, so that a new seed needs no compilation
    pool: Any  # () for a model without a pool of cells, else the Pool of vnca/pool.py


# ---- Randomness: a function of the seed, a name and numbers, never of what was drawn before ------


def stream(seed, name, *numbers):
    """The key for one purpose, such as ("posterior", update). The numbers may be traced."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def draw_each(draw, key, numbers):
    """draw(fold_in(key, n)) for each of these numbers n, stacked. A number, such as the place of an
    image in the batch, gets the same draw on any device and in a batch of any size."""
    return jax.vmap(lambda n: draw(jax.random.fold_in(key, n)))(numbers)


def normal(key, numbers, size):
    """Standard normal noise, float32 [len(numbers), size]. Each of these numbers has its own key,
    as in `draw_each`."""
    return draw_each(lambda key: jax.random.normal(key, (size,)), key, numbers)


# ---- The gradient -------------------------------------------------------------------------------


def loss(model, params, x, noise, kl_weight=1.0):
    """The loss of images x [n, H, W, colours] with standard normal noise [n, latent], and what to
    report of it, [loss, −log p(x|z), KL], all as means over the images. As in the paper and the
    reproduction, each image has one sample z."""
    mean, logvar = model.encode(params, x)
    logits = model.decode(params, reparametrize(mean, logvar, noise))
    return objective(model.likelihood, mean, logvar, logits, x, kl_weight)


def batch_gradient(model, config, state, t, images, indices):
    """The gradient of the loss over this device's share of the batch of update t = 1, 2, …

    indices: int32 [B/D]. Returns the gradient (shaped like the parameters), the loss and its two
    terms [3], and the pool as it was.
    """
    noise = normal(stream(state.seed, "posterior", t), places(len(indices)), model.latent_size)

    def loss_of(params, stored, noise):
        x = as_floats(model.likelihood, stored)
        value, terms = loss(model, params, x, noise, config.train.kl_weight)
        return value, (terms, ())  # (): unlike pool training, nothing is kept of each image

    grads, terms, _ = accumulate(
        config.train.micro_batch,
        jax.grad(loss_of, has_aux=True),
        state.params,
        images[indices],
        noise,
    )
    return grads, terms, state.pool


def accumulate(micro_batch, gradient, params, *arrays):
    """Gradient accumulation: the mean gradient over this device's images. It takes one micro-batch
    after another, so that only one is in memory.

    micro_batch: the largest number of images in a micro-batch (None: all of them). There are as few
        micro-batches as possible, all of one size.
    gradient: a function (params, *arrays) -> grads, (terms, results), called for each micro-batch.
        grads (shaped like params) and terms [3] are means over its images. results is a pytree of
        arrays whose first axis is that of the images, such as the grown cells in pool training.
    arrays: the other arguments of `gradient`, for all images of this device: each [B/D, …].

    Returns grads and terms averaged over all of these images, and the results of all of them.
    """
    batch = len(arrays[0])
    limit = micro_batch or batch
    parts = next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= limit)

    def add(sums, arrays):
        grads, (terms, results) = gradient(params, *arrays)
        return jax.tree.map(jnp.add, sums, (grads, terms)), results

    zeros = jax.tree.map(jnp.zeros_like, params), jnp.zeros(3)
    split = jax.tree.map(lambda a: a.reshape(parts, batch // parts, *a.shape[1:]), arrays)
    sums, results = lax.scan(add, zeros, split)
    grads, terms = jax.tree.map(lambda a: a / parts, sums)
    return grads, terms, jax.tree.map(lambda a: a.reshape(batch, *a.shape[2:]), results)


# ---- The update ---------------------------------------------------------------------------------


class Learner(NamedTuple):
    """A model and the functions that train it. A faster function with the same arguments and
    results can take the place of each of these.

    gradient:    model, config, state, t, images, indices -> gradient, terms, pool
    init_pool:   model, config, params, images -> the pool before the first update
    global_norm: gradient -> its norm
    """

    model: Model
    gradient: Callable = batch_gradient
    init_pool: Callable = lambda model, config, params, images: ()  # no pool
    global_norm: Callable = optimizer.global_norm


def init_state(learner, config, images, trained=None):
    """The State before the first update.

    trained: a dict with the parameters of the "encoder", the "decoder" or both, in place of random
    ones.
    """
    params = jax.jit(learner.model.init)(stream(config.seed, "init")) | (trained or {})
    pool = learner.init_pool(learner.model, config, params, images)
    return State(params, optimizer.adam_init(params), jnp.int32(0), jnp.int32(config.seed), pool)


def computed_in(model, dtype):
    """The same model, but encode, decode and develop compute in `dtype`, "float32" or "bfloat16".
    What they take and return stays float32."""

    def cast(function, params, x, *rest):
        return jax.tree.map(lambda y: y.astype(x.dtype), function(params, x.astype(dtype), *rest))

    model = model._replace(encode=partial(cast, model.encode), decode=partial(cast, model.decode))
    return model._replace(develop=partial(cast, model.develop)) if model.develop else model


def with_given_encoder(model):
    """The same model, but its encoder does not learn."""
    return model._replace(encode=lambda *arguments: lax.stop_gradient(model.encode(*arguments)))


def one_update(learner, config, state, images, indices):
    """One update of the State: gradient, mean over the devices, clipping, Adam.

    indices: int32 [B/D], or with a pool [F/D], those of the fresh images. Returns the new State,
    and the metrics of the global batch: the loss, its two terms, and the norm of its gradient
    before clipping.
    """
    settings = config.train
    t = state.update + 1
    model = computed_in(learner.model, settings.dtype)
    if settings.encoder_from:
        model = with_given_encoder(model)
    grads, terms, pool = learner.gradient(model, config, state, t, images, indices)
    grads, terms = lax.pmean((grads, terms), "devices")
    norm = learner.global_norm(grads)
    grads = optimizer.clip_by_norm(grads, norm, settings.clip_norm)
    rate = optimizer.learning_rate(
        t, settings.learning_rate, settings.warmup_updates, settings.decay_updates
    )
    params, moments = optimizer.adam(grads, state.moments, state.params, t, rate)
    return State(params, moments, t, state.seed, pool), jnp.append(terms, norm)


def make_update_call(learner, config, devices=None):
    """Makes the function (state, images, indices, updates) -> (state, metrics). The indices name
    the images of K updates, and the function makes the first `updates` of these updates in one
    device call. (The reproduction makes 125 in a call.)

    It runs on the D devices in `devices` (None: on all there are). Each device has a copy of the
    State, but only its share of the pool, whose arrays are [D, P/D, …]. The indices are split as
    well: [D, K, B/D], or with a pool [D, K, F/D].

    metrics is float32 [K, 4]. Its columns are METRICS, and its rows from index `updates` on are
    zeros. The buffers of the given State are donated, so that State cannot be used again.
    """

    def call(state, images, indices, updates):
        def body(i, carry):
            state, metrics = carry
            state, new = one_update(learner, config, state, images, indices[i])
            return state, metrics.at[i].set(new)

        metrics = jnp.zeros((len(indices), len(METRICS)))
        return lax.fori_loop(0, updates, body, (state, metrics))

    axes = State(params=None, moments=None, update=None, seed=None, pool=0)  # None: not split
    return jax.pmap(
        call, "devices", in_axes=(axes, None, 0, None), out_axes=(axes, None),
        devices=devices, donate_argnums=0,
    )  # fmt: skip
