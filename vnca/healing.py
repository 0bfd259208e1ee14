"""HealingVNCA: a small non-doubling model that heals, a deviation from the published one.

As published, z and the position of a damaged cell can only be restored by learned steps, which a
small model hardly learns. Here every cell keeps both in channels that no step changes, and a lost
cell inherits them from its neighbours.

**Inheritance.** A cell at row i keeps sin a and cos a of the angles a = π·2ʷ·(i + ½)/32 for the
waves w = 0, 1, …, and the same for its column. The neighbour in the row before has an angle that is
smaller by δ = π·2ʷ/32, so a rotation turns its position into the lost cell's own:

    sin(a + δ) = cos δ·sin a + sin δ·cos a,    cos(a + δ) = cos δ·cos a − sin δ·sin a.

For the neighbour on the other side, δ is negative. A diagonal neighbour needs both rotations, one
for its row and one for its column. z is the same in every cell. So all living neighbours give the
same values, up to rounding. Each neighbour is one tap of a 3×3 kernel, so their sum is one
convolution. A channel that is 1 in living cells counts them, and the lost cell takes the mean: the
sum divided by the count.
"""

from functools import lru_cache, partial

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import block_diag

from vnca import layers, models
from vnca.images import IMAGE_SIZE
from vnca.pool import pool_gradient


def positional_encoding(waves):
    """The position of each cell, [32, 32, 4·waves]: sines and cosines of its row, then of its
    column, at `waves` frequencies."""
    angle = jnp.pi * (jnp.indices((IMAGE_SIZE, IMAGE_SIZE)) + 0.5) / IMAGE_SIZE
    row, column = angle[..., None] * 2.0 ** jnp.arange(waves)
    return jnp.concatenate([jnp.sin(row), jnp.cos(row), jnp.sin(column), jnp.cos(column)], axis=-1)


def inheritance_kernel(waves, latent_size):
    """The kernel [3, 3, m, m], m = 4·waves + latent + 1. It sums the neighbours' rotated positions
    and their z, and counts the living."""
    delta = jnp.pi / IMAGE_SIZE * 2.0 ** jnp.arange(waves)
    sine, cosine = jnp.diag(jnp.sin(delta)), jnp.diag(jnp.cos(delta))
    forward = jnp.block([[cosine, -sine], [sine, cosine]])  # (sin a, cos a) @ forward turns a by δ
    rotations = (forward, jnp.eye(2 * waves), forward.T)  # from the neighbour before, here, after
    same = jnp.eye(latent_size + 1)
    return jnp.array([[block_diag(row, column, same) for column in rotations] for row in rotations])


def living(kept, waves):
    """The mask of living cells, float [B, H, W, 1]. kept: as for `inherit`."""
    return jnp.any(kept[..., : 4 * waves] != 0, axis=-1, keepdims=True).astype(kept.dtype)


def inherit(nn, kept, waves):
    """What cells would inherit, and which cells are alive.

    kept: [B, H, W, 4·waves + latent], the position and z of each cell; a cell with a position of
    zeros is lost, since no cell has such a position. Returns the mean over living neighbours,
    shaped like kept, without a gradient, and the mask of living cells, float [B, H, W, 1].
    """
    alive = living(kept, waves)
    kernel = inheritance_kernel(waves, kept.shape[-1] - 4 * waves)
    neighbours = {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])}
    with jax.default_matmul_precision("highest"):  # a TPU would round what cells hand on
        sums = nn.conv(neighbours, jnp.concatenate([kept, alive], axis=-1), padding=1)
    return lax.stop_gradient(sums[..., :-1] / jnp.maximum(sums[..., -1:], 1)), alive


@lru_cache
def healing_vnca(
    latent_size, encoder_width, steps, train_steps, channels, hidden, waves, nn=layers
):
    """HealingVNCA. A cell has `channels` numbers: those that steps change (zeros at first; number 0
    is the logit), then its position (4·waves), then z. hidden: channels of a step's hidden layer;
    the other arguments are those of `vnca.models.nondoubling_vnca`."""
    changing = channels - 4 * waves - latent_size

    def init(key):
        encoder_key, perceive_key = jax.random.split(key)
        return {
            "encoder": models.encoder_init(encoder_key, encoder_width, latent_size),
            "decoder": {
                "perceive": layers.conv_init(perceive_key, 3, channels, hidden),
                "residual": layers.zeros_init(hidden, changing),
            },
        }

    def initial_cells(z):
        chex.assert_shape(z, (None, latent_size))
        grid = (len(z), IMAGE_SIZE, IMAGE_SIZE)
        zeros = jnp.zeros((*grid, changing), z.dtype)
        position = positional_encoding(waves).astype(z.dtype)
        position = jnp.broadcast_to(position, (*grid, 4 * waves))
        codes = jnp.broadcast_to(z[:, None, None], (*grid, latent_size))
        return jnp.concatenate([zeros, position, codes], axis=-1)

    def step(params, s):
        params = params["decoder"]
        chex.assert_shape(s, (None, None, None, channels))
        change = nn.linear(params["residual"], nn.elu(nn.conv(params["perceive"], s, padding=1)))
        inherited, alive = inherit(nn, s[..., changing:], waves)
        return s + jnp.concatenate([alive * change, (1 - alive) * inherited], axis=-1)

    encode = partial(models.encode, nn)
    return models.fixed_grid_model(
        latent_size, init, encode, initial_cells, step, steps, train_steps
    )


def make_model(model_config, nn=layers):
    """The HealingVNCA for a config's `model` section."""
    c = model_config
    sizes = c.latent_size, c.encoder_width, c.steps, tuple(c.train_steps)
    return healing_vnca(*sizes, c.channels, c.hidden, c.position_waves, nn)


def healing_gradient(model, config, state, t, images, indices, mean_gradient):
    """As `vnca.pool.pool_gradient`, with two differences. Before update `train.pool_from` all
    images grow from z. An encoder from another run, `train.encoder_from`, does not learn.
    """
    if config.train.encoder_from:
        encode = model.encode
        model = model._replace(encode=lambda params, x: lax.stop_gradient(encode(params, x)))
    from_pool = t >= config.train.pool_from
    return pool_gradient(model, config, state, t, images, indices, mean_gradient, from_pool)
