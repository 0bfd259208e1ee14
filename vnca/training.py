"""The training update, data-parallel, and many of them in one device call (Palm et al. 2022)."""

import jax
import jax.numpy as jnp
from jax import lax

from vnca.cpu import mean_in_pieces
from vnca.images import unpack
from vnca.losses import elbo, loss_terms
from vnca.models import computed_in
from vnca.noise import normal, stream
from vnca.optimizer import adam, adam_init, clip_by_global_norm, learning_rate
from vnca.pool import init_pool, pool_gradient

METRICS = "loss", "reconstruction", "kl", "grad_norm"  # nats an image, but for the last


def init_state(model, config, images, encoder=None):
    """All that training changes: parameters, moments, the number of updates done, and any pool.
    images: packed bits of the training set, uint8 [N, 98]; encoder: parameters to begin with."""
    params = jax.jit(model.init)(stream(config.seed, "init"))  # one program, not one an array
    params = params | ({"encoder": encoder} if encoder else {})
    pool = init_pool(model, config, params, images) if model.develop else {}
    return {"params": params, "moments": adam_init(params), "update": jnp.int32(0), "pool": pool}


def gradient(model, config, state, t, images, indices):
    """Gradient, loss terms [3] and an empty pool: means over this device's share of the batch.

    images: packed bits, uint8 [N, 98]; indices: int32 [B/D], D devices; t: the update, from 1.
    """
    # Noise keyed by update and by place in the global batch: the same on any device count.
    places = lax.axis_index("devices") * len(indices) + jnp.arange(len(indices))
    noise = normal(stream(config.seed, "posterior", t), places, model.latent_size)

    def loss(params, bits, noise):
        terms = loss_terms(*elbo(model, params, unpack(bits), noise))
        return terms[0], (terms, {})

    parts, most = (images[indices], noise), config.train.micro_batch
    return mean_in_pieces(jax.grad(loss, has_aux=True), state["params"], parts, most)


def update(model, config, state, images, indices):
    """One update, inside a map over the axis "devices", of a state as in `init_state`, with images
    and fresh indices as in `gradient`: the state after it, and metrics [4] as METRICS."""
    t, settings = state["update"] + 1, config.train
    of_batch = pool_gradient if model.develop else gradient  # only the non-doubling one has a pool
    model = computed_in(model, settings.dtype)
    grads, terms, pool = of_batch(model, config, state, t, images, indices)
    grads, terms = lax.pmean((grads, terms), "devices")
    grads, norm = clip_by_global_norm(grads, settings.clip_norm)
    rate = learning_rate(t, settings.learning_rate, settings.warmup_updates, settings.decay_updates)
    params, moments = adam(grads, state["moments"], state["params"], t, rate)
    state = {"params": params, "moments": moments, "update": t, "pool": pool}
    return state, jnp.append(terms, norm)


def make_update_call(model, config, devices=None):
    """One device call: (state, images, indices, count) -> (state, metrics); devices: None: all.

    state and images (packed bits, uint8 [N, 98]) are whole on every device; a pool [D, P/D, …] and
    the indices of fresh images, int32 [D, K, F/D], are split. The first `count` of the K
    updates are done. metrics: float32 [K, 4] as METRICS, means over the global batch.
    """

    def call(state, images, indices, count):
        def one(i, carry):
            state, new = update(model, config, carry[0], images, indices[i])
            return state, carry[1].at[i].set(new)

        metrics = jnp.zeros((indices.shape[0], len(METRICS)))
        state, metrics = lax.fori_loop(0, count, one, (state, metrics))
        return state, state.pop("pool"), metrics  # the first without the second

    split = {"params": None, "moments": None, "update": None, "pool": 0}  # None: not split
    axes = {"in_axes": (split, None, 0, None), "out_axes": (None, 0, None)}
    mapped = jax.pmap(call, "devices", devices=devices, donate_argnums=0, **axes)

    def update_call(*arguments):  # on several hosts pmap refuses a dict in out_axes
        rest, pool, metrics = mapped(*arguments)
        return rest | {"pool": pool}, metrics

    update_call.lower = mapped.lower  # for whom it is to be read, not run
    return update_call
