"""GrowingVNCA: the automaton of "Growing Neural Cellular Automata" (Mordvintsev et al. 2020) as a
decoder. It is an example to copy for an automaton of your own.

It differs from NonDoublingVNCA in three ways. Growth starts from a square in the middle, whose
cells hold z, and all other cells are empty, which shows as black. A cell is alive if it or one of
its eight neighbours has more than 0.1 in its life channel. A step empties every cell that is not
alive. And in each step a living cell changes only if the coin that it tosses shows heads.

It differs from the automaton of the article in two ways. A cell perceives its neighbours by a
convolution that is learned, not by fixed Sobel filters. And growth starts from a square, not from a
single cell, so that many cells hold z from the start.

**The coins.** A step must be a function of the cells alone, so each image has a random number of 24
bits, which is in the last channel of all its cells. A step makes a key of this number and tosses
all coins with this key. Then it replaces the number by the next one of a fixed sequence. The first
number is drawn with a key that is made of z, rounded to steps of 1/256. So the tosses differ
between images, samples and updates, and equal z have equal tosses: an evaluation repeats to the
bit. z is rounded because the plain and the fast form of the encoder give a z that differs in its
last bits, which must not change the tosses.
"""

from functools import lru_cache

import chex
import jax
import jax.numpy as jnp
from jax import lax

from vnca import layers
from vnca.model import SettingError, encoder_init, fixed_grid_model

EMPTY_LOGIT = -4.0  # of an empty cell: white with a probability of 0.018
ALIVE = 0.1  # a cell with more life than this keeps itself and its neighbours alive
Z_STEP = 1 / 256  # z is rounded to multiples of this before it makes the key of the coins
NUMBERS = 1 << 24  # random numbers are 0 … NUMBERS − 1, which float32 holds exactly


def first_number(z):
    """A random number for each image, drawn with a key made of z [B, latent]: float32 [B]."""

    def draw(rounded):
        key, _ = lax.scan(
            lambda key, n: (jax.random.fold_in(key, n), None), jax.random.key(0), rounded
        )
        return jax.random.randint(key, (), 0, NUMBERS)

    return jax.vmap(draw)(jnp.round(z / Z_STEP).astype(jnp.int32)).astype(jnp.float32)


def next_number(number):
    """The number after this one: a linear congruential generator modulo 2²⁴, float32 [B]."""
    return ((1_664_525 * number.astype(jnp.uint32) + 1_013_904_223) % NUMBERS).astype(jnp.float32)


def toss(number, rate, shape):
    """Tosses a coin for each cell of images with these numbers, float32 [B]: bool [B, *shape], True
    with probability `rate`."""

    def draw(number):
        return jax.random.bernoulli(jax.random.fold_in(jax.random.key(0), number), rate, shape)

    return jax.vmap(draw)(number.astype(jnp.uint32))


def is_alive(life):
    """Whether a cell or one of its neighbours has enough life [B, H, W, 1]: bool, of this shape."""
    window = 1, 3, 3, 1
    return lax.reduce_window(life, -jnp.inf, lax.max, window, (1, 1, 1, 1), "SAME") > ALIVE


def check_dtype(x):
    """Raises SettingError unless x, cells or z, is float32."""
    if x.dtype != jnp.float32:
        raise SettingError(f"name=growing: {x.dtype} does not hold its random numbers exactly")


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
    start: int,
    rate: float,
):
    """GrowingVNCA. A cell's channels are its logits, its life, memory that holds z before the first
    step, more memory, and the random number of its image.

    channels: of a cell; hidden: channels of a step's hidden layer; start: side of the square that
    is alive at first; rate: the probability that a step changes a living cell.
    """
    size, life = likelihood.size, likelihood.outputs
    memory = channels - life - latent_size - 2
    if memory < 0:
        raise SettingError(
            f"channels={channels}: it must be at least {channels - memory}: the logits, life, z "
            "and a random number"
        )
    if start % 2 or start > size:  # a square of an odd side has no place in the middle
        raise SettingError(f"start={start}: it must be even, and at most {size}, the grid's side")
    if not 0 < rate <= 1:
        raise SettingError(f"rate={rate}: it must be above 0, and at most 1")

    empty = jnp.where(jnp.arange(channels - 1) < likelihood.outputs, EMPTY_LOGIT, 0)

    def init(key):
        encoder_key, perceive_key = jax.random.split(key)
        return {
            "encoder": encoder_init(encoder_key, likelihood, encoder_width, latent_size),
            "decoder": {
                "perceive": layers.conv_init(perceive_key, 3, channels - 1, hidden),
                "residual": layers.zeros_init(hidden, channels - 1),
            },
        }

    def with_number(s, number):
        """Cells with the random numbers of their images, [B], as their last channel."""
        number = jnp.broadcast_to(number[:, None, None, None], (*s.shape[:3], 1))
        return jnp.concatenate([s, number], axis=-1)

    def initial_cells(z):
        chex.assert_shape(z, (None, latent_size))
        check_dtype(z)
        line = abs(jnp.arange(size) - (size - 1) / 2) < start / 2
        square = (line[:, None] & line)[..., None]
        cell = jnp.pad(z, ((0, 0), (life + 1, memory))).at[:, life].set(1)
        return with_number(jnp.where(square, cell[:, None, None], empty), first_number(z))

    def step(params, s):
        params = params["decoder"]
        chex.assert_shape(s, (None, None, None, channels))
        check_dtype(s)
        number = jnp.max(s[..., -1], axis=(1, 2))  # damage sets it to 0 in the cells that are lost
        s = s[..., :-1]
        heads = toss(number, rate, (*s.shape[1:3], 1))
        change = nn.linear(params["residual"], nn.elu(nn.conv(params["perceive"], s, padding=1)))
        changed = s + jnp.where(heads, change, 0)
        s = jnp.where(is_alive(s[..., life : life + 1]), changed, empty)
        return with_number(s, next_number(number))

    return fixed_grid_model(
        nn, likelihood, latent_size, init, initial_cells, step, steps, train_steps
    )
