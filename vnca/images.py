"""Images as packed bits, 98 bytes each: 28×28 pixels, row by row, a byte's highest bit first."""

import jax.numpy as jnp

IMAGE_SIZE = 32  # 28×28 digits with 2 zeros on each side: a doubled grid's side is a power of 2


def unpack(bits):
    """Packed bits, uint8 [..., 98], as images, float32 [..., 32, 32, 1] of 0.0 and 1.0."""
    pixels = jnp.unpackbits(bits, axis=-1).astype(jnp.float32).reshape(*bits.shape[:-1], 28, 28, 1)
    return jnp.pad(pixels, [(0, 0)] * (bits.ndim - 1) + [(2, 2), (2, 2), (0, 0)])
