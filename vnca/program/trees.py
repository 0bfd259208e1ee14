"""The arrays of a pytree: the name of each, and a checksum of all."""

import hashlib

import jax
import numpy as np


def array_name(path):
    """The name of the array at a path of a pytree: "params/decoder/perceive/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def sha256(tree):
    """The SHA-256 of the arrays of a pytree, as 64 hexadecimal digits."""
    arrays = map(np.ascontiguousarray, jax.tree.leaves(tree))
    return hashlib.sha256(b"".join(arrays)).hexdigest()
