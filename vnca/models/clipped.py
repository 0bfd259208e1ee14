"""DoublingVNCA with clipped outputs of the encoder, as the paper's code has it at 8d1ee6e, the
revision of its figures 7 and 8."""

from functools import lru_cache

import jax.numpy as jnp

from vnca.models import doubling

MEAN_LIMIT = 100.0
LOGVAR_LIMIT = 14.0  # of log σ²; the paper's encoder gives log σ, which is clipped to ±7


@lru_cache  # equal models are the same object, so that JAX compiles their programs once
def make(
    nn,
    likelihood,
    latent_size: int,
    encoder_width: int,
    doublings: int,
    steps_per_doubling: int,
):
    """DoublingVNCA, but for `encode`: it clips the mean of q(z|x) to ±100, and log σ² to ±14."""
    model = doubling.make(nn, likelihood, latent_size, encoder_width, doublings, steps_per_doubling)

    def encode(params, x):
        mean, logvar = model.encode(params, x)
        mean = jnp.clip(mean, -MEAN_LIMIT, MEAN_LIMIT)
        return mean, jnp.clip(logvar, -LOGVAR_LIMIT, LOGVAR_LIMIT)

    return model._replace(encode=encode)
