"""Pool training of the non-doubling model. The model goes on from grids that it grew earlier, some
of them damaged. So it learns to keep an image as it is, and to repair a damaged one (the paper,
figure 9, after Mordvintsev et al. 2020, "Growing Neural Cellular Automata").

Each of the pool's P rows holds the index of a training image, and a grid of cells that was grown to
show it. An update of B images

1. draws F fresh images and B − F rows of the pool, and damages the cells of some of these rows;
2. grows all B grids by the same number of steps: fresh ones from z, the others from their cells;
3. puts all B into the pool: regrown grids into their own rows, fresh ones into F other rows.

In the paper and the reproduction half of the batch is fresh, and a quarter is damaged. The pools of
the two differ from each other and from this one. Here each update draws its rows uniformly from all
P, and a grid may be regrown any number of times. (BUILD_NOTES.md describes all three.)

The pool is split over the devices: each of D devices keeps P/D rows, and only the rows of a batch
move between them. D divides P, F and B − F. All functions but `init_pool` and `fresh_images` run
inside a map over "devices".
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from vnca.losses import objective, reparametrize
from vnca.models import IMAGE_SIZE, unpack
from vnca.training import accumulate, draw_each, normal, places, stream

DAMAGED = 1 / 4  # the share of a batch that is damaged, in the paper and in the reproduction


class Pool(NamedTuple):
    """P rows, or on each device its share of them."""

    cells: jax.Array  # float32 [P, 32, 32, C]
    indices: jax.Array  # int32 [P], of training images


def init_pool(model, config, params, images):
    """The Pool before the first update, as in the reproduction: the first P training images, each
    with the initial cells of one sample of q(z|x). images: packed bits, uint8 [N, 98]."""
    size = config.train.pool_size

    @jax.jit
    def init(params, bits):
        indices = jnp.arange(size)
        mean, logvar = model.encode(params, unpack(bits))
        key = stream(config.seed, "posterior", 0)  # 0 is free, since updates count from 1
        noise = normal(key, indices, model.latent_size)
        return Pool(model.initial_cells(reparametrize(mean, logvar, noise)), indices)

    return init(params, images[:size])


def fresh_images(config):
    """F, the number of fresh images in a batch of B: `train.pool_fresh`, or B/2 if that is unset.
    For a model without a pool, B."""
    settings = config.train
    if "pool_size" not in settings:
        return settings.batch_size
    return settings.get("pool_fresh") or settings.batch_size // 2


# ---- Rows of an array that is split over the devices, [P/D, …] on each --------------------------


def local(rows, count):
    """Row numbers of the whole array, int32 [n], as row numbers of this device's part, which has
    `count` rows. The rows of other devices get distinct numbers from `count` on, past the end of
    this part."""
    mine = rows - lax.axis_index("devices") * count
    return jnp.where((mine >= 0) & (mine < count), mine, count + jnp.arange(len(rows)))


def take(array, rows):
    """Reads the rows with these numbers. Every device asks for the same ones. Each gets its share,
    [len(rows)/D, …]: the first device the first ones, and so on."""
    found = array.at[local(rows, len(array))].get(mode="fill", fill_value=0)
    return lax.psum_scatter(found, "devices", tiled=True)  # one device has the row, the others 0


def put(array, rows, new):
    """Overwrites the rows with these numbers. Every device names the same ones. Each gives its
    share of the new rows, `new` [len(rows)/D, …]: the first device the first ones, and so on.
    Returns this device's part of the array."""
    new = lax.all_gather(new, "devices", tiled=True)
    # unique_indices promises that no two are equal: the rows are distinct, and `local` keeps them
    # so. Those past the end are other devices' rows, and are dropped.
    return array.at[local(rows, len(array))].set(new, mode="drop", unique_indices=True)


# ---- 1. Drawing the batch -----------------------------------------------------------------------


def damage_mask(key, size):
    """A mask, bool [32, 32, 1], True in a square of size×size cells. As in the reproduction, its
    first row and its first column are uniform in 0…(31 − size), or 0 if size is 32."""
    corner = jax.random.randint(key, (2, 1), 0, max(IMAGE_SIZE - size, 1))
    line = jnp.arange(IMAGE_SIZE)
    rows, columns = (line >= corner) & (line < corner + size)
    return (rows[:, None] & columns)[..., None]


class Batch(NamedTuple):
    """The images of an update. This device has n = B/D of them: first its fresh images, then its
    share of the rows drawn from the pool."""

    indices: jax.Array  # int32 [n], of training images
    places: jax.Array  # int32 [n], in the global batch: 0…F − 1 if fresh, F…B − 1 if from the pool
    cells: jax.Array  # float32 [n, 32, 32, C], to grow from; zeros for fresh images
    from_pool: jax.Array  # bool [n]: whether to grow from these cells, rather than from z
    # The row of the pool that each image of the global batch is put into: first device 0's images,
    # in the order of its arrays above, then device 1's, …
    rows: jax.Array  # int32 [B]


