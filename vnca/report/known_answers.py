"""Known answers: what the packaged models give for 16 bundled test digits, computed in float64.

tests/known_answers.py, a NumPy program that shares no code with this package, computed them.
`python -m tests.known_answers` writes them again, which a new packaged model needs.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from vnca.images import unpack
from vnca.losses import elbo, iwelbo, reparametrize

FILE = Path(__file__).with_name("known_answers.npz")
IMAGES, SAMPLES = 16, 4  # the first of the test set; the importance samples of each
DIGIT = slice(2, 30)  # rows and columns of the digit; the baseline's border is a constant
LOST = slice(8, 24)  # rows and columns of the cells that are lost after half of the steps
TOLERANCE = 5e-6  # of `deviations` in float32; both methods were within 6e-7 on a CPU


def load(kind):
    """The known answers of the packaged model of this kind, named and shaped as in `answers`, as
    float64. Raises OSError where the file is missing."""
    with np.load(FILE, allow_pickle=False) as file:
        return {
            name.removeprefix(f"{kind}/"): file[name]
            for name in file.files
            if name.startswith(f"{kind}/")
        }


def noise(latent_size):
    """The noise of the known answers, float32 [4, 16, latent]. All versions of NumPy make the same
    numbers from a RandomState."""
    shape = SAMPLES, IMAGES, latent_size
    return np.random.RandomState(0).standard_normal(shape).astype(np.float32)


def answers(model, params, bits):
    """What a model gives for packed images, uint8 [16, 98]. It may be traced. z is from noise 0.

    mean, logvar: of q(z|x); logits: of z; healed (non-doubling models alone): the logits where a
    square of cells is set to zero after half of the steps. Each as its `excerpt`, [16, 6].
    nats: [16, 3], log p(x|z), the KL and the IWELBO.
    """
    x, eps = unpack(bits), jnp.asarray(noise(model.latent_size))
    mean, logvar = model.encode(params, x)
    z = reparametrize(mean, logvar, eps[0])
    logits = model.decode(params, z)
    found = {"mean": mean, "logvar": logvar, "logits": logits[:, DIGIT, DIGIT]}
    if model.develop:
        cells = model.develop(params, model.initial_cells(z), model.steps // 2)
        cells = cells.at[:, LOST, LOST].set(0)
        cells = model.develop(params, cells, model.steps - model.steps // 2)
        found["healed"] = cells[:, DIGIT, DIGIT, 0]
    _, log_px_z, kl = elbo(mean, logvar, logits, x)
    bound, _, _ = iwelbo(model, params, x, lambda s: eps[s], SAMPLES)
    excerpts = {name: excerpt(array) for name, array in found.items()}
    return excerpts | {"nats": jnp.stack([log_px_z, kl, bound], axis=-1)}


def excerpt(x):
    """Of each image: four numbers of x [16, …], spread over it, the mean of all, and the root of
    their mean square. [16, 6]."""
    x = x.reshape(len(x), -1)
    spread = x[:, x.shape[1] * np.array([1, 3, 5, 7]) // 8]
    sums = jnp.mean(x, axis=1, keepdims=True), jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True))
    return jnp.concatenate([spread, *sums], axis=1)
