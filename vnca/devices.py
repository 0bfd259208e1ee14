"""How a batch and a pool are split over devices.

On one device, `places(n)` is 0, 1, …, n − 1, `take(array, slots)` is array[slots], and
`put(array, slots, new)` is array.at[slots].set(new).

On D devices, the three functions run inside a map over the axis "devices", and mean the same for an
array that is split along its first axis: the first device has the first D-th of the entries, the
second device the next, and so on.
"""

import jax.numpy as jnp
from jax import lax


def places(n):
    """The places of this device's n images in the global batch: int32 [n].

    An image's noise depends on its place, and so not on the number of devices.
    """
    return lax.axis_index("devices") * n + jnp.arange(n)


def local(slots, size):
    """Translates slots of the whole array, int32 [n], into slots of this device's part, which has
    `size` of them. A slot of another device becomes a number past the end of this part, and no
    number is used twice: `put` relies on that."""
    mine = slots - lax.axis_index("devices") * size
    return jnp.where((mine >= 0) & (mine < size), mine, size + jnp.arange(len(slots)))


def take(array, slots):
    """Reads these slots of the whole array. Every device asks for the same slots, int32 [n], and
    gets its share of their content, [n/D, …]."""
    content = array.at[local(slots, len(array))].get(mode="fill", fill_value=0)
    # Of each slot, one device has the content and the others zeros. So the sum is the content.
    return lax.psum_scatter(content, "devices", tiled=True)


def put(array, slots, new):
    """Overwrites these slots of the whole array. Every device names the same slots, int32 [n], no
    two of them equal, and gives its share of their new content, [n/D, …]. Returns this device's
    part of the array."""
    new = lax.all_gather(new, "devices", tiled=True)
    # Slots of other devices are past the end of this part, and are dropped. `unique_indices` is
    # true of these as well, since `local` uses each number past the end once.
    return array.at[local(slots, len(array))].set(new, mode="drop", unique_indices=True)
