"""The hunt for the operation that first made a NaN or an infinity."""

import traceback
from pathlib import Path

import jax
import numpy as np

from vnca.training import State, one_update


def first_not_finite(method, config, state, images, indices):
    """Where an update goes wrong, as words: the first operation of it with a result that is not
    finite, or an array of the state that is so before it.

    It is computed again on one device, an operation at a time. state: host arrays, the pool whole
    [P, …]; indices: of all fresh images, int32 [fresh].
    """
    for path, x in jax.tree.leaves_with_path(state):
        if not np.all(np.isfinite(x)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return f"{name} was already not finite before it"

    def on_one(state, indices):
        return one_update(method, config, state, images, indices)

    # A map over one device: a pool has an axis for it, and so have the indices.
    pool, indices = jax.tree.map(lambda x: x[None], (state.pool, indices))
    axes = State(params=None, moments=None, update=None, pool=0)
    images = jax.device_put(images, jax.local_devices()[0])
    try:
        with jax.disable_jit(), jax.debug_nans(True), jax.debug_infs(True):
            jax.vmap(on_one, (axes, 0), axis_name="devices")(state._replace(pool=pool), indices)
    except FloatingPointError as fault:
        method = Path(__file__).parents[1]
        frames = traceback.extract_tb(fault.__traceback__)
        frame = [f for f in frames if Path(f.filename).parent == method][-1]
        return f"{fault}, at {frame.filename}:{frame.lineno} ({frame.name})"
    return "computed again, on one device, it is finite"
