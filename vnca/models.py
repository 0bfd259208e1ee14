"""The encoder and the three decoders (Palm et al. 2022)."""

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import block_diag

from vnca import layers as nn
from vnca import tpu
from vnca.images import IMAGE_SIZE


class Model(NamedTuple):
    """A VAE as pure functions; `params` is {"encoder": …, "decoder": …}, nested dicts of float32.

    init:   key -> params
    encode: params, images [B, 32, 32, 1] -> mean, logvar of q(z|x), each [B, latent]
    decode: params, z [B, latent] -> logits [B, 32, 32, 1] of the Bernoulli pixels
    grow:   params, z, channels=1 -> for each size of the grid [1 + steps, B, n, n, channels], its
            cells' first channels (None: all) before and after each step; channel 0 is the logits
    steps, seed, step, develop: of the non-doubling model: steps of decode; z -> cells [B, 32, 32,
            C]; params, cells -> cells a step later; params, cells, T -> cells T steps later, with a
            gradient: at most steps or train_steps (more raise ValueError; traced, they stop there)
    """

    latent_size: int
    init: Callable
    encode: Callable
    decode: Callable
    grow: Callable | None = None
    steps: int | None = None
    seed: Callable | None = None
    step: Callable | None = None
    develop: Callable | None = None


def computed_in(model, dtype):
    """encode, decode and develop computed in dtype; what goes in and comes out stays float32."""

    def cast(function, params, x, *more):
        return jax.tree.map(lambda y: y.astype(x.dtype), function(params, x.astype(dtype), *more))

    parts = {name: getattr(model, name) for name in ("encode", "decode", "develop")}
    return model._replace(**{name: f and partial(cast, f) for name, f in parts.items()})


def encoder_init(key, width, latent_size):
    """Five 5×5 convolutions, 1→width→…→16·width channels, and a linear layer to 2·latent."""
    keys, channels = jax.random.split(key, 6), [1, *(width * 2**i for i in range(5))]
    layers = {f"conv{i}": nn.conv_init(keys[i], 5, *channels[i : i + 2]) for i in range(5)}
    return layers | {"linear": nn.linear_init(keys[5], 2 * 2 * channels[-1], 2 * latent_size)}


@tpu.door(tpu.encode)
def encode(params, images):
    """q(z|x): images [B, 32, 32, 1] -> mean, logvar, each [B, latent]; logvar = log σ²."""
    params, x, batch = params["encoder"], images, len(images)
    chex.assert_shape(images, (batch, IMAGE_SIZE, IMAGE_SIZE, 1))
    for i in range(5):
        x = nn.elu(nn.conv(params[f"conv{i}"], x, stride=2 if i else 1, padding=2))
    chex.assert_shape(x, (batch, 2, 2, None))
    return tuple(jnp.split(nn.linear(params["linear"], x.reshape(batch, -1)), 2, axis=-1))


def step_on(step, s, count, channels):
    """Cells s [B, n, n, C] after `count` steps; and first channels of s and after each, stacked."""

    def one(s, _):
        s = step(s)
        return s, s[..., :channels]

    last, rest = lax.scan(one, s, length=count)
    return last, jnp.concatenate([s[None, ..., :channels], rest])


def nca_init(key, channels, blocks=4):
    """Weights of one NCA step of the doubling model, the same at every cell and every step."""
    perceive_key, *keys = jax.random.split(key, 1 + 2 * blocks)
    maps = [nn.linear_init(key, channels, channels) for key in keys]
    return {
        "perceive": nn.conv_init(perceive_key, 3, channels, channels),
        "blocks": [{"linear0": maps[i], "linear1": maps[i + 1]} for i in range(0, 2 * blocks, 2)],
        "update": nn.zeros_init(channels, channels),
    }


def nca_step(params, s):
    """The doubling model's s ← s + U(s), s [B, H, W, C]: each cell sees its 3×3 neighbourhood."""
    h = nn.conv(params["perceive"], s, padding=1)
    for block in params["blocks"]:
        h = h + nn.linear(block["linear1"], nn.elu(nn.linear(block["linear0"], h)))
    return s + nn.linear(params["update"], h)


