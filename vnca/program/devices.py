"""The devices of this process: how many a CPU is, and what lies on each."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vnca.program.hosts import gather


def local_rows():
    """This process's rows of an array that is split over all devices: pmap's order of them."""
    count = jax.local_device_count()
    return slice(jax.process_index() * count, (jax.process_index() + 1) * count)


def first_copy(tree):
    """The copy of replicated arrays on this process's first device."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def replicate(tree):
    """Host arrays whole on each of this process's devices."""
    return jax.device_put(tree, _sharding())


def on_devices(state, images):
    """State and images on this process's devices: whole on each, except a pool, split over all."""

    def share(x):
        return np.asarray(x).reshape(jax.device_count(), -1, *x.shape[1:])[local_rows()]

    pool = jax.device_put(jax.tree.map(share, state.pool), _sharding("devices"))
    return replicate(state._replace(pool=()))._replace(pool=pool), replicate(images)


def _sharding(*axes):
    # The mesh just as pmap makes it, or the first call compiles twice.
    return NamedSharding(Mesh(jax.local_devices(), "devices"), PartitionSpec(*axes))


def on_host(state):
    """The state as host arrays, the pool of all devices whole; every process must ask for it."""
    pool = jax.tree.map(lambda x: gather(x).reshape(-1, *x.shape[2:]), state.pool)
    return jax.device_get(first_copy(state._replace(pool=())))._replace(pool=pool)
