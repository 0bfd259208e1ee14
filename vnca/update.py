"""The training update, and many of them in one device call (paper, section 3 and appendix)."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vnca.data import unpack
from vnca.losses import elbo
from vnca.optimizer import adam, adam_init, clip_by_global_norm, learning_rate

METRICS = "loss", "reconstruction", "kl", "grad_norm"


def init_state(model, seed):
    """All that training changes: parameters, Adam's moments, and the number of updates done."""
    params = jax.jit(model.init)(jax.random.key(seed))  # one program, not one an array
    return {"params": params, "moments": adam_init(params), "update": jnp.zeros((), jnp.int32)}


def make_update_call(model, config, devices):
    """One device call: (state, images, indices, count) -> (state, metrics).

    state and images (packed bits, uint8 [N, 98]) are whole on every device, indices int32
    [D, K, B/D] of images are split over them. The first `count` of the K updates are done, so a
    shorter last call is the same program. metrics: float32 [K, 4], as METRICS, of the global batch.
    """
    settings = config.train
    local = settings.batch_size // devices  # images a device
    micro = max(n for n in range(1, min(settings.micro_batch, local) + 1) if local % n == 0)

    def loss(params, x, noise):
        log_px, kl = elbo(model, params, x, noise)
        terms = jnp.mean(kl - log_px), jnp.mean(-log_px), jnp.mean(kl)
        return terms[0], jnp.stack(terms)

    def gradient(params, x, noise):
        """Mean over the device's images, by micro-batches: less memory, and on a CPU its cache."""

        def add(total, part):
            (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(params, *part)
            return jax.tree.map(jnp.add, total, (grads, terms)), None

        parts = jax.tree.map(lambda a: a.reshape(local // micro, micro, *a.shape[1:]), (x, noise))
        zero = jax.tree.map(jnp.zeros_like, params), jnp.zeros(3)
        return jax.tree.map(lambda a: a * micro / local, lax.scan(add, zero, parts)[0])

    def update(state, bits):
        t = state["update"] + 1
        # Noise keyed by update and by place in the global batch: the same on any device count.
        places = lax.axis_index("devices") * local + jnp.arange(local)
        key = jax.random.fold_in(jax.random.key(config.seed), t)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(places)
        noise = jax.vmap(lambda k: jax.random.normal(k, (model.latent_size,)))(keys)

        local_gradient = gradient(state["params"], unpack(bits), noise)
        grads, terms = lax.pmean(local_gradient, "devices")
        grads, norm = clip_by_global_norm(grads, settings.clip_norm)
        rate = learning_rate(
            t, settings.learning_rate, settings.warmup_updates, settings.decay_updates
        )
        params, moments = adam(grads, state["moments"], state["params"], t, rate)
        return {"params": params, "moments": moments, "update": t}, jnp.append(terms, norm)

    def call(state, images, indices, count):
        def one(i, carry):
            state, metrics = carry
            state, new = update(state, images[indices[i]])
            return state, metrics.at[i].set(new)

        metrics = jnp.zeros((indices.shape[0], len(METRICS)))
        return lax.fori_loop(0, count, one, (state, metrics))

    return jax.pmap(call, "devices", in_axes=(None, None, 0, None), out_axes=None, donate_argnums=0)


@lru_cache(maxsize=2)
def _epoch(seed, epoch, images):
    return np.random.RandomState([seed, epoch]).permutation(images).astype(np.int32)


def batches(seed, first, count, batch, images):
    """Image numbers of updates first, first + 1, … (from 1): int32 [count, batch].

    Each epoch is a shuffle without replacement, its incomplete last batch dropped, and a function
    of seed and update number alone, so a resumed run repeats and skips nothing.
    """
    places = [divmod(t - 1, images // batch) for t in range(first, first + count)]
    return np.stack([_epoch(seed, e, images)[i * batch : (i + 1) * batch] for e, i in places])
