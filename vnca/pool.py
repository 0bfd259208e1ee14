"""Pool training of the non-doubling model, with damage (Palm et al. 2022).

Each of the pool's P rows holds the index of a training image, and a grid of cells that has been
grown to show it. Each update of B images takes B − F rows from the pool, damages some, grows them
with F fresh images, and puts all B into the pool. As published, half of B is fresh, a quarter
damaged.

All functions but `init_pool` run inside a map over "devices". Each of the D devices keeps P/D rows,
and only the rows that are taken or put back move between devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vnca.images import IMAGE_SIZE, unpack
from vnca.losses import bernoulli_log_likelihood, gaussian_kl, reparametrize
from vnca.noise import draw_each, normal, stream


class Pool(NamedTuple):
    """P rows, or on each device its share of them."""

    cells: jax.Array  # float32 [P, 32, 32, C]
    indices: jax.Array  # int32 [P], of training images


def init_pool(model, config, params, images):
    """The Pool before the first update: the first P training images, each with the initial cells
    of one sample of q(z|x). images: packed bits, uint8 [N, 98]."""
    size = config.train.pool_size

    @jax.jit
    def init(params, bits):
        indices = jnp.arange(size)
        mean, logvar = model.encode(params, unpack(bits))
        key = stream(config.seed, "posterior", 0)  # the first update is number 1
        noise = normal(key, indices, model.latent_size)
        return Pool(model.initial_cells(reparametrize(mean, logvar, noise)), indices)

    return init(params, images[:size])


def pool_gradient(model, config, state, t, images, indices, mean_gradient, from_pool=True):
    """Like `vnca.training.batch_gradient`, for F fresh images (`indices`, int32 [F/D]) and B − F
    rows of the pool. Also returns the pool after the update.

    from_pool: a boolean, which may be traced. If False, pool images grow from z like fresh ones.
    """
    pool = state.pool
    batch = config.train.batch_size
    device = lax.axis_index("devices")
    fresh = len(indices) * lax.axis_size("devices")
    # The same rows on every device: B − F to take, and F more that the fresh images overwrite.
    rows = jax.random.permutation(stream(config.seed, "pool", t), config.train.pool_size)[:batch]
    taken, overwritten = jnp.split(rows, [batch - fresh])

    pool_indices = take(pool.indices, taken)
    cells = take(pool.cells, taken)
    places = jnp.arange(len(cells)) + device * len(cells)  # of this device's rows in `taken`
    cells = damage(config, t, places, cells)

    bits = images[jnp.concatenate([indices, pool_indices])]
    fresh_places = jnp.arange(len(indices)) + device * len(indices)
    batch_places = jnp.concatenate([fresh_places, fresh + places])  # 0…F−1, then F…B−1
    gradient, arrays = growth_gradient(model, config, t, bits, batch_places, cells, from_pool)
    grads, terms, grown = mean_gradient(gradient, state.params, *arrays)

    fresh_grown, pool_grown = jnp.split(grown, [len(indices)])
    cells = put(pool.cells, taken, pool_grown)  # these rows keep their images
    cells = put(cells, overwritten, fresh_grown)
    return grads, terms, Pool(cells, put(pool.indices, overwritten, indices))


def take(array, rows):
    """Takes `rows` of an array that is split over the devices, [P/D, …]. Returns this device's
    share of them, [len(rows)/D, …]."""
    found = array.at[local(rows, len(array))].get(mode="fill", fill_value=0)
    return lax.psum_scatter(found, "devices", tiled=True)  # one device has the row, the others 0


def damage(config, t, places, cells):
    """Sets a square of cells to zero in the first B/4 of the rows taken.

    cells: [n, 32, 32, C]; places: the place of each row in `taken`, int32 [n].
    """
    key = stream(config.seed, "damage", t)
    square = draw_each(lambda key: damage_mask(key, config.train.damage_size), key, places)
    damaged = (places < config.train.batch_size // 4)[:, None, None, None]
    return jnp.where(damaged & square, 0, cells)


def damage_mask(key, size):
    """A mask [32, 32, 1], True in a size×size square. Its corner is uniform in 0…(31 − size)
    both ways, as in the reproduction, although 32 − size would fit, too."""
    corner = jax.random.randint(key, (2, 1), 0, max(IMAGE_SIZE - size, 1))
    line = jnp.arange(IMAGE_SIZE)
    rows, columns = (line >= corner) & (line < corner + size)
    return (rows[:, None] & columns)[..., None]


def growth_gradient(model, config, t, bits, batch_places, pool_cells, from_pool):
    """A function and its arrays, for `mean_gradient`: params, *arrays -> the gradient, (loss terms
    [3], grown cells [n, 32, 32, C]). Fresh images grow from z, and pool images from their cells,
    for equally many steps.

    bits: packed images, uint8 [n, 98], the fresh images first; batch_places: the place of each in
    the global batch, int32 [n]; pool_cells: of the pool images, [m, 32, 32, C]. The cells are
    constants, so that no gradient reaches earlier updates. The loss includes the encoder's KL for
    all n images.
    """
    least, most = config.model.train_steps
    steps = jax.random.randint(stream(config.seed, "steps", t), (), least, most + 1)
    noise = normal(stream(config.seed, "posterior", t), batch_places, model.latent_size)
    # A micro-batch may hold fresh and pool images, and pool_cells is not cut into micro-batches. So
    # each image has an index into pool_cells, or a negative number if it is fresh.
    source = jnp.arange(len(bits)) - (len(bits) - len(pool_cells))

    def loss(params, bits, noise, source):
        x = unpack(bits)
        mean, logvar = model.encode(params, x)
        z = reparametrize(mean, logvar, noise)
        grown_before = (from_pool & (source >= 0))[:, None, None, None]
        cells = jnp.where(grown_before, pool_cells[jnp.maximum(source, 0)], model.initial_cells(z))
        cells = model.develop(params, cells, steps)
        log_px_z = bernoulli_log_likelihood(cells[..., :1], x)
        kl = gaussian_kl(mean, logvar)
        value = -jnp.mean(log_px_z - kl)
        return value, (jnp.stack([value, -jnp.mean(log_px_z), jnp.mean(kl)]), cells)

    return jax.grad(loss, has_aux=True), (bits, noise, source)


def put(array, rows, new):
    """Overwrites `rows` of an array that is split over the devices, [P/D, …]. Each device gives its
    share `new` of them, [len(rows)/D, …]. Returns this device's part of the array."""
    new = lax.all_gather(new, "devices", tiled=True)
    return array.at[local(rows, len(array))].set(new, mode="drop", unique_indices=True)


def local(rows, count):
    """Converts rows of the whole pool to this device's local rows, below `count`. Rows of other
    devices become distinct numbers from `count` on. `take` reads 0 there, and `put` drops them."""
    mine = rows - lax.axis_index("devices") * count
    return jnp.where((mine >= 0) & (mine < count), mine, count + jnp.arange(len(rows)))