def double(s):
    """Every cell becomes 2×2 copies: s [B, H, W, C] -> [B, 2H, 2W, C]."""
    return s.repeat(2, axis=1).repeat(2, axis=2)


def crop(x, size):
    """The central size×size of x [B, H, W, C]. Raises ValueError where it does not fit."""
    (top, odd), (left, odd_too) = (divmod(n - size, 2) for n in x.shape[1:3])
    if min(top, left) < 0 or odd or odd_too:
        grid = f"a grid of {x.shape[1]}×{x.shape[2]} cells has no central {size}×{size}"
        raise ValueError(f"{grid}: both sides must be that size, or larger by an even number")
    x = x[:, top : top + size, left : left + size]
    chex.assert_shape(x, (None, size, size, None))
    return x


@lru_cache
def doubling_vnca(latent_size, encoder_width, doublings, steps_per_doubling):
    """DoublingVNCA: from one cell, `doublings` times: double the grid, then take NCA steps."""

    def init(key):
        encoder_key, decoder_key = jax.random.split(key)
        encoder = encoder_init(encoder_key, encoder_width, latent_size)
        return {"encoder": encoder, "decoder": nca_init(decoder_key, latent_size)}

    def grow(params, z, channels=1):
        chex.assert_shape(z, (None, latent_size))
        s, stages = z[:, None, None, :], []
        for size in (2**k for k in range(1, doublings + 1)):
            s = double(s)
            chex.assert_shape(s, (len(z), size, size, latent_size))
            step = partial(nca_step, params["decoder"])
            s, stage = step_on(step, s, steps_per_doubling, channels)
            stages.append(stage)
        return stages

    def decode(params, z):
        fast = partial(tpu.grown, doublings, steps_per_doubling, nca_step)
        grown = tpu.door(fast)(lambda *given: grow(*given)[-1][-1])  # XLA drops unused stages
        return crop(grown(params, z), IMAGE_SIZE)

    return Model(latent_size, init, encode, decode, grow)


def positions(waves):
    """Where each cell of the grid lies: the sines and cosines of its row and of its column at 1, 2,
    4, … half turns over the grid, [32, 32, 4·waves]."""
    line = jnp.pi * (jnp.indices((IMAGE_SIZE, IMAGE_SIZE)) + 0.5) / IMAGE_SIZE
    row, column = line[..., None] * 2.0 ** jnp.arange(waves)
    return jnp.concatenate([f(a) for a in (row, column) for f in (jnp.sin, jnp.cos)], axis=-1)


def inherited(s, change, waves):
    """What a step adds to cells s [B, H, W, C]. Living: `change` [B, H, W, n] to the first n
    channels, 0 to the rest, which is position and z. Dead, their position being all 0: 0 to the
    first n; to the rest the mean of the living around, positions moved by a cell, no gradient."""
    kept, angle = s[..., change.shape[-1] :], jnp.pi / IMAGE_SIZE * 2.0 ** jnp.arange(waves)
    living = jnp.any(kept[..., : 4 * waves] != 0, axis=-1, keepdims=True).astype(s.dtype)
    sine, cosine = jnp.diag(jnp.sin(angle)), jnp.diag(jnp.cos(angle))
    turn = jnp.block([[cosine, -sine], [sine, cosine]])  # (sin a, cos a) to those of a + angle
    turns, same = (turn, jnp.eye(2 * waves), turn.T), jnp.eye(kept.shape[-1] - 4 * waves + 1)
    kernel = jnp.array([[block_diag(i, j, same) for j in turns] for i in turns])  # [3, 3, m, m]
    with jax.default_matmul_precision("highest"):  # else a TPU would round what it hands on
        sums = nn.convolve(jnp.concatenate([kept, living], axis=-1), kernel, stride=1, padding=1)
    born = (1 - living) * lax.stop_gradient(sums[..., :-1] / jnp.maximum(sums[..., -1:], 1))
    return jnp.concatenate([living * change, born], axis=-1)


