"""HealingVNCA: a small non-doubling model whose lost cells inherit from their neighbours.

It deviates from the published model. There, a damaged cell recovers z, and a sense of where it is,
only through what the steps have learned, and a small model hardly learns that. Here, every cell
keeps its position and z in channels that no step changes. Damage sets all channels of a cell to
zero. Such a cell is lost. It inherits position and z as soon as one of its neighbours is alive.

**Example.** The cell in row 16, column 9 is lost, and the one to its right, in column 10, is alive.
A cell keeps its column j as the sine and cosine of the angle a = π·(j + ½)/32. So the right
neighbour has a = 1.031, sin a = 0.858 and cos a = 0.514. The lost cell's angle is smaller by
δ = π/32 = 0.098, and a rotation by −δ turns the neighbour's numbers into those of the lost cell:

    sin(a − δ) = cos δ·sin a − sin δ·cos a = 0.803,
    cos(a − δ) = cos δ·cos a + sin δ·sin a = 0.596.

Both cells are in the same row, so the row's sine and cosine are copied, and so is z, which is the
same in all cells. A left neighbour is rotated by +δ instead. For a neighbour above or below, the
sine and cosine of the row are rotated. For a diagonal neighbour, row and column both are. All
neighbours give the same numbers up to rounding, and the lost cell takes the mean over those that
are alive. Cells also keep the sines and cosines of 2a, 4a, …, and these are rotated by 2δ, 4δ, …

**As a convolution.** Each neighbour is one tap of a 3×3 kernel: a matrix that rotates and copies.
Lost cells, the middle one too, add nothing to the sum, because they are zeros. One more channel,
which is 1 in living cells, counts the living, and the mean is the sum divided by this count.
"""

from functools import lru_cache

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import block_diag

from vnca import layers
from vnca.model import SettingError, encoder_init, fixed_grid_model


def positional_encoding(size, waves):
    """The position of each cell, [size, size, 4·waves]. With a = π·(row + ½)/size: the sines of
    2ʷ·a for w = 0, …, waves − 1, then their cosines, then the same for the column."""
    angle = jnp.pi * (jnp.indices((size, size)) + 0.5) / size
    row, column = angle[..., None] * 2.0 ** jnp.arange(waves)
    return jnp.concatenate([jnp.sin(row), jnp.cos(row), jnp.sin(column), jnp.cos(column)], axis=-1)


def inheritance_kernel(size, waves, latent_size):
    """The kernel [3, 3, m, m] that sums rotated positions and z, and counts living cells. Its
    m = 4·waves + latent + 1 channels are those of the position and of z, and a last channel that is
    1 in living cells. size: the grid's."""
    delta = jnp.pi / size * 2.0 ** jnp.arange(waves)
    sine, cosine = jnp.diag(jnp.sin(delta)), jnp.diag(jnp.cos(delta))
    # (sin a, cos a) @ forward = (sin(a + δ), cos(a + δ)), for all waves: first come all sines, then
    # all cosines. The transpose subtracts δ.
    forward = jnp.block([[cosine, -sine], [sine, cosine]])
    # If a neighbour's row (or column) is one less than the lost cell's, it is rotated by +δ; if it
    # is the same, not at all; if it is one more, by −δ.
    rotations = (forward, jnp.eye(2 * waves), forward.T)
    same = jnp.eye(latent_size + 1)
    # The kernel's first axis, the outer loop, is the neighbour's row. Its second is the column.
    return jnp.array([[block_diag(row, column, same) for column in rotations] for row in rotations])


def living(kept, waves):
    """The mask of living cells, [B, H, W, 1] of 0.0 and 1.0. kept: what cells keep, position and z,
    [B, H, W, 4·waves + latent]. The position is all zeros in lost cells, and in no living one."""
    return jnp.any(kept[..., : 4 * waves] != 0, axis=-1, keepdims=True).astype(kept.dtype)


def inherit(nn, kept, waves):
    """The position and z that each cell would inherit if it were lost, and the mask of living
    cells, [B, H, W, 1] of 0.0 and 1.0.

    kept: position and z of each cell, [B, H, W, 4·waves + latent]; the first result is shaped like
    it. No gradient passes through the first result, and it needs none: only lost cells use this
    result, only grids from the pool have lost cells, and the position and z of these grids are
    constants.
    """
    kept = lax.stop_gradient(kept)
    alive = living(kept, waves)
    kernel = inheritance_kernel(kept.shape[1], waves, kept.shape[-1] - 4 * waves)
    neighbours = {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])}
    with jax.default_matmul_precision("highest"):  # a TPU would round what cells hand on
        sums = nn.conv(neighbours, jnp.concatenate([kept, alive], axis=-1), padding=1)
    return sums[..., :-1] / jnp.maximum(sums[..., -1:], 1), alive


@lru_cache  # equal models are the same object, so that JAX compiles their programs once
def make(
    nn,
    likelihood,
    latent_size: int,
    encoder_width: int,
    steps: int,
    train_steps: tuple,
    channels: int,
    hidden: int,
    position_waves: int,
):
    """HealingVNCA. A cell has three groups of channels, in this order: those that steps change, of
    which the logits are the first ones; the position, 4·position_waves channels; and z. The first
    group starts as zeros.

    steps: how many `decode` takes; train_steps: the least and the largest number of them in
    training; channels: how many a cell has, in all three groups together; hidden: channels of a
    step's hidden layer; position_waves: frequencies of the position.
    """
    size, waves = likelihood.size, position_waves
    changing = channels - 4 * waves - latent_size
    if 2**waves > size:  # of a faster wave, all cosines would be 0
        most = size.bit_length() - 1
        raise SettingError(f"position_waves={waves}: it must be at most {most} for {size} rows")
    if changing < likelihood.outputs:
        least = channels - changing + likelihood.outputs
        raise SettingError(
            f"channels={channels}: it must be at least {least}: the logits, the position and z"
        )

    def init(key):
        encoder_key, perceive_key = jax.random.split(key)
        return {
            "encoder": encoder_init(encoder_key, likelihood, encoder_width, latent_size),
            "decoder": {
                "perceive": layers.conv_init(perceive_key, 3, channels, hidden),
                "residual": layers.zeros_init(hidden, changing),
            },
        }

    def initial_cells(z):
        chex.assert_shape(z, (None, latent_size))
        grid = len(z), size, size
        zeros = jnp.zeros((*grid, changing), z.dtype)
        position = positional_encoding(size, waves).astype(z.dtype)
        position = jnp.broadcast_to(position, (*grid, 4 * waves))
        codes = jnp.broadcast_to(z[:, None, None], (*grid, latent_size))
        return jnp.concatenate([zeros, position, codes], axis=-1)

    def step(params, s):
        params = params["decoder"]
        chex.assert_shape(s, (None, None, None, channels))
        change = nn.linear(params["residual"], nn.elu(nn.conv(params["perceive"], s, padding=1)))
        inherited, alive = inherit(nn, s[..., changing:], waves)
        # A lost cell is zero in all channels, so the sum is what it inherits.
        return s + jnp.concatenate([alive * change, (1 - alive) * inherited], axis=-1)

    return fixed_grid_model(
        nn, likelihood, latent_size, init, initial_cells, step, steps, train_steps
    )
