"""The training update, and many of them in one device call (Palm et al. 2022)."""

import traceback
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vnca.data import unpack
from vnca.losses import bernoulli_log_likelihood, elbo, gaussian_kl, reparametrize
from vnca.models import IMAGE_SIZE, computed_in, crop
from vnca.noise import at_places, normal, stream
from vnca.optimizer import adam, adam_init, clip_by_global_norm, learning_rate

METRICS = "loss", "reconstruction", "kl", "grad_norm"


def init_state(model, seed):
    """All that training changes, but for a pool: parameters, Adam's moments, updates done."""
    params = jax.jit(model.init)(stream(seed, "init"))  # one program, not one an array
    return {"params": params, "moments": adam_init(params), "update": jnp.zeros((), jnp.int32)}


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
    return update_call


def first_not_finite(model, config, state, images, indices):
    """Where an update goes wrong, as words: the first operation of it with a result that is not
    finite, or an array of the state that is so before it.

    The update is computed on one device, an operation at a time. state: host arrays, the pool whole
    [P, …]; indices: of all fresh images, int32 [fresh].
    """
    for path, x in jax.tree.leaves_with_path(state):
        if not np.all(np.isfinite(x)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return f"{name} was already not finite before it"
    update = make_update(model, config, devices=1)

    def on_one(rest, pool, indices):
        return update(rest | pool, images, indices)

    rest, pool = split_pool(state)
    pool, indices = jax.tree.map(lambda x: x[None], (pool, indices))
    images = jax.device_put(images, jax.local_devices()[0])
    try:
        with jax.disable_jit(), jax.debug_nans(True), jax.debug_infs(True):
            jax.vmap(on_one, (None, 0, 0), axis_name="devices")(rest, pool, indices)
    except FloatingPointError as fault:
        ours = Path(__file__).parent
        frames = traceback.extract_tb(fault.__traceback__)
        frame = [f for f in frames if Path(f.filename).parent == ours][-1]
        return f"{fault}, at {frame.filename}:{frame.lineno} ({frame.name})"
    return "computed again, on one device, it is finite"


def split_pool(state):
    """What is whole on every device, and {"pool": …} or {}, which is split over them."""
    pool = {name: state[name] for name in state if name == "pool"}
    return {name: state[name] for name in state if name != "pool"}, pool


def gradient(model, config, devices, state, t, images, indices):
    """Gradient, loss terms [3] and no pool: means over this device's share of the batch."""
    local = config.train.batch_size // devices
    # Noise keyed by update and by place in the global batch: the same on any device count.
    places = lax.axis_index("devices") * local + jnp.arange(local)
    noise = normal(stream(config.seed, "posterior", t), places, model.latent_size)

    def loss(params, bits, noise):
        log_px, kl = elbo(model, params, unpack(bits), noise)
        return _terms(log_px, kl), None

    micro = _largest_divisor(local, config.train.micro_batch)
    parts = images[indices], noise
    grads, terms, _ = _by_micro_batches(loss, state["params"], parts, local // micro)
    return grads, terms, {}


def _terms(log_px, kl):
    """Loss (−ELBO), reconstruction and KL: means over images, nats."""
    return jnp.stack([jnp.mean(kl - log_px), jnp.mean(-log_px), jnp.mean(kl)])


def _largest_divisor(n, limit):
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)


def _by_micro_batches(loss, params, parts, count):
    """Gradient of the loss's first term, its terms, and what it returns beside them, stacked.

    The arrays of `parts` are cut into `count` equal pieces, one after the other: the mean gradient
    is the same, the memory a part of it, and on a CPU the arrays fit into its cache.
    """

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


# ---- Pool training (Palm et al. 2022, for the non-doubling model) ----------------------------


def init_pool(model, config, params, images):
    """The first P training images and a sample of q(z|x) for each, copied over the grid.

    images: packed bits, uint8 [N, 98]. Returns {"numbers": int32 [P], of the training images,
    "cells": float32 [P, 32, 32, C]}, the cells' states.
    """
    size = config.train.pool_size

    @jax.jit
    def sample(params, bits):
        mean, logvar = model.encode(params, unpack(bits))
        noise = normal(stream(config.seed, "posterior", 0), jnp.arange(size), model.latent_size)
        return model.seed(reparametrize(mean, logvar, noise))

    return {"numbers": jnp.arange(size, dtype=jnp.int32), "cells": sample(params, images[:size])}


def pool_gradient(model, config, devices, state, t, images, indices):
    """Gradient and loss terms as in `gradient`, of a batch half fresh and half from the pool, and
    the pool with the results in it.

    Global batch B: B/2 fresh images; B/2 rows of the pool, uniform without replacement, a quarter
    of the batch damaged first; all take the same number of steps. The results overwrite the rows
    taken and B/2 others. Before update `train.pool_from` (1 as published) the images of the rows
    taken begin as fresh ones do. Rows stay on their devices: what moves is the B/2 taken and the B
    put back, 96 MiB as published, where a shuffle of the pool moves 512 MiB.
    """
    settings, low_high = config.train, config.model.train_steps
    half = settings.batch_size // 2
    local = half // devices
    device = lax.axis_index("devices")
    places = device * local + jnp.arange(local)

    # The same on every device: the number of steps, and the rows that are taken and overwritten.
    steps = jax.random.randint(stream(config.seed, "steps", t), (), low_high[0], low_high[1] + 1)
    shuffle = jax.random.permutation(stream(config.seed, "pool", t), settings.pool_size)
    taken, others = shuffle[:half], shuffle[half : 2 * half]
    pool, rows = state["pool"], settings.pool_size // devices

    def take(array):
        """Rows `taken` of an array [P/D, …] split over the devices: this device's share of them."""
        mine = taken - device * rows
        here = ((mine >= 0) & (mine < rows)).reshape(-1, *[1] * (array.ndim - 1))
        found = jnp.where(here, array[mine.clip(0, rows - 1)], 0)
        return lax.psum_scatter(found, "devices", tiled=True)

    def put(array, where, new):
        """The array with rows `where` of the whole pool overwritten by every device's new."""
        new = lax.all_gather(new, "devices", tiled=True)
        mine = where - device * rows
        mine = jnp.where((mine >= 0) & (mine < rows), mine, rows)  # out of bounds: dropped
        return array.at[mine].set(new, mode="drop", unique_indices=True)

    numbers, cells = take(pool["numbers"]), take(pool["cells"])
    whole = at_places(
        partial(undamaged, size=settings.damage_size), stream(config.seed, "damage", t), places
    )
    cells = jnp.where((places < half // 2)[:, None, None, None] & ~whole, 0, cells)
    noise, pool_noise = (
        normal(stream(config.seed, "posterior", t), p, model.latent_size)
        for p in (places, half + places)
    )

    def loss(params, fresh_bits, pool_bits, noise, pool_noise, cells):
        x = unpack(jnp.concatenate([fresh_bits, pool_bits]))
        mean, logvar = model.encode(params, x)
        z = reparametrize(mean, logvar, jnp.concatenate([noise, pool_noise]))
        seeds, fresh = model.seed(z), len(noise)
        cells = jnp.where(t < settings.pool_from, seeds[fresh:], cells)
        s = model.develop(params, jnp.concatenate([seeds[:fresh], cells]), steps)
        log_px = bernoulli_log_likelihood(crop(s[..., :1], IMAGE_SIZE), x)
        return _terms(log_px, gaussian_kl(mean, logvar)), (s[:fresh], s[fresh:])

    micro = _largest_divisor(local, max(settings.micro_batch // 2, 1))
    parts = images[indices], images[numbers], noise, pool_noise, cells
    grads, terms, (grown, regrown) = _by_micro_batches(loss, state["params"], parts, local // micro)
    pool = {
        "numbers": put(pool["numbers"], others, indices),  # the rows taken keep theirs
        "cells": put(put(pool["cells"], taken, regrown), others, grown),
    }
    return grads, terms, {"pool": pool}


def undamaged(key, size, grid=IMAGE_SIZE):
    """A mask [grid, grid, 1], False in a size×size square whose corner is uniform in 0…grid−size−1
    each way (in 0…15 as published)."""
    corner = jax.random.randint(key, (2, 1), 0, max(grid - size, 1))
    rows, columns = (jnp.arange(grid) >= corner) & (jnp.arange(grid) < corner + size)
    return ~(rows[:, None] & columns)[..., None]


# ---- The order of the data -------------------------------------------------------------------


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
