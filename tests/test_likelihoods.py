"""The binomial likelihood: its sums by hand and in float64, and the images that it stores."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from vnca.likelihoods import as_floats, binomial, bits_per_dimension

pytestmark = pytest.mark.usefixtures("quickly_compiled")

RANDOM = np.random.RandomState(0)


def log_odds(shape):
    """Logits, float32, of which some are of coins that nearly always show the same side."""
    return (3 * RANDOM.randn(*shape)).astype(np.float32)


# ---- log p(x|z) ------------------------------------------------------------------------------


def test_one_toss_is_the_bernoulli_likelihood_of_digits_to_the_bit():
    logits = log_odds((3, 32, 32, 1))
    x = (RANDOM.rand(3, 32, 32, 1) < 0.5).astype(np.float32)

    @jax.jit
    def bernoulli(logits, x):
        return jnp.sum(x * logits - jax.nn.softplus(logits), axis=(1, 2, 3))

    log_prob = jax.jit(tiny.DIGITS.log_prob)
    for arrays in [(logits, x), (logits.reshape(-1, 1, 1, 1), x.reshape(-1, 1, 1, 1))]:
        np.testing.assert_array_equal(log_prob(*arrays), bernoulli(*arrays))
    found = log_prob(logits, x)
    p = reference.sigmoid(logits.astype(np.float64))
    exact = np.sum(x * np.log(p) + (1 - x) * np.log(1 - p), axis=(1, 2, 3))
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    assert found.dtype == np.float32


def test_two_tosses_are_worked_by_hand():
    # A logit of log 3 is a coin with p = 3/4: none, one or two heads have 1/16, 6/16 and 9/16.
    logits = jnp.full((3, 1, 1, 1), math.log(3))
    x = jnp.array([0, 0.5, 1]).reshape(3, 1, 1, 1)
    found = binomial(16, 1, 2).log_prob(logits, x)
    np.testing.assert_allclose(np.exp(found), [1 / 16, 6 / 16, 9 / 16], rtol=1e-6)


def test_sixteen_tosses_are_sixteen_bernoullis_and_the_number_of_their_orders():
    logits = log_odds((2, 4, 4, 3))
    tosses = (RANDOM.rand(16, 2, 4, 4, 3) < 0.5).astype(np.float32)
    each = sum(np.asarray(tiny.DIGITS.log_prob(logits, toss), np.float64) for toss in tosses)
    heads = tosses.sum(axis=0)
    orders = np.vectorize(lambda k: math.log(math.comb(16, int(k))))(heads).sum(axis=(1, 2, 3))
    found = binomial(16, 3, 16).log_prob(logits, heads / 16)
    np.testing.assert_allclose(found, each + orders, rtol=1e-5)


@pytest.mark.parametrize("levels", [1, 2, 16, 255])
def test_the_probabilities_of_all_levels_sum_to_one_and_their_mean_is_the_mean(levels):
    likelihood = binomial(16, 1, levels)
    x = (jnp.arange(levels + 1) / levels).reshape(-1, 1, 1, 1)
    for logit in (-8.0, -0.7, 0.0, 3.0):
        logits = jnp.full(x.shape, logit)
        p = np.exp(np.asarray(likelihood.log_prob(logits, x), np.float64))
        # With 255 tosses float32 leaves log p, whose terms are of up to 1,200 nats, off by 1e-4.
        np.testing.assert_allclose(p.sum(), 1, rtol=2e-6 * levels)
        mean = float(likelihood.mean(logits)[0, 0, 0, 0])
        np.testing.assert_allclose(np.sum(p * np.ravel(x)), mean, rtol=2e-6 * levels)
        assert mean == pytest.approx(float(reference.sigmoid(logit)), rel=1e-6)


@pytest.mark.parametrize("levels", [1, 16, 255])
@pytest.mark.parametrize(("logit", "share"), [(1e4, 0.0), (-1e4, 1.0)])
def test_even_what_is_all_but_impossible_has_a_finite_likelihood_and_slope(logit, share, levels):
    x = jnp.full((1, 1, 1, 1), share)
    f = lambda logits: binomial(16, 1, levels).log_prob(logits, x)[0]  # noqa: E731
    value, slope = jax.value_and_grad(f)(jnp.full((1, 1, 1, 1), logit))
    np.testing.assert_allclose(value, -1e4 * levels, rtol=1e-6)
    np.testing.assert_allclose(slope, np.full((1, 1, 1, 1), -np.sign(logit) * levels), rtol=1e-6)


@pytest.mark.parametrize("x", [(2, 4, 4, 1), (4, 4, 3), (2, 4, 4, 3, 1)], ids=str)
def test_images_of_another_shape_than_their_logits_are_refused(x):
    logits = jax.ShapeDtypeStruct((2, 4, 4, 3), np.float32)
    with pytest.raises(AssertionError, match=r"\(2, 4, 4, 3\)"):
        jax.eval_shape(binomial(16, 3, 1).log_prob, logits, jax.ShapeDtypeStruct(x, np.float32))


def test_bits_per_dimension_are_those_of_a_code_for_each_number():
    # Fair coins: a bit for each of 16·16·3 numbers of one toss, and 1.5 bits if there are two.
    likelihood = binomial(16, 3, 1)
    nats = likelihood.log_prob(jnp.zeros((1, 16, 16, 3)), jnp.ones((1, 16, 16, 3)))
    np.testing.assert_allclose(bits_per_dimension(likelihood, nats), [1.0], rtol=1e-6)
    entropy = 256 * 3 * 1.5 * math.log(2)
    assert bits_per_dimension(binomial(16, 3, 2), -entropy) == pytest.approx(1.5, rel=1e-12)


# ---- Images ----------------------------------------------------------------------------------


def test_equal_likelihoods_are_one_object_and_have_a_logit_for_each_number():
    assert binomial(16, 3, 255) is binomial(16, 3, 255)
    assert binomial(16, 3, 255) != binomial(16, 3, 254)
    assert (binomial(16, 3, 255).outputs, binomial(16, 1, 1).outputs) == (3, 1)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize(("size", "colours"), [(32, 1), (16, 3), (64, 1)])
def test_images_of_bits_are_numpys_unpackbits(size, colours, batch):
    likelihood = binomial(size, colours, 1)
    x = RANDOM.randint(2, size=(*batch, size, size, colours), dtype=np.uint8)
    stored = np.packbits(x.reshape(*batch, -1), axis=-1)
    assert stored.shape == (*batch, likelihood.row)
    found = jax.jit(as_floats, static_argnums=0)(likelihood, stored)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
@pytest.mark.parametrize(("size", "colours", "levels"), [(16, 3, 16), (16, 1, 255), (32, 3, 2)])
def test_images_of_bytes_are_fractions_of_all_levels(size, colours, levels, batch):
    likelihood = binomial(size, colours, levels)
    x = RANDOM.randint(levels + 1, size=(*batch, size, size, colours), dtype=np.uint8)
    x.flat[:2] = 0, levels
    stored = x.reshape(*batch, -1)
    assert stored.shape == (*batch, likelihood.row)
    found = jax.jit(as_floats, static_argnums=0)(likelihood, stored)
    assert found.dtype == np.float32 and found.min() == 0 and found.max() == 1
    np.testing.assert_allclose(found, x / levels, rtol=1e-7)


@pytest.mark.parametrize("likelihood", [binomial(16, 3, 1), binomial(16, 3, 16)])
def test_stored_images_of_another_size_are_refused(likelihood):
    with pytest.raises(TypeError, match="reshape"):
        as_floats(likelihood, jnp.zeros((2, likelihood.row + 8), np.uint8))
