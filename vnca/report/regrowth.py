"""Growth, damage and regrowth of models on a grid of fixed size, for any number of steps."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from vnca.images import IMAGE_SIZE


@partial(jax.jit, static_argnums=0)
def advance(model, params, cells, count):
    """Cells [B, 32, 32, C] after `count` more steps, without a gradient. `count` has no limit."""
    return lax.fori_loop(0, count, lambda _, s: model.step(params, s), cells)


@partial(jax.jit, static_argnums=0)
def grow_images(model, params, images):
    """Encodes images [B, 32, 32, 1] and grows cells [B, 32, 32, C] from the means of q(z|x), for as
    many steps as the model's `decode` takes."""
    mean, _ = model.encode(params, images)
    return advance(model, params, model.initial_cells(mean), model.steps)


def damage_and_regrow(model, params, cells):
    """Removes a quadrant of the cells [B, 32, 32, C] and lets them regrow.

    Returns a list of seven states: the cells as given, damaged, and after 2, 4, 8, 16 and 32 steps.
    """
    states = [cells, lose_quadrant(cells)]
    for steps in (2, 2, 4, 8, 16):
        states.append(advance(model, params, states[-1], steps))
    return states


def lose_quadrant(cells, offset=0):
    """Sets one 16×16 quadrant of each image's cells [B, 32, 32, C] to zero.

    Image i loses quadrant (i + offset) mod 4. Quadrants are counted from the top left, row by row.
    """
    second_half = jnp.arange(IMAGE_SIZE) >= IMAGE_SIZE // 2
    quadrant = 2 * second_half[:, None] + second_half
    lost = (jnp.arange(len(cells)) + offset) % 4
    return jnp.where((quadrant == lost[:, None, None])[..., None], 0, cells)
