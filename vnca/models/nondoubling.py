"""NonDoublingVNCA (the paper, figure 9)."""

from functools import lru_cache

import chex
import jax
import jax.numpy as jnp

from vnca import layers
from vnca.model import SettingError, encoder_init, fixed_grid_model


@lru_cache  # equal models are the same object, so that JAX compiles their programs once
def make(nn, likelihood, latent_size: int, encoder_width: int, steps: int, train_steps: tuple):
    """NonDoublingVNCA: z in every cell of the grid, then NCA steps.

    As in the reproduction, the last layer has a bias, and each step changes all cells. The
    paper's code has 28×28 cells and no such bias, and for figure 9 a cell changes with probability
    ½ in each step.
    """
    if latent_size < likelihood.outputs:
        least = likelihood.outputs
        raise SettingError(f"latent_size={latent_size}: it must be at least {least}, the logits")

    def init(key):
        encoder_key, perceive_key = jax.random.split(key)
        return {
            "encoder": encoder_init(encoder_key, likelihood, encoder_width, latent_size),
            "decoder": {
                "perceive": layers.conv_init(perceive_key, 3, latent_size, latent_size),
                "residual": layers.zeros_init(latent_size, latent_size),
            },
        }

    def initial_cells(z):
        chex.assert_shape(z, (None, latent_size))
        grid = len(z), likelihood.size, likelihood.size
        return jnp.broadcast_to(z[:, None, None], (*grid, latent_size))

    def step(params, s):
        params = params["decoder"]
        chex.assert_shape(s, (None, None, None, latent_size))
        return s + nn.linear(params["residual"], nn.elu(nn.conv(params["perceive"], s, padding=1)))

    return fixed_grid_model(
        nn, likelihood, latent_size, init, initial_cells, step, steps, train_steps
    )
