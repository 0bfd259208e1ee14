"""Arrays on the devices: what is replicated on each, and what is split over all of them."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vnca.program.hosts import gather


def local_rows():
    """The rows that this process has of an array split over all devices, in pmap's order."""
    count = jax.local_device_count()
    return slice(jax.process_index() * count, (jax.process_index() + 1) * count)


def first_copy(tree):
    """The copy of replicated arrays on this process's first device."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def replicate(tree):
    """Copies host arrays to each of this process's devices."""
    return jax.device_put(tree, _sharding())


def on_devices(state, images):
    """The state and the images on this process's devices: a pool is split, the rest replicated."""

    def split(x):
        return np.asarray(x).reshape(jax.device_count(), -1, *x.shape[1:])[local_rows()]

    pool = jax.device_put(jax.tree.map(split, state.pool), _sharding("devices"))
    return replicate(state._replace(pool=()))._replace(pool=pool), replicate(images)


def _sharding(*axes):
    # pmap makes the same mesh. With any other, the first call would compile twice.
    return NamedSharding(Mesh(jax.local_devices(), "devices"), PartitionSpec(*axes))


def on_host(state):
    """The state as host arrays, with the whole pool. Every process must call it."""
    pool = jax.tree.map(lambda x: gather(x).reshape(-1, *x.shape[2:]), state.pool)
    return jax.device_get(first_copy(state._replace(pool=())))._replace(pool=pool)
