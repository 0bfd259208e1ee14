"""The non-doubling model beyond its training: damage, and what grows back."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from vnca.images import IMAGE_SIZE


@partial(jax.jit, static_argnums=0)
def after_steps(model, params, cells, count):
    """The non-doubling model's cells [B, 32, 32, C] after any number of steps."""
    return lax.fori_loop(0, count, lambda _, s: model.step(params, s), cells)


@partial(jax.jit, static_argnums=0)
def grown(model, params, images):
    """The non-doubling model's cells [B, 32, 32, C] of these images (of the mean of q), after the
    steps that decoding takes."""
    return after_steps(
        model, params, model.initial_cells(model.encode(params, images)[0]), model.steps
    )


def regrowth(model, params, cells):
    """Cells [B, 32, 32, C]; the same without a quadrant; and after 2, 4, 8, 16 and 32 steps more: a
    list of seven."""
    states = [cells, damaged(cells)]
    for steps in (2, 2, 4, 8, 16):
        states.append(after_steps(model, params, states[-1], steps))
    return states


def damaged(cells, turn=0):
    """The cells [B, 32, 32, C] without a quarter of them, 16×16: image i without quadrant
    (i + turn) mod 4, in the order of reading."""
    lower = jnp.arange(IMAGE_SIZE) >= IMAGE_SIZE // 2
    quadrant = 2 * lower[:, None] + lower
    lost = (jnp.arange(len(cells)) + turn) % 4
    return jnp.where((quadrant == lost[:, None, None])[..., None], 0, cells)
