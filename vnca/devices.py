"""Where images and rows of the pool lie.

On one device, `places(n)` is 0, 1, …, n − 1, `take(array, rows)` is array[rows], and
`put(array, rows, new)` is array.at[rows].set(new).

On D devices, which run the same program inside a map over the axis "devices", the three mean the
same for arrays that are split: each device has a D-th of the rows, the first device the first ones,
and so on.
"""

import jax.numpy as jnp
from jax import lax


def places(count):
    """Where in a split array the `count` entries of this device are: int32 [count].

    An image's noise depends on the update and on its place in the batch, so not on the number of
    devices.
    """
    return lax.axis_index("devices") * count + jnp.arange(count)


def local(rows, size):
    """Rows of the whole array, int32 [n], as rows of this device's part, which has `size` of them.
    The rows of other devices get distinct numbers from `size` on, past the end of this part."""
    mine = rows - lax.axis_index("devices") * size
    return jnp.where((mine >= 0) & (mine < size), mine, size + jnp.arange(len(rows)))


def take(array, rows):
    """Reads these rows of the whole array. Every device asks for the same ones, int32 [n], and gets
    its share of them, [n/D, …]."""
    entries = array.at[local(rows, len(array))].get(mode="fill", fill_value=0)
    return lax.psum_scatter(entries, "devices", tiled=True)  # one device has the row, the others 0


def put(array, rows, new):
    """Overwrites these rows of the whole array, which are distinct. Every device names the same
    ones, int32 [n], and gives its share of the new ones, [n/D, …]. Returns this device's part of
    the array."""
    new = lax.all_gather(new, "devices", tiled=True)
    # unique_indices promises that no two are equal: the rows are distinct, and `local` keeps them
    # so. Those past the end are other devices' rows, and are dropped.
    return array.at[local(rows, len(array))].set(new, mode="drop", unique_indices=True)
