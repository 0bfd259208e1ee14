"""The training update, data-parallel, and many of them in one device call (Palm et al. 2022)."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from vnca.gradient import gradient
from vnca.models import computed_in
from vnca.noise import stream
from vnca.optimizer import adam, adam_init, clip_by_global_norm, learning_rate
from vnca.pool import init_pool, pool_gradient

METRICS = "loss", "reconstruction", "kl", "grad_norm"


def init_state(model, config, images):
    """All that training changes: parameters, Adam's moments, the number of updates done, and for
    the non-doubling model a pool. images: packed bits of the training set, uint8 [N, 98]."""
    params = init_params(model, config.seed)
    state = {"params": params, "moments": adam_init(params), "update": jnp.zeros((), jnp.int32)}
    return state | ({"pool": init_pool(model, config, params, images)} if model.develop else {})


def init_params(model, seed):
    """The parameters before the first update."""
    return jax.jit(model.init)(stream(seed, "init"))  # one program, not one an array


def make_update(model, config, devices):
    """One update, inside a map over the axis "devices": (state, images, indices of this device's
    fresh images) -> (state, metrics [4]), as METRICS."""
    settings = config.train
    model = computed_in(model, settings.dtype)
    compute_gradient = partial(pool_gradient if model.develop else gradient, model, config, devices)

    def update(state, images, indices):
        t = state["update"] + 1
        grads, terms, pool = compute_gradient(state, t, images, indices)
        grads, terms = lax.pmean((grads, terms), "devices")
        grads, norm = clip_by_global_norm(grads, settings.clip_norm)
        rate = learning_rate(
            t, settings.learning_rate, settings.warmup_updates, settings.decay_updates
        )
        params, moments = adam(grads, state["moments"], state["params"], t, rate)
        state = {"params": params, "moments": moments, "update": t} | pool
        return state, jnp.append(terms, norm)

    return update


def make_update_call(model, config, devices):
    """One device call: (state, images, indices, count) -> (state, metrics).

    state and images (packed bits, uint8 [N, 98]) are whole on every device, except a pool, which
    is split over them [D, P/D, …], like the indices of fresh images, int32 [D, K, fresh/D]. The
    first `count` of the K updates are done: a shorter last call is the same program.
    metrics: float32 [K, 4], as METRICS, means over the global batch.
    """
    update = make_update(model, config, devices)

    def call(rest, pool, images, indices, count):
        def one(i, carry):
            state, metrics = carry
            state, new = update(state, images, indices[i])
            return state, metrics.at[i].set(new)

        metrics = jnp.zeros((indices.shape[0], len(METRICS)))
        state, metrics = lax.fori_loop(0, count, one, (rest | pool, metrics))
        return *split_pool(state), metrics

    mapped = jax.pmap(
        call,
        "devices",
        in_axes=(None, 0, None, 0, None),
        out_axes=(None, 0, None),
        donate_argnums=(0, 1),
    )

    def update_call(state, *arguments):
        rest, pool, metrics = mapped(*split_pool(state), *arguments)
        return rest | pool, metrics

    update_call.lower = lambda state, *arguments: mapped.lower(*split_pool(state), *arguments)
    update_call.trace = lambda state, *arguments: mapped.trace(*split_pool(state), *arguments)
    return update_call


def split_pool(state):
    """What is whole on every device, and {"pool": …} or {}, which is split over them."""
    pool = {name: state[name] for name in state if name == "pool"}
    return {name: state[name] for name in state if name != "pool"}, pool
