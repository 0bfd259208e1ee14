"""The objectives: each against its formula in NumPy, and the bounds against a known log p(x)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from vnca import losses
from vnca.likelihoods import binomial
from vnca.model import Model

pytestmark = pytest.mark.usefixtures("quickly_compiled")

RANDOM = np.random.RandomState(0)
LOG_2PI = math.log(2 * math.pi)


def log_likelihood(logits, x):
    """Σ x·log p + (1 − x)·log(1 − p), NumPy, float64."""
    p = reference.sigmoid(logits)
    return np.sum(x * np.log(p) + (1 - x) * np.log(1 - p), axis=(1, 2, 3))


def log_normal(z, mean, logvar):
    return -0.5 * np.sum(LOG_2PI + logvar + (z - mean) ** 2 / np.exp(logvar), axis=-1)


# ---- A model small enough to be known: 2×2 pixels, one latent --------------------------------

SLOPES, OFFSETS = np.array([1.5, -1.0, 0.5, 2.0]), np.array([0.5, 0.0, -1.0, 0.3])
PIXELS = np.array([1.0, 0.0, 0.0, 1.0])


def encode(params, x):
    return (jnp.broadcast_to(a, (len(x), 1)) for a in (params["mean"], params["logvar"]))


def decode(_, z):
    return (z * SLOPES.astype(np.float32) + OFFSETS.astype(np.float32)).reshape(-1, 2, 2, 1)


BERNOULLI = binomial(2, 1, 1)
KNOWN = Model(1, BERNOULLI, None, encode, decode)
POSTERIOR = {"mean": np.float32(0.5), "logvar": np.float32(-0.2)}  # on purpose not the true one
KL = (math.exp(-0.2) + 0.5**2 - 1 + 0.2) / 2


def known_log_px():
    """log ∫ p(x|z) p(z) dz by quadrature."""
    z = np.linspace(-10, 10, 4001)
    logits = (z[:, None] * SLOPES + OFFSETS).reshape(-1, 2, 2, 1)
    joint = log_likelihood(logits, PIXELS.reshape(1, 2, 2, 1)) + log_normal(z[:, None], 0, 0)
    return math.log(np.sum(np.exp(joint)) * (z[1] - z[0]))


def copies(n):
    """The same image n times, so that a mean over the batch is a mean over noise."""
    return np.broadcast_to(PIXELS.astype(np.float32).reshape(1, 2, 2, 1), (n, 2, 2, 1))


def noise_of(n, latents=1):
    return lambda s: jax.random.normal(jax.random.fold_in(jax.random.key(0), s), (n, latents))


@jax.jit
def bound(samples):
    """IWELBO of 4,000 copies of the image."""
    return losses.iwelbo(KNOWN, POSTERIOR, copies(4000), noise_of(4000), samples)


def log_weights(n, samples):
    """log p(x|z_s) p(z_s) / q(z_s|x) in NumPy, [samples, n], and log p(x|z_s)."""
    mean, logvar = (float(POSTERIOR[name]) for name in ("mean", "logvar"))
    weights, log_px_z = [], []
    for s in range(samples):
        z = mean + math.exp(logvar / 2) * np.asarray(noise_of(n)(s), np.float64)
        logits = (z * SLOPES + OFFSETS).reshape(-1, 2, 2, 1)
        log_px_z.append(log_likelihood(logits, copies(n)))
        weights.append(log_px_z[-1] + log_normal(z, 0, 0) - log_normal(z, mean, logvar))
    return np.array(weights), np.array(log_px_z)


# ---- Terms -----------------------------------------------------------------------------------


def test_the_likelihood_is_the_sum_of_log_probabilities_over_all_pixels():
    logits = 3 * RANDOM.randn(3, 4, 5, 1)
    x = (RANDOM.rand(3, 4, 5, 1) < 0.5).astype(np.float32)
    found = BERNOULLI.log_prob(logits.astype(np.float32), x)
    np.testing.assert_allclose(found, log_likelihood(logits, x), rtol=1e-5)


@pytest.mark.parametrize(
    ("logit", "pixel", "nats"),
    [(0, 1, -math.log(2)), (0, 0, -math.log(2)), (200, 1, 0), (200, 0, -200), (-1e4, 0, 0),
     (-1e4, 1, -1e4), (1e30, 1, 0)],
)  # fmt: skip
def test_the_likelihood_of_a_certain_pixel_is_finite_and_so_is_its_slope(logit, pixel, nats):
    one = jnp.full((1, 1, 1, 1), logit, jnp.float32)
    f = lambda l: BERNOULLI.log_prob(l, jnp.full_like(one, pixel))[0]  # noqa: E731
    value, slope = jax.value_and_grad(f)(one)
    np.testing.assert_allclose(value, nats, rtol=1e-6)
    expected = pixel - (1 if logit > 100 else 0 if logit < -100 else 0.5)
    np.testing.assert_allclose(slope.item(), expected)


@pytest.mark.parametrize(
    ("mean", "logvar", "nats"),
    [
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 0),
        ([2.0], [0.0], 2),  # mean²/2
        ([0.0], [1.0], (math.e - 2) / 2),
        ([0.0, 0.0], [-1.0, -1.0], 1 / math.e),
        ([1.0, -3.0], [0.0, 2.0], 0.5 + (math.e**2 + 9 - 3) / 2),
    ],
)
def test_the_kl_is_that_of_a_worked_example(mean, logvar, nats):
    found = losses.gaussian_kl(jnp.array([mean]), jnp.array([logvar]))
    np.testing.assert_allclose(found, [nats], rtol=1e-6)


def test_the_kl_is_the_mean_of_log_q_minus_log_p_over_samples_of_q():
    mean, logvar = np.array([0.7, -0.3, 0.0]), np.array([-1.0, 0.4, 0.2])
    z = mean + np.exp(logvar / 2) * RANDOM.randn(200_000, 3)
    sampled = log_normal(z, mean, logvar) - log_normal(z, 0, 0)
    found = losses.gaussian_kl(jnp.array([mean]), jnp.array([logvar]))[0]
    assert abs(found - sampled.mean()) < 5 * sampled.std() / 200_000**0.5


def test_the_density_of_a_latent_integrates_to_one_and_has_its_moments():
    z, step = np.linspace(-12, 12, 2001, dtype=np.float32)[:, None], 24 / 2000
    density = np.exp(losses.normal_log_density(z))
    for power, moment in enumerate([1, 0, 1]):
        np.testing.assert_allclose((density * z[:, 0] ** power).sum() * step, moment, atol=1e-4)


def test_the_density_of_several_latents_is_the_product_of_theirs():
    z = RANDOM.randn(4, 5).astype(np.float32)
    found = losses.normal_log_density(z)
    assert found.shape == (4,)
    np.testing.assert_allclose(found, log_normal(z, 0, 0), rtol=1e-5)


@pytest.mark.parametrize("logvar", [2.0, -20.0, -40.0, -100.0])
def test_a_weight_is_that_of_float64_however_narrow_the_posterior_is(logvar):
    mean, logvar = np.full((2, 3), [1, -2, 30.0]), np.full((2, 3), logvar)
    noise = RANDOM.randn(2, 3)
    model = KNOWN._replace(decode=lambda params, z: jnp.zeros((2, 2, 2, 1)))
    x = np.zeros((2, 2, 2, 1))
    arrays = [a.astype(np.float32) for a in (x, mean, logvar, noise)]
    found, log_px_z = losses.log_importance_weight(model, None, *arrays)
    z = mean + np.exp(logvar / 2) * noise
    log_qz_x = log_normal(noise, 0, 0) - logvar.sum(axis=-1) / 2
    np.testing.assert_allclose(log_px_z, -4 * math.log(2), rtol=1e-6)
    np.testing.assert_allclose(found, log_px_z + log_normal(z, 0, 0) - log_qz_x, rtol=1e-5)


# ---- ELBO ------------------------------------------------------------------------------------


def elbo(params, n, noise):
    """The ELBO of n copies of the image, and its terms."""
    mean, logvar = encode(params, copies(n))
    logits = decode(params, losses.reparametrize(mean, logvar, noise))
    return losses.elbo(BERNOULLI, mean, logvar, logits, copies(n))


def test_the_elbo_is_the_likelihood_of_a_sample_of_q_less_the_kl():
    noise = RANDOM.randn(5, 1).astype(np.float32)
    bound, log_px_z, kl = elbo(POSTERIOR, 5, noise)
    mean, logvar = (float(POSTERIOR[name]) for name in ("mean", "logvar"))
    z = mean + math.exp(logvar / 2) * noise.astype(np.float64)
    logits = (z * SLOPES + OFFSETS).reshape(-1, 2, 2, 1)
    np.testing.assert_allclose(log_px_z, log_likelihood(logits, copies(5)), rtol=1e-5)
    np.testing.assert_allclose(kl, [KL] * 5, rtol=1e-5)
    np.testing.assert_allclose(bound, log_likelihood(logits, copies(5)) - KL, rtol=1e-5)


def test_the_gradient_of_the_elbo_passes_through_the_sample():
    noise = RANDOM.randn(5, 1).astype(np.float32)

    def ours(params):
        bound, _, _ = elbo(params, 5, noise)
        return jnp.sum(bound)

    def loops(moments):
        z = moments[0] + math.exp(moments[1] / 2) * noise.astype(np.float64)
        logits = (z * SLOPES + OFFSETS).reshape(-1, 2, 2, 1)
        kl = (math.exp(moments[1]) + moments[0] ** 2 - 1 - moments[1]) / 2
        return np.sum(log_likelihood(logits, copies(5)) - kl)

    found = jax.jit(jax.grad(ours))(POSTERIOR)
    expected = reference.gradient(loops, np.array([0.5, -0.2]))
    np.testing.assert_allclose([found["mean"], found["logvar"]], expected, rtol=1e-4)


def test_the_elbo_is_below_the_log_probability_of_the_image():
    bound, _, _ = elbo(POSTERIOR, 4000, noise_of(4000)(0))
    assert np.mean(bound) < known_log_px() - 0.05


def test_the_objective_is_minus_the_mean_elbo_and_its_terms_are_means():
    mean, logvar = RANDOM.randn(2, 6, 3).astype(np.float32)
    logits = RANDOM.randn(6, 2, 2, 1).astype(np.float32)
    value, terms = losses.objective(BERNOULLI, mean, logvar, logits, copies(6))
    reconstruction = -np.mean(log_likelihood(logits.astype(np.float64), copies(6)))
    kl = np.mean(np.sum(np.exp(logvar) + mean**2 - 1 - logvar, axis=-1)) / 2
    np.testing.assert_allclose(terms, [reconstruction + kl, reconstruction, kl], rtol=1e-5)
    assert value == terms[0]


# ---- IWELBO ----------------------------------------------------------------------------------


def test_iwelbo_of_one_sample_is_the_bound_with_the_kl_of_that_sample():
    weights, _ = log_weights(4000, 1)
    np.testing.assert_allclose(bound(1)[0], weights[0], rtol=1e-4, atol=1e-4)


def test_iwelbo_is_the_log_of_the_mean_weight():
    weights, log_px_z = log_weights(4000, 7)
    found, found_log_px_z, kl = bound(7)
    np.testing.assert_allclose(found, np.log(np.mean(np.exp(weights), axis=0)), rtol=1e-4)
    np.testing.assert_allclose(found_log_px_z, log_px_z.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(kl, [KL] * 4000, rtol=1e-5)


def test_iwelbo_of_one_sample_is_the_elbo_on_average():
    exact, _, _ = elbo(POSTERIOR, 4000, noise_of(4000)(0))
    difference = np.asarray(bound(1)[0]) - np.asarray(exact)  # of the sampled KL and the exact one
    assert abs(difference.mean()) < 5 * difference.std() / 4000**0.5


def test_iwelbo_is_tighter_with_more_samples_and_approaches_log_px_from_below():
    means = [float(np.mean(bound(samples)[0])) for samples in (1, 4, 16, 64, 256)]
    assert means == sorted(means)
    assert means[0] < known_log_px() - 0.05
    assert known_log_px() - 0.01 < means[-1] < known_log_px() + 0.002


@pytest.mark.parametrize("samples", [1, 3, 10])
def test_iwelbo_is_exact_where_the_latent_does_not_matter(samples):
    prior = {"mean": np.float32(0), "logvar": np.float32(0)}
    ignorant = KNOWN._replace(decode=lambda _, z: decode(_, 0 * z))
    found, *_ = losses.iwelbo(ignorant, prior, copies(2), noise_of(2), samples)
    expected = log_likelihood(OFFSETS.reshape(1, 2, 2, 1), copies(1))
    np.testing.assert_allclose(found, [*expected] * 2, rtol=1e-5)


def test_iwelbo_of_the_most_samples_that_a_config_may_ask_for_is_within_a_thousandth_of_a_nat():
    likely = KNOWN._replace(decode=lambda _, z: jnp.full((len(z), 2, 2, 1), -42.5))
    prior = {"mean": np.float32(0), "logvar": np.float32(0)}
    found, *_ = losses.iwelbo(likely, prior, copies(2), noise_of(2), 10_000)
    np.testing.assert_allclose(found, [-85] * 2, atol=1e-3)  # two lit pixels, e^-85


def test_iwelbo_of_an_image_beyond_float32_is_finite():
    certain = KNOWN._replace(decode=lambda _, z: jnp.full((len(z), 2, 2, 1), -1e4))
    prior = {"mean": np.float32(0), "logvar": np.float32(0)}
    found, *_ = losses.iwelbo(certain, prior, copies(2), noise_of(2), 5)
    np.testing.assert_allclose(found, [-2e4] * 2, rtol=1e-6)  # two lit pixels, e^-20000


def test_the_memory_of_iwelbo_does_not_grow_with_the_samples():
    samples = 37
    jaxpr = jax.make_jaxpr(
        lambda x: losses.iwelbo(KNOWN, POSTERIOR, x, noise_of(3), samples)
    )(copies(3))  # fmt: skip
    shapes = [v.aval.shape for e in reference.equations(jaxpr) for v in e.outvars]
    assert (3, 2, 2, 1) in shapes  # the loop over samples has been looked into
    assert not [shape for shape in shapes if any(n % samples == 0 for n in shape)]
