"""The search for the operation that first produced a NaN or an infinity."""

import traceback
from pathlib import Path

import jax
import numpy as np

from vnca.program.checkpoint import array_name
from vnca.training import State, one_update


def array_not_finite(state):
    """The name of the first array of a pytree of host arrays that is not finite, or None."""
    for path, x in jax.tree.leaves_with_path(state):
        if not np.all(np.isfinite(x)):
            return array_name(path)
    return None


def first_not_finite(method, config, state, images, indices):
    """Describes the first operation of an update whose result is not finite, or the first array of
    the state that is not finite before the update.

    The update is repeated on one device, one operation at a time. state: host arrays, with the
    whole pool, [P, …]; indices: of all fresh images, int32 [F].
    """
    if name := array_not_finite(state):
        return f"{name} was not finite before the update"

    def update(state, indices):
        return one_update(method, config, state, images, indices)

    # A map over one device. The pool and the indices get an axis for it.
    pool, indices = jax.tree.map(lambda x: x[None], (state.pool, indices))
    axes = State(params=None, moments=None, update=None, pool=0)
    images = jax.device_put(images, jax.local_devices()[0])
    try:
        with jax.disable_jit(), jax.debug_nans(True), jax.debug_infs(True):
            jax.vmap(update, (axes, 0), axis_name="devices")(state._replace(pool=pool), indices)
    except FloatingPointError as fault:
        folder = Path(__file__).parents[1]  # of the method
        frames = traceback.extract_tb(fault.__traceback__)
        frame = [f for f in frames if Path(f.filename).parent == folder][-1]
        return f"{fault}, at {frame.filename}:{frame.lineno} ({frame.name})"
    return "The update is finite when the plain method repeats it on one device"
