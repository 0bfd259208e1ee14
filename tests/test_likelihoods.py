"""The likelihoods: their sums by hand and in float64, and the images that they store."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from vnca.likelihoods import as_floats, binomial, bits_per_dimension, logistic_mixture

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
        mean = float(likelihood.picture(logits)[0, 0, 0, 0])
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


# ---- A mixture of discretized logistics ------------------------------------------------------

LEVELS = np.arange(256) / 255


def mixture_of(weights, *colours):
    """Logits of one pixel, float32 [1, 1, 1, outputs]: log-weights [M], and for each colour its
    means, log-scales and coefficients, each [M]."""
    return np.float32(np.concatenate([weights, *np.ravel(colours).reshape(1, -1)]))[
        None, None, None
    ]


def exact(x, mean, log_scale):
    """The probability of levels x, by a difference of the logistic CDF in float64."""
    low, high = ((2 * x - 1 + d - mean) * np.exp(-log_scale) for d in (-1 / 255, 1 / 255))
    low, high = np.where(x == 0, -np.inf, low), np.where(x == 1, np.inf, high)
    # The smaller one of both tails keeps its digits.
    upper = low > 0
    low, high = np.where(upper, -high, low), np.where(upper, -low, high)
    return np.exp(-np.logaddexp(0, -high)) - np.exp(-np.logaddexp(0, -low))


def of_one_pixel(likelihood, logits, x):
    """log p of values x [N, colours] of one pixel, float64 [N]."""
    x = jnp.float32(x)[:, None, None]
    likelihood = likelihood(1, x.shape[-1])
    logits = jnp.broadcast_to(logits, (len(x), *np.shape(logits)[1:]))
    return np.asarray(likelihood.log_prob(logits, x), np.float64)


def pixels_of(mixtures):
    """A likelihood of images of one pixel."""
    return lambda size, colours: logistic_mixture(size, colours, mixtures)


@pytest.mark.parametrize("mixtures", [1, 2, 4, 10])
def test_the_probabilities_of_all_256_levels_of_a_mixture_sum_to_one(mixtures):
    random = np.random.RandomState(mixtures)
    for mean, log_scale in ((0.3, -2), (-1, -7), (1, -3), (3, -1), (-8, 0), (0, 5), (40, -7)):
        means = mean + 0.1 * random.randn(mixtures)
        scales = np.clip(log_scale + random.randn(mixtures), -9, 9)
        logits = mixture_of(random.randn(mixtures), means, scales)
        p = np.exp(of_one_pixel(pixels_of(mixtures), logits, LEVELS[:, None]))
        # At a log-scale of −7 float32 leaves log p off by some 1e-4.
        np.testing.assert_allclose(p.sum(), 1, atol=3e-4)


@pytest.mark.parametrize("log_scale", [-7, -4, -1, 2, 7])
@pytest.mark.parametrize("mean", [-3, -1, -0.2, 0.9])
def test_a_level_has_the_difference_of_the_cdf_at_the_ends_of_its_interval(mean, log_scale):
    found = of_one_pixel(pixels_of(1), mixture_of([0.7], [mean], [log_scale]), LEVELS[:, None])
    expected = exact(LEVELS, mean, log_scale)
    seen = expected > 1e-30  # else the difference in float64 is of rounding errors
    assert seen.any()
    np.testing.assert_allclose(found[seen], np.log(expected[seen]), rtol=2e-5, atol=2e-4)


def test_log_scales_are_cut_at_7_on_both_sides():
    for far, cut in ((-30, -7), (30, 7)):
        pair = (mixture_of([0], [0.1], [scale]) for scale in (far, cut))
        values = [of_one_pixel(pixels_of(1), logits, LEVELS[:, None]) for logits in pair]
        np.testing.assert_array_equal(*values)


@pytest.mark.parametrize("mixtures", [1, 3])
def test_green_moves_with_red_and_blue_with_both(mixtures):
    random = np.random.RandomState(0)
    weights = random.randn(mixtures)
    means, log_scales, coefficients = random.randn(3, 3, mixtures) * [[[0.5]], [[0.7]], [[1]]]
    log_scales -= 2
    colours = np.stack([means, log_scales, coefficients], axis=1)
    x = random.randint(256, size=(40, 3)) / 255
    x[:4] = [0, 0, 0], [1, 1, 1], [0, 1, 0.2], [1, 0.5, 0]
    found = of_one_pixel(pixels_of(mixtures), mixture_of(weights, colours), x)
    c = np.tanh(coefficients)
    red, green, _ = 2 * x.T - 1
    of_mixtures = []
    for m in range(mixtures):
        moved = (
            means[0, m],
            means[1, m] + c[0, m] * red,
            means[2, m] + c[1, m] * red + c[2, m] * green,
        )
        parts = [exact(x[:, i], moved[i], log_scales[i, m]) for i in range(3)]
        of_mixtures.append(np.prod(parts, axis=0))
    p = np.exp(weights - np.log(np.exp(weights).sum())) @ of_mixtures
    seen = p > 1e-25
    assert seen.sum() > 20
    np.testing.assert_allclose(found[seen], np.log(p[seen]), rtol=1e-4)


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e30])
def test_however_large_the_logits_a_level_has_a_finite_likelihood_and_gradient(size, colours):
    likelihood = logistic_mixture(1, colours, 2)
    random = np.random.RandomState(0)
    logits = np.float32(size * random.choice([-1, 1], (256, 1, 1, likelihood.outputs)))
    x = jnp.float32(LEVELS[:, None, None, None].repeat(colours, axis=-1))

    def total(logits):
        values = likelihood.log_prob(logits, x)
        return jnp.sum(values / 1e6), values  # the sum of all 256 must not overflow

    (_, values), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
    assert np.isfinite(values).all() and np.isfinite(gradient).all() and (values <= 1e-4).all()


def test_samples_of_a_mixture_have_its_probabilities():
    likelihood, count = logistic_mixture(1, 1, 2), 200_000
    logits = mixture_of([0.5, -0.5], [-0.6, 0.9], [-2.5, -1])
    keys = jax.random.split(jax.random.key(0), 20)
    many = jnp.broadcast_to(logits, (count // 20, 1, 1, likelihood.outputs))
    drawn = np.ravel([likelihood.sample(key, many) for key in keys])
    assert drawn.min() == 0 and drawn.max() == 1  # the tails are clipped
    # No sample is rounded: the level of each is the nearest.
    observed = np.bincount(np.rint(255 * drawn).astype(int), minlength=256)
    p = np.exp(of_one_pixel(pixels_of(2), logits, LEVELS[:, None]))
    expected = count * p
    groups = np.cumsum(expected) // 100  # so that none is rare
    observed, expected = (np.bincount(groups.astype(int), x) for x in (observed, expected))
    kept = expected > 20
    chi2 = np.sum((observed - expected)[kept] ** 2 / expected[kept])
    assert abs(chi2 - kept.sum()) < 5 * np.sqrt(2 * kept.sum())


def test_samples_of_a_binomial_have_its_probabilities():
    likelihood = binomial(1, 1, 4)
    drawn = likelihood.sample(jax.random.key(0), jnp.full((40_000, 1, 1, 1), -0.4))
    observed = np.bincount(np.rint(4 * np.ravel(drawn)).astype(int), minlength=5)
    p = float(reference.sigmoid(-0.4))
    expected = [40_000 * math.comb(4, k) * p**k * (1 - p) ** (4 - k) for k in range(5)]
    assert np.sum((observed - expected) ** 2 / expected) < 20  # of 4 degrees of freedom


def test_the_centre_is_what_the_logistics_without_noise_are_on_average():
    weights, means = np.log([0.25, 0.75]), np.array([[0.5, -1], [0.9, 0.1], [-0.2, 4]])
    coefficients = np.array([[0.2, 0], [0, 0], [1, 1]])
    colours = np.stack([means, np.zeros((3, 2)), np.arctanh(0.9 * coefficients)], axis=1)
    found = logistic_mixture(1, 3, 2).picture(jnp.asarray(mixture_of(weights, colours)))
    red = np.array([0.5, -1])
    green = np.clip([0.9 + 0.18 * 0.5, 0.1], -1, 1)
    blue = np.clip(np.array([-0.2, 4]) + 0.9 * green, -1, 1)
    expected = [(np.dot([0.25, 0.75], value) + 1) / 2 for value in (red, green, blue)]
    np.testing.assert_allclose(np.ravel(found), expected, rtol=1e-5)
    assert (logistic_mixture(1, 3, 2).shows, tiny.DIGITS.shows) == ("centre", "mean")


@pytest.mark.parametrize(("colours", "mixtures", "outputs"), [(3, 1, 10), (3, 4, 40), (1, 5, 15)])
def test_a_mixture_has_so_many_logits_and_its_images_bytes(colours, mixtures, outputs):
    likelihood = logistic_mixture(16, colours, mixtures)
    assert (likelihood.outputs, likelihood.levels) == (outputs, 255)
    assert likelihood.stored_bytes == 256 * colours
    assert likelihood is logistic_mixture(16, colours, mixtures)


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
    assert stored.shape == (*batch, likelihood.stored_bytes)
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
    assert stored.shape == (*batch, likelihood.stored_bytes)
    found = jax.jit(as_floats, static_argnums=0)(likelihood, stored)
    assert found.dtype == np.float32 and found.min() == 0 and found.max() == 1
    np.testing.assert_allclose(found, x / levels, rtol=1e-7)


@pytest.mark.parametrize("likelihood", [binomial(16, 3, 1), binomial(16, 3, 16)])
def test_stored_images_of_another_size_are_refused(likelihood):
    with pytest.raises(TypeError, match="reshape"):
        as_floats(likelihood, jnp.zeros((2, likelihood.stored_bytes + 8), np.uint8))