@lru_cache
def nondoubling_vnca(latent_size, encoder_width, steps, train_steps, channels=0, hidden=0, waves=0):
    """NonDoublingVNCA: z in every cell of a 32×32 grid, then NCA steps that can go on for ever.

    Where a config deviates, a cell has more channels, and the hidden layer a width of its own. With
    waves a cell begins with zeros, its position and z; steps change only the zeros, and a dead cell
    begins anew with a position and a z that are `inherited`.
    """
    channels, most = channels or latent_size, max(steps, *train_steps)
    hidden, zeros = hidden or channels, channels - latent_size - 4 * waves
    learnt = zeros if waves else channels  # the channels that a step computes

    def init(key):
        key, perceive_key = jax.random.split(key)
        perceive = nn.conv_init(perceive_key, 3, channels, hidden)
        decoder = {"perceive": perceive, "update": nn.zeros_init(hidden, learnt)}
        return {"encoder": encoder_init(key, encoder_width, latent_size), "decoder": decoder}

    def step(params, s):
        chex.assert_shape(s, (None, None, None, channels))
        h = nn.elu(nn.conv(params["decoder"]["perceive"], s, padding=1))
        change = nn.linear(params["decoder"]["update"], h)
        return s + (inherited(s, change, waves) if waves else change)

    def seed(z):
        chex.assert_shape(z, (None, latent_size))
        position = jnp.pad(positions(waves), ((0, 0), (0, 0), (zeros, latent_size)))
        return jnp.pad(z, ((0, 0), (channels - latent_size, 0)))[:, None, None] + position

    def develop(params, s, count):
        if not isinstance(count, jax.core.Tracer) and count > most:
            raise ValueError(f"{count} steps: this model develops for {most} at most")

        # A loop whose length is data has no reverse mode: this one does nothing past `count`.
        @tpu.door(None if waves else partial(tpu.developed, most))
        def to_the_largest(params, s, count):
            def one(s, t):
                return lax.cond(t < count, partial(step, params), lambda s: s, s), None

            return lax.scan(one, s, jnp.arange(most))[0]

        return to_the_largest(params, s, count)

    def grow(params, z, channels=1):
        return [step_on(partial(step, params), seed(z), steps, channels)[1]]

    def decode(params, z):
        return grow(params, z)[-1][-1]

    return Model(latent_size, init, encode, decode, grow, steps, seed, step, develop)


@lru_cache
def baseline_vae(latent_size, encoder_width):
    """BaselineVAE: the encoder's mirror image, five 5×5 transposed convolutions, as decoder."""
    widths = [encoder_width * 2**i for i in (4, 3, 2, 1, 0)]  # 512 … 32 as published

    def init(key):
        key, linear_key, *keys = jax.random.split(key, 7)
        decoder = {"linear": nn.linear_init(linear_key, latent_size, 4 * widths[0])}
        for i, pair in enumerate(pairwise([*widths, 1])):
            decoder[f"conv_transpose{i}"] = nn.conv_transpose_init(keys[i], 5, *pair)
        return {"encoder": encoder_init(key, encoder_width, latent_size), "decoder": decoder}

    @tpu.door(tpu.decode)
    def decode(params, z):
        params, batch = params["decoder"], len(z)
        chex.assert_shape(z, (batch, latent_size))
        x = nn.linear(params["linear"], z).reshape(batch, 2, 2, widths[0])
        for i in range(4):
            x = nn.elu(nn.conv_transpose(params[f"conv_transpose{i}"], x, 2, 2, output_padding=1))
        x = nn.conv_transpose(params["conv_transpose4"], x, stride=1, padding=4)
        chex.assert_shape(x, (batch, 28, 28, 1))
        # The border is always 0: this logit costs exactly 0 nats in float32, without −∞'s NaN.
        return jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1e4)

    return Model(latent_size, init, encode, decode)


def make_model(config):
    """The model that `config`, a config's `model`, describes."""
    sizes = config.latent_size, config.encoder_width
    if config.name == "baseline":
        return baseline_vae(*sizes)
    if config.name in ("nondoubling", "healing"):  # to be replaced: healing is a model of its own
        sizes += config.steps, tuple(config.train_steps), config.get("channels") or 0
        return nondoubling_vnca(*sizes, config.get("hidden") or 0, config.get("position_waves", 0))
    return doubling_vnca(*sizes, config.doublings, config.steps_per_doubling)
