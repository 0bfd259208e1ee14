"""Pool training of the non-doubling model, with damage (Palm et al. 2022).

Of P rows (number of a training image, state of its cells) an update of B images takes B − F,
damages B/4 of these, grows them and F fresh images (B/2 as published) by the same number of steps,
and puts all B back. Each of D devices keeps its P/D rows: those taken and put back alone move.
"""

import jax
import jax.numpy as jnp
from jax import lax

from vnca.cpu import mean_in_pieces
from vnca.images import IMAGE_SIZE, unpack
from vnca.losses import bernoulli_log_likelihood, gaussian_kl, loss_terms, reparametrize
from vnca.noise import at_places, normal, stream


def init_pool(model, config, params, images):
    """The first P training images, packed bits uint8 [N, 98], and in all their cells a sample of
    q(z|x): {"numbers": int32 [P] of the images, "cells": float32 [P, 32, 32, C]}."""
    size = config.train.pool_size

    @jax.jit
    def begin(params, bits):
        (mean, logvar), numbers = model.encode(params, unpack(bits)), jnp.arange(size)
        noise = normal(stream(config.seed, "posterior", 0), numbers, model.latent_size)
        return {"numbers": numbers, "cells": model.seed(reparametrize(mean, logvar, noise))}

    return begin(params, images[:size])


def pool_gradient(model, config, state, t, images, indices):
    """Gradient and loss terms [3] as in `vnca.training.gradient`, and the pool after it, which has
    this device's rows, [P/D, …]; indices: its fresh images, int32 [F/D]."""
    # The rows that are overwritten, the same on every device: B − F that are taken, and F others.
    shuffle = jax.random.permutation(stream(config.seed, "pool", t), config.train.pool_size)
    batch, pool, params = config.train.batch_size, state["pool"], state["params"]
    fresh, device = len(indices) * lax.axis_size("devices"), lax.axis_index("devices")
    taken, others = jnp.split(shuffle[:batch], [batch - fresh])
    both = indices, take(pool["numbers"], taken)
    ours = [device * len(share) + jnp.arange(len(share)) for share in both]  # of fresh, of taken
    parts = *(images[n] for n in both), damage(config, t, ours[1], take(pool["cells"], taken))
    places = ours[0], fresh + ours[1]  # in the batch the fresh images come first
    grads, terms, (grown, regrown) = growth_gradient(model, config, params, t, places, parts)
    numbers = put(pool["numbers"], others, indices)  # the rows taken keep theirs
    cells = put(put(pool["cells"], taken, regrown), others, grown)
    return grads, terms, {"numbers": numbers, "cells": cells}


def take(array, rows):
    """These rows of an array [P/D, …] split over the devices: this device's share, [len/D, …]."""
    found = array.at[_local(rows, len(array))].get(mode="fill", fill_value=0)
    return lax.psum_scatter(found, "devices", tiled=True)  # each row is one device's, else 0


def put(array, rows, new):
    """The array [P/D, …] with these rows of the whole pool overwritten by every device's new."""
    new = lax.all_gather(new, "devices", tiled=True)
    return array.at[_local(rows, len(array))].set(new, mode="drop", unique_indices=True)


def _local(rows, count):
    """Where rows of the whole pool stand among this device's `count`; others' beyond, distinct."""
    mine = rows - lax.axis_index("devices") * count
    return jnp.where((mine >= 0) & (mine < count), mine, count + jnp.arange(len(rows)))


def damage(config, t, places, cells):
    """Cells [n, 32, 32, C], at int32 [n] places of the rows taken; below B/4 they lose a square."""
    key = stream(config.seed, "damage", t)
    kept = at_places(lambda key: undamaged(key, config.train.damage_size), key, places)
    whole = places >= config.train.batch_size // 4
    return jnp.where(whole[:, None, None, None] | kept, cells, 0)


def undamaged(key, size):
    """A mask [32, 32, 1], False in a size×size square, its corner uniform in 0…31−size each way."""
    corner = jax.random.randint(key, (2, 1), 0, max(IMAGE_SIZE - size, 1))
    rows, columns = (jnp.arange(IMAGE_SIZE) >= corner) & (jnp.arange(IMAGE_SIZE) < corner + size)
    return ~(rows[:, None] & columns)[..., None]


def growth_gradient(model, config, params, t, places, parts):
    """Gradient, loss terms [3], and the cells of fresh and of pool images after T more steps.

    places: in the batch, of fresh and of pool images, int32 [n] each; parts: bits of both, uint8
    [n, 98] each, and the cells of the latter [n, 32, 32, C], into whose past no gradient flows. All
    take the same number of steps T; the KL is the encoder's for all of them. Before update
    `train.pool_from` (1 as published) images of the pool begin as fresh ones do.
    """
    (least, most), settings = config.model.train_steps, config.train
    steps = jax.random.randint(stream(config.seed, "steps", t), (), least, most + 1)
    noise = [normal(stream(config.seed, "posterior", t), p, model.latent_size) for p in places]

    def loss(params, fresh_bits, pool_bits, cells, fresh_noise, pool_noise):
        x = unpack(jnp.concatenate([fresh_bits, pool_bits]))
        mean, logvar = model.encode(params, x)
        if settings.get("encoder_from"):  # the run whose encoder this is; it learns no more
            mean, logvar = lax.stop_gradient((mean, logvar))
        z = reparametrize(mean, logvar, jnp.concatenate([fresh_noise, pool_noise]))
        seeds, fresh = model.seed(z), len(fresh_noise)
        cells = jnp.where(t < settings.get("pool_from", 1), seeds[fresh:], cells)
        s = model.develop(params, jnp.concatenate([seeds[:fresh], cells]), steps)
        terms = loss_terms(bernoulli_log_likelihood(s[..., :1], x), gaussian_kl(mean, logvar))
        return terms[0], (terms, (s[:fresh], s[fresh:]))

    most = settings.micro_batch * len(parts[0]) // sum(map(len, places))  # fresh images at once
    return mean_in_pieces(jax.grad(loss, has_aux=True), params, (*parts, *noise), most)
