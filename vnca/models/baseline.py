"""BaselineVAE (the reproduction)."""

from functools import lru_cache, partial
from itertools import pairwise

import chex
import jax
import jax.numpy as jnp

from vnca import layers
from vnca.model import Model, SettingError, encode, encoder_init


@lru_cache  # equal models are the same object, so that JAX compiles their programs once
def make(nn, likelihood, latent_size: int, encoder_width: int, drawn_size: int):
    """BaselineVAE: a linear map and five 5×5 transposed convolutions as decoder.

    drawn_size: side of the central square that the decoder draws, 28 for digits in 32×32 pixels.
    Around it, all images must be 0.
    """
    widths = [encoder_width * 2**i for i in (4, 3, 2, 1, 0)]  # 512 … 32 as published
    size, outputs = likelihood.size, likelihood.outputs
    first = size // 16  # side of the first grid: 2 for 32×32 pixels
    border = (size - drawn_size) // 2
    if drawn_size not in (size, size - 2, size - 4):
        raise SettingError(f"drawn_size={drawn_size}: it must be {size - 4}, {size - 2} or {size}")

    def init(key):
        encoder_key, linear_key, *keys = jax.random.split(key, 7)
        decoder = {"linear": layers.linear_init(linear_key, latent_size, first**2 * widths[0])}
        for i, (inputs, outs) in enumerate(pairwise([*widths, outputs])):
            decoder[f"conv_transpose{i}"] = layers.conv_transpose_init(keys[i], 5, inputs, outs)
        encoder = encoder_init(encoder_key, likelihood, encoder_width, latent_size)
        return {"encoder": encoder, "decoder": decoder}

    def decode(params, z):
        params = params["decoder"]
        batch = len(z)
        chex.assert_shape(z, (batch, latent_size))
        x = nn.linear(params["linear"], z).reshape(batch, first, first, widths[0])
        for i in range(4):  # 2×2, 4×4, …, 32×32
            layer = params[f"conv_transpose{i}"]
            x = nn.elu(nn.conv_transpose(layer, x, stride=2, padding=2, output_padding=1))
        # Of 32×32 cells, a padding of 4 leaves 31 − 8 + 5 = 28.
        x = nn.conv_transpose(params["conv_transpose4"], x, stride=1, padding=2 + border)
        chex.assert_shape(x, (batch, drawn_size, drawn_size, outputs))
        # In the border, the logit −10⁴ costs exactly 0 nats in float32, and unlike the
        # reproduction's −∞ it cannot become NaN.
        sides = border, border
        return jnp.pad(x, ((0, 0), sides, sides, (0, 0)), constant_values=-1e4)

    return Model(
        latent_size=latent_size,
        likelihood=likelihood,
        init=init,
        encode=partial(encode, nn, likelihood),
        decode=decode,
    )
