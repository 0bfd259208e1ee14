"""Pool training of the non-doubling model, with damage (Palm et al. 2022).

Of P pairs (number of a training image, state of its cells) an update takes B/2, B the global batch,
damages half of them, grows them and B/2 fresh images by the same number of steps, and puts all B
back. Rows stay on their devices, P/D on each of D: what moves is 96 MiB as published, where a
shuffle of the pool moves 512 MiB.
"""

import jax
import jax.numpy as jnp
from jax import lax

from vnca.cpu import gradient_in_pieces
from vnca.images import IMAGE_SIZE, unpack
from vnca.losses import bernoulli_log_likelihood, gaussian_kl, loss_terms, reparametrize
from vnca.noise import at_places, normal, stream


def init_pool(model, config, params, images):
    """The first P training images, packed bits uint8 [N, 98], and in all their cells a sample of
    q(z|x): {"numbers": int32 [P] of the images, "cells": float32 [P, 32, 32, C]}."""
    size = config.train.pool_size

    @jax.jit
    def sample(params, bits):
        mean, logvar = model.encode(params, unpack(bits))
        noise = normal(stream(config.seed, "posterior", 0), jnp.arange(size), model.latent_size)
        return model.seed(reparametrize(mean, logvar, noise))

    return {"numbers": jnp.arange(size, dtype=jnp.int32), "cells": sample(params, images[:size])}


def pool_gradient(model, config, state, t, images, indices):
    """Gradient and loss terms [3] as of `vnca.training.gradient`, and {"pool": the pool after it},
    which has this device's rows, [P/D, …]; indices: its fresh images, int32 [B/2/D]."""
    places = lax.axis_index("devices") * len(indices) + jnp.arange(len(indices))
    # The rows that are overwritten, the same on every device: B/2 that are taken, and B/2 others.
    shuffle = jax.random.permutation(stream(config.seed, "pool", t), config.train.pool_size)
    half, pool = config.train.batch_size // 2, state["pool"]
    taken, others = shuffle[:half], shuffle[half : 2 * half]
    numbers, cells = take(pool["numbers"], taken), take(pool["cells"], taken)
    parts = images[indices], images[numbers], damage(config, t, places, cells)
    grads, terms, results = growth_gradient(model, config, state["params"], t, places, parts)
    grown, regrown = results
    pool = {
        "numbers": put(pool["numbers"], others, indices),  # the rows taken keep theirs
        "cells": put(put(pool["cells"], taken, regrown), others, grown),
    }
    return grads, terms, {"pool": pool}


def take(array, rows):
    """These rows of an array [P/D, …] split over the devices: this device's share, [len/D, …]."""
    mine, here = _mine(rows, len(array))
    here = here.reshape(-1, *[1] * (array.ndim - 1))
    found = jnp.where(here, array[mine.clip(0, len(array) - 1)], 0)
    return lax.psum_scatter(found, "devices", tiled=True)


def put(array, rows, new):
    """The array [P/D, …] with these rows of the whole pool overwritten by every device's new."""
    new = lax.all_gather(new, "devices", tiled=True)
    mine, here = _mine(rows, len(array))
    outside = len(array) + jnp.arange(len(rows))  # each a place of its own, and dropped
    return array.at[jnp.where(here, mine, outside)].set(new, mode="drop", unique_indices=True)


def _mine(rows, count):
    """Rows of the whole pool as numbers among this device's, and whether they are its own."""
    mine = rows - lax.axis_index("devices") * count
    return mine, (mine >= 0) & (mine < count)


def damage(config, t, places, cells):
    """Cells [n, 32, 32, C], those at the first B/4 places of the batch without a square."""
    key, size = stream(config.seed, "damage", t), config.train.damage_size
    whole = at_places(lambda key: undamaged(key, size), key, places)
    hurt = (places < config.train.batch_size // 4)[:, None, None, None]
    return jnp.where(hurt & ~whole, 0, cells)


def undamaged(key, size, grid=IMAGE_SIZE):
    """A mask [grid, grid, 1], False in a size×size square whose corner is uniform in 0…grid−size−1
    each way (in 0…15 as published)."""
    corner = jax.random.randint(key, (2, 1), 0, max(grid - size, 1))
    rows, columns = (jnp.arange(grid) >= corner) & (jnp.arange(grid) < corner + size)
    return ~(rows[:, None] & columns)[..., None]


def growth_gradient(model, config, params, t, places, parts):
    """Gradient, loss terms [3], and the cells of fresh and of pool images after T more steps.

    parts: bits of fresh images, of pool images, uint8 [n, 98], and the cells of the latter
    [n, 32, 32, C], into whose past no gradient flows. All take the same number of steps, drawn
    here and so bounded; the KL is the encoder's for all. Before update `train.pool_from` (1 as
    published) the images of the pool begin as fresh ones do.
    """
    least, most = config.model.train_steps
    steps = jax.random.randint(stream(config.seed, "steps", t), (), least, most + 1)
    key, half = stream(config.seed, "posterior", t), config.train.batch_size // 2
    noise = [normal(key, p, model.latent_size) for p in (places, half + places)]

    def loss(params, fresh_bits, pool_bits, cells, noise, pool_noise):
        x = unpack(jnp.concatenate([fresh_bits, pool_bits]))
        mean, logvar = model.encode(params, x)
        z = reparametrize(mean, logvar, jnp.concatenate([noise, pool_noise]))
        seeds, fresh = model.seed(z), len(noise)
        cells = jnp.where(t < config.train.pool_from, seeds[fresh:], cells)
        s = model.develop(params, jnp.concatenate([seeds[:fresh], cells]), steps)
        log_px = bernoulli_log_likelihood(s[..., :1], x)
        return loss_terms(log_px, gaussian_kl(mean, logvar)), (s[:fresh], s[fresh:])

    most = config.train.micro_batch // 2  # pairs of a fresh image and one of the pool
    return gradient_in_pieces(loss, params, (*parts, *noise), most)
