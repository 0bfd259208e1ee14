"""Adam, clipping and the learning rate, against their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vnca import optimizer

PARAMS = {"a": np.array([1.0, -2.0], np.float32), "b": [np.array([[0.5]], np.float32)]}


def like_params(*numbers):
    return {"a": np.array(numbers[:2], np.float32), "b": [np.array([numbers[2:]], np.float32)]}


def flat(tree):
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])


@jax.jit
def update(grads, moments, params, t, rate=0.01):
    return optimizer.adam(grads, moments, params, t, rate)


def test_under_a_constant_gradient_every_update_moves_by_the_learning_rate():
    grads, params, moments = like_params(5.0, -0.01, 300.0), PARAMS, optimizer.adam_init(PARAMS)
    for t in range(1, 6):
        before = params
        params, moments = update(grads, moments, params, t)
        step = flat(params).astype(np.float64) - flat(before)
        np.testing.assert_allclose(step, [-0.01, 0.01, -0.01], rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [{}, {"b1": 0.5, "b2": 0.75, "eps": 0.1}], ids=["published", "others"]
)
def test_updates_are_those_of_the_weighted_sums_that_adam_is_defined_by(settings):
    b1, b2, eps = ({"b1": 0.9, "b2": 0.999, "eps": 1e-8} | settings).values()
    history = [(1.0, -2.0, 0.0), (3.0, 0.5, 0.0), (-0.25, 1e-3, 4.0), (2.0, 2.0, -1.0)]
    params, moments = PARAMS, optimizer.adam_init(PARAMS)
    expected = flat(PARAMS).astype(np.float64)
    for t in range(1, len(history) + 1):
        params, moments = jax.jit(lambda *a: optimizer.adam(*a, **settings))(
            like_params(*history[t - 1]), moments, params, t, 0.1
        )
        # Kingma & Ba, equations 1 and 2: moments as sums over all gradients so far.
        past = np.array(history[:t])
        ages = np.arange(t)[::-1, None]
        mean = (1 - b1) * np.sum(b1**ages * past, axis=0) / (1 - b1**t)
        square = (1 - b2) * np.sum(b2**ages * past**2, axis=0) / (1 - b2**t)
        expected = expected - 0.1 * mean / (np.sqrt(square) + eps)
        np.testing.assert_allclose(flat(params), expected, rtol=2e-5)
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)


def test_the_second_update_is_the_one_worked_by_hand():
    params = {"a": np.zeros(1, np.float32)}
    moments = optimizer.adam_init(params)
    for t, gradient in enumerate([1.0, -1.0], 1):
        params, moments = update({"a": np.array([gradient], np.float32)}, moments, params, t)
    # mean: (0.09 − 0.1)/0.19 = −1/19; square: (0.000999 + 0.001)/0.001999 = 1.
    np.testing.assert_allclose(params["a"], [-0.01 + 0.01 / 19], rtol=1e-4)


def test_without_a_gradient_nothing_moves():
    params, _ = update(like_params(0, 0, 0), optimizer.adam_init(PARAMS), PARAMS, 1)
    assert np.array_equal(flat(params), flat(PARAMS))


def test_moments_begin_at_zero_in_the_shape_of_the_parameters():
    for moment in optimizer.adam_init(PARAMS).values():
        assert jax.tree.map(np.shape, moment) == jax.tree.map(np.shape, PARAMS)
        assert not flat(moment).any()


def test_the_norm_is_over_all_arrays_together():
    assert optimizer.global_norm(like_params(3.0, 4.0, 12.0)) == 13


@pytest.mark.parametrize("limit", [10.0, 1.0])
def test_a_gradient_above_the_limit_is_scaled_to_it_and_keeps_its_direction(limit):
    clipped = optimizer.clip_by_norm(like_params(30.0, -40.0, 120.0), 130.0, limit)
    np.testing.assert_allclose(
        flat(clipped), np.array([30, -40, 120]) * limit / 130, rtol=1e-6
    )  # fmt: skip


@pytest.mark.parametrize("scale", [1 / 13, 0.1, 1 / 3, 10 / 13.0001])
def test_a_gradient_below_the_limit_passes_bit_for_bit(scale):
    grads = jax.tree.map(lambda a: np.float32(a * scale), like_params(3.0, 4.0, 12.0))
    norm = optimizer.global_norm(grads)
    np.testing.assert_allclose(norm, 13 * scale, rtol=1e-6)
    clipped = jax.jit(optimizer.clip_by_norm)(grads, norm, 10.0)
    assert np.array_equal(flat(clipped), flat(grads))


def test_a_gradient_of_zero_stays_zero():
    norm = optimizer.global_norm(like_params(0, 0, 0))
    clipped = optimizer.clip_by_norm(like_params(0, 0, 0), norm, 10.0)
    assert norm == 0 and flat(clipped).tolist() == [0, 0, 0]


def test_the_learning_rate_is_constant_unless_told_otherwise():
    assert [float(optimizer.learning_rate(t, 0.5)) for t in (1, 2, 100_000)] == [0.5] * 3


def test_the_learning_rate_rises_in_a_line_over_the_warmup():
    rates = [float(optimizer.learning_rate(jnp.int32(t), 0.5, 10)) for t in (1, 5, 10, 11, 999)]
    np.testing.assert_allclose(rates, [0.05, 0.25, 0.5, 0.5, 0.5], rtol=1e-6)


def test_the_learning_rate_falls_along_half_a_cosine_to_zero_and_stays_there():
    rate = jax.jit(lambda t: optimizer.learning_rate(t, 2.0, 0, 100))
    root = math.sqrt(0.5)
    rates = [float(rate(t)) for t in (25, 50, 75, 100, 150)]
    np.testing.assert_allclose(rates, [1 + root, 1, 1 - root, 0, 0], rtol=1e-6, atol=1e-6)


def test_warmup_and_cosine_multiply():
    rate = optimizer.learning_rate(10, 1.0, 20, 40)
    np.testing.assert_allclose(rate, 0.5 * (1 + math.sqrt(0.5)) / 2, rtol=1e-6)