def draw_batch(pool, indices, seed, t, pool_size, batch_size, fresh, damage_size):
    """The Batch of update t. The first B·DAMAGED of the rows drawn from the pool are damaged.

    pool: this device's part; indices: its fresh images, int32 [F/D]; pool_size: P; batch_size: B;
    fresh: F; damage_size: the side of the square of cells that damage sets to zero.
    """
    chex.assert_shape(indices, (fresh // lax.axis_size("devices"),))
    drawn = jax.random.permutation(stream(seed, "pool", t), pool_size)[:batch_size]
    # B different rows: B − F to grow from and to go back into, and F for the fresh images.
    taken, overwritten = jnp.split(drawn, [batch_size - fresh])
    cells = take(pool.cells, taken)

    pool_places = places(len(cells))  # this device's part of 0…B − F − 1, the places in `taken`
    damaged = (pool_places < int(batch_size * DAMAGED))[:, None, None, None]
    key = stream(seed, "damage", t)
    square = draw_each(lambda key: damage_mask(key, damage_size), key, pool_places)
    cells = jnp.where(damaged & square, 0, cells)

    no_cells = jnp.zeros((len(indices), *cells.shape[1:]))  # so that all images are in one array
    # The rows to put the images into, for each device: those for its F/D fresh images, then those
    # for its (B − F)/D others, in the order of the arrays below.
    by_device = [rows.reshape(lax.axis_size("devices"), -1) for rows in (overwritten, taken)]
    return Batch(
        indices=jnp.concatenate([indices, take(pool.indices, taken)]),
        places=jnp.concatenate([places(len(indices)), fresh + pool_places]),
        cells=jnp.concatenate([no_cells, cells]),
        from_pool=jnp.arange(len(indices) + len(cells)) >= len(indices),
        rows=jnp.concatenate(by_device, axis=1).reshape(-1),
    )


# ---- 2. Growing the batch, and the gradient -----------------------------------------------------


def growth_gradient(model, params, images, batch, seed, t, train_steps, micro_batch):
    """Grows the grids of a Batch, all by the same random number of steps. Returns the gradient of
    the loss (shaped like params), its terms [3], and the grown cells [n, 32, 32, C].

    images: packed bits of the training set, uint8 [N, 98]; train_steps: the least and the largest
    number of steps; micro_batch: the largest number of images to grow at a time (None: all).
    """
    least, largest = train_steps
    steps = jax.random.randint(stream(seed, "steps", t), (), least, largest + 1)
    noise = normal(stream(seed, "posterior", t), batch.places, model.latent_size)

    def loss_of(params, bits, noise, cells, from_pool):
        x = unpack(bits)
        mean, logvar = model.encode(params, x)
        from_z = model.initial_cells(reparametrize(mean, logvar, noise))
        # The pool's cells are constants here: no gradient reaches earlier updates.
        cells = jnp.where(from_pool[:, None, None, None], cells, from_z)
        cells = model.develop(params, cells, steps)
        # As in both sources, the KL of the pool's images counts, although their z is not used.
        value, terms = objective(mean, logvar, cells[..., :1], x)
        return value, (terms, cells)

    return accumulate(
        micro_batch, jax.grad(loss_of, has_aux=True),
        params, images[batch.indices], noise, batch.cells, batch.from_pool,
    )  # fmt: skip


# ---- 3. Putting it back -------------------------------------------------------------------------


def put_back(pool, batch, grown):
    """The Pool after an update: each image of the Batch is put, with its grown cells, into the row
    that batch.rows has for it. grown: this device's cells [n, 32, 32, C], in the Batch's order."""
    return Pool(put(pool.cells, batch.rows, grown), put(pool.indices, batch.rows, batch.indices))


# ---- The three together -------------------------------------------------------------------------


def pool_gradient(model, config, state, t, images, indices):
    """The gradient in update t = 1, 2, … of a model with a pool. It takes the place of
    `vnca.training.batch_gradient`.

    images: packed bits of the training set, uint8 [N, 98]; indices: this device's fresh images,
    int32 [F/D]. Returns the gradient (shaped like the parameters), the terms of the loss [3], and
    the Pool after the update.
    """
    settings = config.train
    batch = draw_batch(
        state.pool, indices, config.seed, t, pool_size=settings.pool_size,
        batch_size=settings.batch_size, fresh=fresh_images(config),
        damage_size=settings.damage_size,
    )  # fmt: skip
    grads, terms, grown = growth_gradient(
        model, state.params, images, batch, config.seed, t,
        train_steps=config.model.train_steps, micro_batch=settings.micro_batch,
    )  # fmt: skip
    return grads, terms, put_back(state.pool, batch, grown)
