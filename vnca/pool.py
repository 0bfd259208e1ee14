"""Pool training of the non-doubling model. The model continues from grids that it grew in earlier
updates, some of them damaged. So it learns to keep an image as it is, and to repair a damaged one
(the paper, figure 9, after Mordvintsev et al. 2020, "Growing Neural Cellular Automata").

The pool has P slots. Each holds a grid of cells, and the index of the training image that this grid
was grown to show. An update of B images has three parts. It

1. takes F fresh images, draws B − F slots of the pool, and damages the grids of some of these
   slots;
2. grows all B grids by the same number of steps, the fresh ones from z, the others from their
   cells;
3. puts all B grids into the pool: a regrown grid into the slot that it came from, and the fresh
   ones into F other slots.

In the paper and the reproduction half of the batch is fresh, and a quarter is damaged. Their pools
differ from each other and from this one. Here, each update draws its slots uniformly from all P,
and a grid may be regrown any number of times. (BUILD_NOTES.md describes all three pools.)

Read this file for one device first. There, `take(array, slots)` is array[slots], and
`put(array, slots, new)` is array.at[slots].set(new). On D devices, each keeps P/D slots, and
vnca/devices.py says how `take` and `put` move grids between them. D divides P, F and B − F.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vnca.devices import places, put, take
from vnca.likelihoods import as_floats
from vnca.losses import objective, reparametrize
from vnca.training import accumulate, draw_each, normal, stream

DAMAGED = 1 / 4  # the share of a batch that is damaged, in the paper and in the reproduction


class Pool(NamedTuple):
    """P slots, or on each device its share of them."""

    cells: jax.Array  # float32 [P, H, W, C]
    indices: jax.Array  # int32 [P], of training images


def init_pool(model, config, params, images):
    """The Pool before the first update, as in the reproduction: the first P training images, each
    with the initial cells of one sample of q(z|x). images: the stored training set."""
    size = config.train.pool_size

    @jax.jit
    def init(params, stored, key):
        indices = jnp.arange(size)
        mean, logvar = model.encode(params, as_floats(model.likelihood, stored))
        noise = normal(key, indices, model.latent_size)
        return Pool(model.initial_cells(reparametrize(mean, logvar, noise)), indices)

    key = stream(config.seed, "posterior", 0)  # 0 is free, since updates count from 1
    return init(params, images[:size], key)


def fresh_images(config):
    """F, the number of fresh images in a batch of B: `train.pool_fresh`, or B/2 if that is unset.
    Without a pool, B."""
    settings = config.train
    half = settings.batch_size // 2
    return (settings.pool_fresh or half) if settings.pool_size else settings.batch_size


# ---- 1. Drawing the batch -----------------------------------------------------------------------


def damage_mask(key, grid, size):
    """A mask, bool [grid, grid, 1], True in a square of size×size cells. As in the reproduction,
    its first row and first column are uniform in 0…(grid − 1 − size), or 0 if the square is as
    large as the grid."""
    corner = jax.random.randint(key, (2, 1), 0, max(grid - size, 1))
    line = jnp.arange(grid)
    rows, columns = (line >= corner) & (line < corner + size)
    return (rows[:, None] & columns)[..., None]


class Batch(NamedTuple):
    """The images of an update. A device has n = B/D of them: first F/D fresh ones, and then its
    share of those from the pool."""

    indices: jax.Array  # int32 [n], of training images
    places: jax.Array  # int32 [n], in the global batch: 0…F − 1 if fresh, F…B − 1 if from the pool
    cells: jax.Array  # float32 [n, H, W, C], to grow from; zeros for fresh images
    from_pool: jax.Array  # bool [n]: whether to grow from these cells, rather than from z
    overwritten: jax.Array  # int32 [F], the slots of the pool that fresh grids are put into
    taken: jax.Array  # int32 [B − F], the slots that the others come from and are put back into


def draw_batch(state, config, t, indices):
    """The Batch of update t. indices: of this device's fresh images, int32 [F/D]. Of the grids from
    the pool, the first B·DAMAGED are damaged. Before update `train.pool_from`, all images grow from
    z, those from the pool as well."""
    settings, fresh, pool = config.train, fresh_images(config), state.pool
    slots = jax.random.permutation(stream(state.seed, "pool", t), settings.pool_size)
    taken, overwritten, _ = jnp.split(slots, [settings.batch_size - fresh, settings.batch_size])
    cells = take(pool.cells, taken)

    pool_places = places(len(cells))  # 0…B − F − 1: places in `taken`
    damaged = (pool_places < int(settings.batch_size * DAMAGED))[:, None, None, None]
    key = stream(state.seed, "damage", t)
    square = draw_each(
        lambda key: damage_mask(key, cells.shape[1], settings.damage_size), key, pool_places
    )
    cells = jnp.where(damaged & square, 0, cells)

    no_cells = jnp.zeros((len(indices), *cells.shape[1:]))  # so that all images are in one array
    from_pool = jnp.arange(len(indices) + len(cells)) >= len(indices)
    return Batch(
        indices=jnp.concatenate([indices, take(pool.indices, taken)]),
        places=jnp.concatenate([places(len(indices)), fresh + pool_places]),
        cells=jnp.concatenate([no_cells, cells]),
        from_pool=from_pool & (t >= settings.pool_from),
        overwritten=overwritten,
        taken=taken,
    )


# ---- 2. Growing the batch, and the gradient -----------------------------------------------------


def growth_gradient(model, config, state, t, images, batch):
    """Grows the grids of a Batch, all by the same random number of steps. images: the stored
    training set. Returns the gradient of the loss (shaped like params), the loss and its two terms
    [3], and the grown cells [n, H, W, C]."""
    least, largest = model.train_steps
    steps = jax.random.randint(stream(state.seed, "steps", t), (), least, largest + 1)
    key = stream(state.seed, "posterior", t)
    noise = normal(key, batch.places, model.latent_size)

    def loss_of(params, stored, noise, cells, from_pool):
        x = as_floats(model.likelihood, stored)
        mean, logvar = model.encode(params, x)
        from_z = model.initial_cells(reparametrize(mean, logvar, noise))
        # The pool's cells are constants here: no gradient reaches earlier updates.
        cells = jnp.where(from_pool[:, None, None, None], cells, from_z)
        cells = model.develop(params, cells, steps)
        logits = cells[..., : model.likelihood.outputs]
        # As in both sources, the KL of the pool's images counts, although their z is not used.
        weight = config.train.kl_weight
        value, terms = objective(model.likelihood, mean, logvar, logits, x, weight)
        return value, (terms, cells)

    return accumulate(
        config.train.micro_batch,
        jax.grad(loss_of, has_aux=True),
        state.params,
        images[batch.indices],
        noise,
        batch.cells,
        batch.from_pool,
    )


# ---- 3. Putting it back -------------------------------------------------------------------------


def put_back(pool, batch, grown, fresh):
    """The Pool after an update: it has each image of the Batch with its grown cells, [n, H, W, C].
    The first `fresh` of the n are fresh."""

    def replaced(array, new):
        array = put(array, batch.overwritten, new[:fresh])
        return put(array, batch.taken, new[fresh:])

    return Pool(replaced(pool.cells, grown), replaced(pool.indices, batch.indices))


# ---- The three together -------------------------------------------------------------------------


def pool_gradient(model, config, state, t, images, indices):
    """The gradient in update t = 1, 2, … with a pool. It takes the place of
    `vnca.training.batch_gradient`.

    images: the stored training set; indices: of this device's fresh images, int32 [F/D]. Returns
    the gradient (shaped like the parameters), the loss and its two terms [3], and the Pool after
    the update.
    """
    batch = draw_batch(state, config, t, indices)
    grads, terms, grown = growth_gradient(model, config, state, t, images, batch)
    return grads, terms, put_back(state.pool, batch, grown, len(indices))
