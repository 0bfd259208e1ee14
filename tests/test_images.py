"""Packed bits as images."""

import jax
import numpy as np
import pytest

from vnca.models import unpack


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_unpack_is_numpys_unpackbits_in_a_border_of_zeros(batch):
    bits = np.random.RandomState(0).randint(0, 256, (*batch, 98), dtype=np.uint8)
    images = jax.jit(unpack)(bits)
    assert images.shape == (*batch, 32, 32, 1) and images.dtype == np.float32
    reference = np.unpackbits(bits, axis=-1).reshape(-1, 28, 28)
    reference = np.pad(reference, [(0, 0), (2, 2), (2, 2)]).reshape(images.shape)
    np.testing.assert_array_equal(images, reference)
