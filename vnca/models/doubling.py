"""DoublingVNCA (the paper, figures 2 to 4)."""

from functools import lru_cache, partial

import chex
import jax

from vnca import layers
from vnca.model import Model, SettingError, encode, encoder_init, take_steps


def nca_init(key, channels, blocks=4):
    """Weights of one NCA step of the doubling model, the same for every cell and every step."""
    perceive_key, *keys = jax.random.split(key, 1 + 2 * blocks)
    maps = [layers.linear_init(key, channels, channels) for key in keys]
    return {
        "perceive": layers.conv_init(perceive_key, 3, channels, channels),
        "blocks": [{"linear0": maps[i], "linear1": maps[i + 1]} for i in range(0, 2 * blocks, 2)],
        "residual": layers.zeros_init(channels, channels),
    }


def nca_step(nn, params, s):
    """The doubling model's s ← s + U(s), s [B, H, W, C]: each cell sees its 3×3 neighbourhood."""
    h = nn.conv(params["perceive"], s, padding=1)
    for block in params["blocks"]:
        h = h + nn.linear(block["linear1"], nn.elu(nn.linear(block["linear0"], h)))
    return s + nn.linear(params["residual"], h)


def double(s):
    """Every cell becomes 2×2 copies of itself: s [B, H, W, C] -> [B, 2H, 2W, C]."""
    return s.repeat(2, axis=1).repeat(2, axis=2)


def crop(x, size):
    """The central size×size of x [B, H, W, C]. Raises ValueError unless H and W are `size`, or
    larger by an even number."""
    top, odd_rows = divmod(x.shape[1] - size, 2)
    left, odd_columns = divmod(x.shape[2] - size, 2)
    if min(top, left) < 0 or odd_rows or odd_columns:
        raise ValueError(
            f"a grid of {x.shape[1]}×{x.shape[2]} cells has no central {size}×{size}: "
            "both sides must be that size, or larger by an even number"
        )
    x = x[:, top : top + size, left : left + size]
    chex.assert_shape(x, (None, size, size, None))
    return x


@lru_cache  # equal models are the same object, so that JAX compiles their programs once
def make(
    nn,
    likelihood,
    latent_size: int,
    encoder_width: int,
    doublings: int,
    steps_per_doubling: int,
):
    """DoublingVNCA. It starts from one cell, z. Then it doubles the grid and takes NCA steps,
    `doublings` times.

    It starts from 1×1 as in the reproduction. The paper starts from 2×2 copies of z, on which it
    takes steps before the first of its doublings. The two are equivalent, since doubling 1×1 gives
    these copies. Five doublings give 32×32 cells. A grid that is larger than the image is cropped
    to its centre.
    """
    size, outputs = likelihood.size, likelihood.outputs
    least = (size - 1).bit_length()
    if not least <= doublings <= least + 3:
        raise SettingError(
            f"doublings={doublings}: it must be {least} to {least + 3} for images of {size}×{size}"
        )
    if latent_size < outputs:
        raise SettingError(f"latent_size={latent_size}: it must be at least {outputs}, the logits")

    def init(key):
        encoder_key, decoder_key = jax.random.split(key)
        return {
            "encoder": encoder_init(encoder_key, likelihood, encoder_width, latent_size),
            "decoder": nca_init(decoder_key, latent_size),
        }

    def grow(params, z, channels=outputs):
        chex.assert_shape(z, (None, latent_size))
        step = partial(nca_step, nn, params["decoder"])
        s = z[:, None, None, :]
        stages = []
        for k in range(1, doublings + 1):
            s = double(s)
            chex.assert_shape(s, (len(z), 2**k, 2**k, latent_size))
            s, stage = take_steps(step, s, steps_per_doubling, channels)
            stages.append(stage)
        return stages

    def decode(params, z):
        last_stage = grow(params, z)[-1]
        return crop(last_stage[-1], size)

    return Model(
        latent_size=latent_size,
        likelihood=likelihood,
        init=init,
        encode=partial(encode, nn, likelihood),
        decode=decode,
        grow=grow,
    )
