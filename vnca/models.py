"""The encoder and the three published decoders, in the sizes of the reproduction.

Parameters are always made by `vnca.layers`. A model computes with `nn`, which is `vnca.layers` or a
module whose `conv`, `conv_transpose`, `linear` and `elu` give the same results up to rounding.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from vnca import layers

IMAGE_SIZE = 32  # 28×28 digits with 2 zeros on each side, since doubling gives powers of 2


def unpack(bits):
    """Packed bits as images: uint8 [..., 98] -> float32 [..., 32, 32, 1] of 0.0 and 1.0.

    The 98 bytes of an image are its 28×28 pixels, row by row, a byte's highest bit first.
    """
    pixels = jnp.unpackbits(bits, axis=-1).astype(jnp.float32).reshape(*bits.shape[:-1], 28, 28, 1)
    return jnp.pad(pixels, [(0, 0)] * (bits.ndim - 1) + [(2, 2), (2, 2), (0, 0)])


class Model(NamedTuple):
    """A VAE as pure functions. `params` is {"encoder": …, "decoder": …}, a pytree of float32.

    init:   key -> params
    encode: params, images [B, 32, 32, 1] -> mean, logvar of q(z|x), each [B, latent]
    decode: params, z [B, latent] -> logits [B, 32, 32, 1] of the Bernoulli pixels
    grow:   params, z, channels=1 -> a list with one array for each grid size n. With k steps at
            that size, it holds the first `channels` channels (None: all) of the cells before the
            first step and after every step: [1 + k, B, n, n, channels]. Channel 0 is the logit. The
            baseline has no `grow`.

    Only models on a grid of fixed size have the other fields:

    steps:         the number of steps that `decode` takes
    max_steps:     the largest number of steps that `develop` can take
    initial_cells: z -> cells [B, 32, 32, C] before the first step
    step:          params, cells -> cells after one step
    develop:       params, cells, T -> cells after T steps, differentiable. T must not exceed
                   max_steps. If T is known at trace time, a larger one raises ValueError.
    """

    latent_size: int
    init: Callable
    encode: Callable
    decode: Callable
    grow: Callable | None = None
    steps: int | None = None
    max_steps: int | None = None
    initial_cells: Callable | None = None
    step: Callable | None = None
    develop: Callable | None = None


# ---- Encoder ------------------------------------------------------------------------------------


def encoder_init(key, width, latent_size):
    """Five 5×5 convolutions with 1→width→…→16·width channels leave 2×2 cells. A linear map turns
    these into 2·latent numbers. As published, width is 32."""
    *conv_keys, linear_key = jax.random.split(key, 6)
    channels = [1, *(width * 2**i for i in range(5))]
    params = {"linear": layers.linear_init(linear_key, 2 * 2 * channels[-1], 2 * latent_size)}
    for i, (inputs, outputs) in enumerate(pairwise(channels)):
        params[f"conv{i}"] = layers.conv_init(conv_keys[i], 5, inputs, outputs)
    return params


def encode(nn, params, images):
    """q(z|x): images [B, 32, 32, 1] -> mean and logvar, each [B, latent]. As in the reproduction,
    logvar is log σ². (The paper's encoder gives log σ.) params: those of the whole model."""
    params = params["encoder"]
    batch = len(images)
    chex.assert_shape(images, (batch, IMAGE_SIZE, IMAGE_SIZE, 1))
    x = images
    for i in range(5):
        x = nn.elu(nn.conv(params[f"conv{i}"], x, stride=1 if i == 0 else 2, padding=2))
    chex.assert_shape(x, (batch, 2, 2, None))
    mean, logvar = jnp.split(nn.linear(params["linear"], x.reshape(batch, -1)), 2, axis=-1)
    return mean, logvar


# ---- DoublingVNCA (the paper, figures 2 to 4) ---------------------------------------------------


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


def take_steps(step, s, count, channels):
    """Takes `count` steps from cells s [B, n, n, C]. Returns the last cells, and the first
    `channels` channels (None: all) of the cells before the first step and after every step,
    [1 + count, B, n, n, channels]."""

    def body(s, _):
        s = step(s)
        return s, s[..., :channels]

    last, stepped = lax.scan(body, s, length=count)
    return last, jnp.concatenate([s[None, ..., :channels], stepped])


def crop(x, size):
    """The central size×size of x [B, H, W, C]. Raises ValueError unless x is that large, or larger
    by an even number."""
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
def doubling_vnca(latent_size, encoder_width, doublings, steps_per_doubling, nn=layers):
    """DoublingVNCA. It starts from one cell, z. Then it doubles the grid and takes NCA steps,
    `doublings` times.

    It starts from 1×1 as in the reproduction. The paper starts from 2×2 copies of z and doubles one
    time fewer, which comes to the same. Five doublings give the size of the image. A larger grid is
    cropped to its centre.
    """

    def init(key):
        encoder_key, decoder_key = jax.random.split(key)
        encoder = encoder_init(encoder_key, encoder_width, latent_size)
        return {"encoder": encoder, "decoder": nca_init(decoder_key, latent_size)}

    def grow(params, z, channels=1):
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
        return crop(last_stage[-1], IMAGE_SIZE)

    return Model(
        latent_size=latent_size, init=init, encode=partial(encode, nn), decode=decode, grow=grow
    )


# ---- NonDoublingVNCA (the paper, figure 9) ------------------------------------------------------


def take_at_most(max_steps, step, s, count):
    """Takes `count` ≤ `max_steps` steps from cells s. Differentiable even if `count` is traced.

    A loop of unknown length has no reverse-mode gradient. This loop has a known length, max_steps,
    and does nothing after `count` steps. Raises ValueError if `count` is known and larger.
    """
    if not isinstance(count, jax.core.Tracer) and count > max_steps:
        raise ValueError(f"{count} steps: this model develops for {max_steps} at most")

    def body(s, t):
        return lax.cond(t < count, step, lambda s: s, s), None

    last, _ = lax.scan(body, s, jnp.arange(max_steps))
    return last


def fixed_grid_model(latent_size, init, encode, initial_cells, step, steps, train_steps):
    """The Model on a grid of fixed size, with these init, encode, initial_cells and step. `decode`
    takes `steps` steps. `develop` takes as many steps as it is told: in training, from the first to
    the second number in `train_steps`. It can take as many as the largest of these three."""
    max_steps = max(steps, *train_steps)

    def grow(params, z, channels=1):
        _, stage = take_steps(partial(step, params), initial_cells(z), steps, channels)
        return [stage]

    def decode(params, z):
        return grow(params, z)[0][-1]

    def develop(params, s, count):
        return take_at_most(max_steps, partial(step, params), s, count)

    return Model(
        latent_size=latent_size, init=init, encode=encode, decode=decode, grow=grow, steps=steps,
        max_steps=max_steps, initial_cells=initial_cells, step=step, develop=develop,
    )  # fmt: skip


@lru_cache
def nondoubling_vnca(latent_size, encoder_width, steps, train_steps, nn=layers):
    """NonDoublingVNCA: z in every cell of a 32×32 grid, then NCA steps.

    As in the reproduction, the last layer has a bias, and each step changes all cells. The
    paper's code has 28×28 cells and no such bias, and for figure 9 a cell changes with probability
    ½ in each step.
    """

    def init(key):
        encoder_key, perceive_key = jax.random.split(key)
        return {
            "encoder": encoder_init(encoder_key, encoder_width, latent_size),
            "decoder": {
                "perceive": layers.conv_init(perceive_key, 3, latent_size, latent_size),
                "residual": layers.zeros_init(latent_size, latent_size),
            },
        }

    def initial_cells(z):
        chex.assert_shape(z, (None, latent_size))
        return jnp.broadcast_to(z[:, None, None], (len(z), IMAGE_SIZE, IMAGE_SIZE, latent_size))

    def step(params, s):
        params = params["decoder"]
        chex.assert_shape(s, (None, None, None, latent_size))
        return s + nn.linear(params["residual"], nn.elu(nn.conv(params["perceive"], s, padding=1)))

    return fixed_grid_model(
        latent_size=latent_size, init=init, encode=partial(encode, nn),
        initial_cells=initial_cells, step=step, steps=steps, train_steps=train_steps,
    )  # fmt: skip


# ---- BaselineVAE (the reproduction) -------------------------------------------------------------


@lru_cache
def baseline_vae(latent_size, encoder_width, nn=layers):
    """BaselineVAE: a linear map and five 5×5 transposed convolutions as decoder."""
    widths = [encoder_width * 2**i for i in (4, 3, 2, 1, 0)]  # 512 … 32 as published

    def init(key):
        encoder_key, linear_key, *keys = jax.random.split(key, 7)
        decoder = {"linear": layers.linear_init(linear_key, latent_size, 2 * 2 * widths[0])}
        for i, (inputs, outputs) in enumerate(pairwise([*widths, 1])):
            decoder[f"conv_transpose{i}"] = layers.conv_transpose_init(keys[i], 5, inputs, outputs)
        encoder = encoder_init(encoder_key, encoder_width, latent_size)
        return {"encoder": encoder, "decoder": decoder}

    def decode(params, z):
        params = params["decoder"]
        batch = len(z)
        chex.assert_shape(z, (batch, latent_size))
        x = nn.linear(params["linear"], z).reshape(batch, 2, 2, widths[0])
        for i in range(4):  # 2×2, 4×4, …, 32×32
            layer = params[f"conv_transpose{i}"]
            x = nn.elu(nn.conv_transpose(layer, x, stride=2, padding=2, output_padding=1))
        x = nn.conv_transpose(params["conv_transpose4"], x, stride=1, padding=4)  # 31 − 8 + 5 = 28
        chex.assert_shape(x, (batch, 28, 28, 1))
        # The image's border is all 0. There, the logit −10⁴ costs exactly 0 nats in float32, and
        # unlike the reproduction's −∞ it cannot become NaN.
        return jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1e4)

    return Model(latent_size=latent_size, init=init, encode=partial(encode, nn), decode=decode)


def make_model(model_config, nn=layers):
    """The published model that a config's `model` section names. Raises ValueError if there is none
    of that name."""
    c = model_config
    if c.name == "doubling":
        sizes = c.latent_size, c.encoder_width, c.doublings, c.steps_per_doubling
        return doubling_vnca(*sizes, nn)
    if c.name == "nondoubling":
        sizes = c.latent_size, c.encoder_width, c.steps, tuple(c.train_steps)
        return nondoubling_vnca(*sizes, nn)
    if c.name == "baseline":
        return baseline_vae(c.latent_size, c.encoder_width, nn)
    raise ValueError(f"{c.name!r} is not a published model")
