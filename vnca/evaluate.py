"""The test IWELBO, its images split over the devices (paper, section 4; Burda et al. 2016)."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from vnca.data import unpack
from vnca.devices import gather, local_rows
from vnca.losses import iwelbo


def shuffled(count, images=10_000):
    """The first `count` of the fixed shuffle of the test images: their numbers, int64 [count]."""
    return np.random.RandomState(0).permutation(images)[:count]


@lru_cache
def estimator(model):
    """The IWELBO on all devices: params, packed bits uint8 [D, n, 98], numbers int32 [D, n],
    samples, seed -> float32 [D, n, 3] of IWELBO, log p(x|z) and KL, in nats."""

    def estimate(params, bits, numbers, samples, seed):
        def noise(s):
            # keyed by image and sample: no batch size, chunk or device count can change it
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), s))(numbers)
            return jax.vmap(lambda k: jax.random.normal(k, (model.latent_size,)))(keys)

        key = jax.random.key(seed)
        return jnp.stack(iwelbo(model, params, unpack(bits), noise, samples), axis=-1)

    return jax.pmap(estimate, in_axes=(None, 0, 0, None, None))


def test_iwelbo(model, params, test, numbers, samples, chunk, seed=0):
    """IWELBO, log p(x|z) and KL of the test images with these numbers: yields NumPy [≤ D·chunk, 3].

    params replicated or on the host, test uint8 [N, 98]. One device call for each D·chunk images;
    the last is padded with copies of its last image, whose results are dropped.
    """
    devices, rows = jax.device_count(), local_rows()
    for start in range(0, len(numbers), devices * chunk):
        part = numbers[start : start + devices * chunk]
        deal = np.pad(part, (0, devices * chunk - len(part)), mode="edge").reshape(devices, chunk)
        local = deal[rows].astype(np.int32)
        result = estimator(model)(params, test[local], local, samples, seed)
        yield gather(result).reshape(-1, 3)[: len(part)]
